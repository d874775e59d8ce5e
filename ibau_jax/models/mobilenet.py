"""MobileNetV2 (Sandler et al., 2018) and V3 (Howard et al., 2019), large and small.

V2 is written in three ways: torchvision's, of any width multiplier (`mobilenet_v2_x0_5`), and for CIFAR kuangliu's
(`conv1`, `layers.0.conv1`, ... `linear`) and weiaicunzai's (`pre.0`, `stage1.residual.0`, ... `conv2`), which
backdoor-toolbox has. CIFAR code takes torchvision's names, too, with its first strides left out.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import chain

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import (
    UNSTRIDED,
    Features,
    Residual,
    SqueezeExcitation,
    conv_norm_act,
    make_divisible,
    without_first_strides,
)
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    Activation,
    Function,
    Identity,
    Sequential,
    batch_norm,
    conv,
    global_average,
    hardsigmoid,
    hardswish,
    linear,
    relu,
    relu6,
)
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register, register_family
from ibau_jax.models.sizes import MULTIPLIER, fitting_multiplier, named_multiplier, spelled_multiplier

# Expansion, features, blocks and stride of each stage: table 2 of the paper, and with CIFAR's strides.
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
V2_CIFAR_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), *V2_STAGES[2:])
V2_WEIAICUNZAI_STAGES = (*V2_STAGES[:5], (6, 160, 3, 1), (6, 320, 1, 1))
# Kernel, expanded features, features, squeeze-and-excitation, activation and stride: tables 1 and 2 of the V3 paper.
V3Block = tuple[int, int, int, bool, Function, int]
V3_LARGE: tuple[V3Block, ...] = (
    (3, 16, 16, False, relu, 1),
    (3, 64, 24, False, relu, 2),
    (3, 72, 24, False, relu, 1),
    (5, 72, 40, True, relu, 2),
    (5, 120, 40, True, relu, 1),
    (5, 120, 40, True, relu, 1),
    (3, 240, 80, False, hardswish, 2),
    (3, 200, 80, False, hardswish, 1),
    (3, 184, 80, False, hardswish, 1),
    (3, 184, 80, False, hardswish, 1),
    (3, 480, 112, True, hardswish, 1),
    (3, 672, 112, True, hardswish, 1),
    (5, 672, 160, True, hardswish, 2),
    (5, 960, 160, True, hardswish, 1),
    (5, 960, 160, True, hardswish, 1),
)
V3_SMALL: tuple[V3Block, ...] = (
    (3, 16, 16, True, relu, 2),
    (3, 72, 24, False, relu, 2),
    (3, 88, 24, False, relu, 1),
    (5, 96, 40, True, hardswish, 2),
    (5, 240, 40, True, hardswish, 1),
    (5, 240, 40, True, hardswish, 1),
    (5, 120, 48, True, hardswish, 1),
    (5, 144, 48, True, hardswish, 1),
    (5, 288, 96, True, hardswish, 2),
    (5, 576, 96, True, hardswish, 1),
    (5, 576, 96, True, hardswish, 1),
)
V3_SIZES = {"large": (V3_LARGE, 1280), "small": (V3_SMALL, 1024)}  # blocks, and the classifier's hidden features
V3_EXPANSION = 6  # of the last convolution

STEM_FEATURES, LAST_FEATURES = 32, 1280  # of V2
V2_NAME = re.compile(rf"mobilenet_v2_x(?P<width>{MULTIPLIER})(?P<strides>{'|'.join(UNSTRIDED)})")

Shape = tuple[int, int, int, int]


def _shapes(stages: tuple[Shape, ...], in_features: int = STEM_FEATURES) -> list[list[Shape]]:
    """For each stage of V2, its blocks' features before and behind, expansion and stride."""
    shapes = []
    for expansion, features, blocks, stride in stages:
        first, following = (in_features, features, expansion, stride), (features, features, expansion, 1)
        shapes.append([first, *[following] * (blocks - 1)])
        in_features = features
    return shapes


def _inverted_residual(in_features: int, features: int, expansion: int, stride: int, rngs: nnx.Rngs) -> Residual:
    """torchvision's `InvertedResidual` of V2, its layers in `conv`."""
    hidden = in_features * expansion
    expand = [conv_norm_act(in_features, hidden, 1, rngs, relu6)] if expansion != 1 else []
    depthwise = conv_norm_act(hidden, hidden, 3, rngs, relu6, stride=stride, groups=hidden)
    project = [conv(hidden, features, 1, rngs), batch_norm(features, rngs)]
    return Residual("conv", Sequential([*expand, depthwise, *project]), stride == 1 and in_features == features)


def _v2_widths(width: float) -> tuple[int, tuple[Shape, ...], int]:
    """The stem's features, the stages and the last convolution's features of V2 that is so many times as wide."""
    stages = tuple(
        (expansion, make_divisible(width * base), blocks, stride) for expansion, base, blocks, stride in V2_STAGES
    )
    return make_divisible(width * STEM_FEATURES), stages, make_divisible(max(width, 1.0) * LAST_FEATURES)


class MobileNetV2(nnx.Module):
    """torchvision's MobileNetV2: logits of RGB images of any size."""

    def __init__(self, width: float, unstrided: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        stem, stages, last = _v2_widths(width)
        first, *strides = without_first_strides([2, *(stage[-1] for stage in stages)], unstrided)
        stages = tuple((*stage[:-1], stride) for stage, stride in zip(stages, strides, strict=True))
        layers: list[nnx.Module] = [conv_norm_act(3, stem, 3, rngs, relu6, stride=first)]
        layers += [_inverted_residual(*shape, rngs) for stage in _shapes(stages, stem) for shape in stage]
        self.features = Sequential([*layers, conv_norm_act(stages[-1][1], last, 1, rngs, relu6)])
        self.classifier = Sequential([Identity(), linear(last, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.features(x)))


class CifarBlock(nnx.Module):
    """kuangliu's inverted residual: ReLU, a projection where widths differ, no shortcut at stride 2."""

    def __init__(self, in_features: int, features: int, expansion: int, stride: int, rngs: nnx.Rngs) -> None:
        hidden = in_features * expansion
        self.conv1, self.bn1 = conv(in_features, hidden, 1, rngs), batch_norm(hidden, rngs)
        self.conv2, self.bn2 = conv(hidden, hidden, 3, rngs, stride=stride, groups=hidden), batch_norm(hidden, rngs)
        self.conv3, self.bn3 = conv(hidden, features, 1, rngs), batch_norm(features, rngs)
        projects = stride == 1 and in_features != features
        projection = [conv(in_features, features, 1, rngs), batch_norm(features, rngs)]
        self.shortcut = Sequential(projection if projects else [])
        self.stride, self.activation = stride, relu

    def __call__(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, out)
        return out + self.shortcut(x) if self.stride == 1 else out


class CifarMobileNetV2(nnx.Module):
    """kuangliu's MobileNetV2: logits of RGB images of any size."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        self.layers = Sequential([CifarBlock(*shape, rngs) for stage in _shapes(V2_CIFAR_STAGES) for shape in stage])
        self.conv2 = conv(V2_CIFAR_STAGES[-1][1], LAST_FEATURES, 1, rngs)
        self.bn2 = batch_norm(LAST_FEATURES, rngs)
        self.linear = linear(LAST_FEATURES, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layers(self.activation(conv_norm(self.conv1, self.bn1, x)))
        return self.linear(global_average(self.activation(conv_norm(self.conv2, self.bn2, x)), kernel=4))


def _biased(in_features: int, features: int, kernel: int, rngs: nnx.Rngs, **options: int) -> list[nnx.Module]:
    return [conv(in_features, features, kernel, rngs, bias=True, **options), batch_norm(features, rngs)]


def _linear_bottleneck(in_features: int, features: int, expansion: int, stride: int, rngs: nnx.Rngs) -> Residual:
    """weiaicunzai's inverted residual, its layers in `residual`: all convolutions biased, always expanded."""
    hidden = in_features * expansion
    layers = [
        *_biased(in_features, hidden, 1, rngs),
        Activation(relu6),
        *_biased(hidden, hidden, 3, rngs, stride=stride, groups=hidden),
        Activation(relu6),
        *_biased(hidden, features, 1, rngs),
    ]
    return Residual("residual", Sequential(layers), stride == 1 and in_features == features)


class WeiaicunzaiMobileNetV2(nnx.Module):
    """weiaicunzai's MobileNetV2: logits of RGB images of any size. Its stem is a padded 1x1 convolution."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.pre = Sequential([*_biased(3, STEM_FEATURES, 1, rngs, padding=1), Activation(relu6)])
        for number, stage in enumerate(_shapes(V2_WEIAICUNZAI_STAGES), start=1):
            blocks = [_linear_bottleneck(*shape, rngs) for shape in stage]
            setattr(self, f"stage{number}", Sequential(blocks) if len(blocks) > 1 else blocks[0])
        self.conv1 = Sequential([*_biased(V2_WEIAICUNZAI_STAGES[-1][1], LAST_FEATURES, 1, rngs), Activation(relu6)])
        self.conv2 = conv(LAST_FEATURES, num_classes, 1, rngs, bias=True)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.pre(x)
        for number in range(1, len(V2_WEIAICUNZAI_STAGES) + 1):
            x = getattr(self, f"stage{number}")(x)
        return self.conv2(self.conv1(x).mean((1, 2), keepdims=True)).mean((1, 2))


def _v3_block(
    in_features: int,
    kernel: int,
    hidden: int,
    features: int,
    squeezes: bool,
    activation: Function,
    stride: int,
    rngs: nnx.Rngs,
) -> Residual:
    """torchvision's `InvertedResidual` of V3, its layers in `block`."""
    norm = partial(conv_norm_act, rngs=rngs, epsilon=1e-3)
    layers: list[nnx.Module] = [norm(in_features, hidden, 1, activation=activation)] if hidden != in_features else []
    layers.append(norm(hidden, hidden, kernel, activation=activation, stride=stride, groups=hidden))
    if squeezes:
        layers.append(SqueezeExcitation(hidden, make_divisible(hidden // 4), relu, hardsigmoid, rngs))
    layers.append(norm(hidden, features, 1, activation=None))
    return Residual("block", Sequential(layers), stride == 1 and in_features == features)


class MobileNetV3(nnx.Module):
    """torchvision's MobileNetV3 of a size: logits of RGB images of any size."""

    def __init__(self, size: str, unstrided: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        blocks, hidden = V3_SIZES[size]
        first, *strides = without_first_strides([2, *(block[-1] for block in blocks)], unstrided)
        layers: list[nnx.Module] = [conv_norm_act(3, 16, 3, rngs, hardswish, stride=first, epsilon=1e-3)]
        in_features = 16
        for (kernel, expanded, features, squeezes, activation, _), stride in zip(blocks, strides, strict=True):
            layers.append(_v3_block(in_features, kernel, expanded, features, squeezes, activation, stride, rngs))
            in_features = features
        last = V3_EXPANSION * in_features
        self.features = Sequential([*layers, conv_norm_act(in_features, last, 1, rngs, hardswish, epsilon=1e-3)])
        self.classifier = Sequential(
            [linear(last, hidden, rngs), Activation(hardswish), Identity(), linear(hidden, num_classes, rngs)]
        )

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.features(x)))


def _v2_landmarks(width: float) -> dict[str, tuple[int, ...]]:
    """The last convolution, the stem's, and that which each block ends with."""
    stem, stages, last = _v2_widths(width)
    blocks = chain.from_iterable(_shapes(stages, stem))
    return {
        "features.18.0.weight": (last, stages[-1][1], 1, 1),
        "features.0.0.weight": (stem, 3, 3, 3),
        **{
            f"features.{index}.conv.{1 if expansion == 1 else 2}.weight": (features, expansion * in_features, 1, 1)
            for index, (in_features, features, expansion, _) in enumerate(blocks, start=1)
        },
    }


def _v2(width: float, strides: str) -> Architecture:
    base = "mobilenet_v2" if width == 1 else f"mobilenet_v2_x{spelled_multiplier(width)}"
    return Architecture(
        name=base + strides,
        build=partial(MobileNetV2, width, UNSTRIDED[strides]),
        classifier="classifier.1.weight",
        image_sizes=squares(32 if strides else 224),
        landmarks=_v2_landmarks(width),
        torch_module=None if strides else from_torchvision("mobilenet_v2", width_mult=width),
        variant_of=base if strides else None,
    )


def _v3(size: str, strides: str) -> Architecture:
    base, blocks = f"mobilenet_v3_{size}", V3_SIZES[size][0]
    last = blocks[-1][2]
    return Architecture(
        name=base + strides,
        build=partial(MobileNetV3, size, UNSTRIDED[strides]),
        classifier="classifier.3.weight",
        image_sizes=squares(32 if strides else 224),
        landmarks={f"features.{len(blocks) + 1}.0.weight": (V3_EXPANSION * last, last, 1, 1)},
        torch_module=None if strides else from_torchvision(base),
        variant_of=base if strides else None,
    )


def _make(match: re.Match[str]) -> Architecture | None:
    width = named_multiplier(match["width"])
    return _v2(width, match["strides"]) if width not in (None, 1.0) else None


def _propose(shapes: Shapes) -> Iterator[str]:
    width = fitting_multiplier(shapes, _v2_landmarks)
    if width is not None:
        yield _v2(width, "").name


for _strides in UNSTRIDED:
    register(_v2(1.0, _strides))
    for _size in V3_SIZES:
        register(_v3(_size, _strides))
register_family(Family(V2_NAME, "mobilenet_v2_x0_5", _make, _propose, tuple(filter(None, UNSTRIDED))))
register(
    Architecture(
        name="mobilenet_v2_cifar",
        build=CifarMobileNetV2,
        classifier="linear.weight",
        landmarks={"layers.16.conv3.weight": (320, 960, 1, 1)},
    )
)
register(
    Architecture(
        name="mobilenet_v2_weiaicunzai",
        build=WeiaicunzaiMobileNetV2,
        classifier="conv2.weight",
        landmarks={"pre.0.weight": (32, 3, 1, 1), "stage7.residual.0.weight": (960, 160, 1, 1)},
    )
)
