"""ResNet (He et al., 2016), as torchvision names it and as the CIFAR code after kuangliu does.

The two differ in names (`downsample` and `fc`, `shortcut` and `linear`) and in the stem; torchvision's is met with a
CIFAR stem as well: `conv1` 3x3. The stem's stride, its max pooling, and which convolution of a bottleneck has the
stride leave no trace in a state dict, so that each is a variant of its own (`ibau_jax.checkpoints.variants` chooses).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import RESNET_WIDTHS, Features, four_stages, stage_landmarks
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    AdaptiveAvgPool,
    AvgPool,
    Flatten,
    Identity,
    MaxPool,
    Sequential,
    batch_norm,
    conv,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register

Padding = Literal["around", "behind"]


class PadChannels(nnx.Module):
    """Takes every `stride`-th pixel and adds channels of zeros: option A of He et al. (2016), section 4.2."""

    def __init__(self, stride: int, features: int, where: Padding) -> None:
        self.stride, self.features, self.where = stride, features, where

    def __call__(self, x: Features) -> Features:
        missing = self.features - x.shape[3]
        before = missing // 2 if self.where == "around" else 0
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


@dataclass(frozen=True)
class Style:
    """What tells one way of writing a ResNet from another."""

    shortcut: str  # the attribute that holds a block's projection
    classifier: str  # the attribute that holds the last layer
    kernel: int = 3  # of conv1
    stem_stride: int = 1  # of conv1
    max_pool: bool = False  # 3x3 with stride 2, behind conv1
    grid_pool: int | None = None  # windows of the last average pooling; None is over the whole image
    padding: Padding | None = None  # where zeros stand for new channels in a shortcut without weights
    wider: int = 1  # a bottleneck's 3x3 convolution is so many times as wide (Zagoruyko & Komodakis, 2016)
    groups: int = 1  # of it (ResNeXt; Xie et al., 2017)
    v1_stride: bool = False  # a bottleneck's stride lies in its first 1x1 convolution (Caffe, MSRA), not in the 3x3 one


CIFAR = Style("shortcut", "linear")
CIFAR_64 = Style("shortcut", "linear", grid_pool=4)  # F.avg_pool2d(out, 4) leaves 2x2 of a 64x64 image
TORCHVISION = Style("downsample", "fc", kernel=7, stem_stride=2, max_pool=True)
TORCHVISION_SMALL = Style("downsample", "fc")


class ResidualBlock(nnx.Module):
    """relu(branch(x) + projection(x)), where the projection is empty if shapes agree."""

    expansion = 1

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        out_features = features * self.expansion
        project = stride != 1 or in_features != out_features
        projection: list[nnx.Module] = (
            [conv(in_features, out_features, 1, rngs, stride=stride), batch_norm(out_features, rngs)]
            if style.padding is None
            else [PadChannels(stride, out_features, style.padding)]
        )
        setattr(self, style.shortcut, Sequential(projection if project else []))
        self.shortcut_name, self.activation = style.shortcut, relu

    def __call__(self, x: Features) -> Features:
        return self.activation(self.branch(x) + getattr(self, self.shortcut_name)(x))

    def branch(self, x: Features) -> Features:
        raise NotImplementedError


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        self.conv1, self.bn1 = conv(in_features, features, 3, rngs, stride=stride), batch_norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, rngs), batch_norm(features, rngs)

    def branch(self, x: Features) -> Features:
        return conv_norm(self.conv2, self.bn2, self.activation(conv_norm(self.conv1, self.bn1, x)))


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 to four times the features; the style says which of the first two has the stride."""

    expansion = 4

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        strides, width = (stride, 1) if style.v1_stride else (1, stride), style.wider * features
        self.conv1, self.bn1 = conv(in_features, width, 1, rngs, stride=strides[0]), batch_norm(width, rngs)
        self.conv2 = conv(width, width, 3, rngs, stride=strides[1], groups=style.groups)
        self.bn2 = batch_norm(width, rngs)
        self.conv3, self.bn3 = conv(width, 4 * features, 1, rngs), batch_norm(4 * features, rngs)

    def branch(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        return conv_norm(self.conv3, self.bn3, out)


class ResNet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(
        self,
        style: Style,
        block: type[ResidualBlock],
        blocks: tuple[int, ...],
        num_classes: int,
        image_size: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1, self.bn1 = conv(3, 64, style.kernel, rngs, stride=style.stem_stride), batch_norm(64, rngs)
        self.maxpool = MaxPool(3, 2, padding=1) if style.max_pool else Identity()
        stages = four_stages(partial(block, style, rngs), 64, blocks, block.expansion)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        features = RESNET_WIDTHS[-1] * block.expansion
        self.avgpool = AvgPool(style.grid_pool) if style.grid_pool else AdaptiveAvgPool(1)
        self.flatten = Flatten()
        grid = image_size // 8 // style.grid_pool if style.grid_pool else 1
        setattr(self, style.classifier, linear(features * grid**2, num_classes, rngs))
        self.classifier_name, self.activation = style.classifier, relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.maxpool(self.activation(conv_norm(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        classifier: Callable[[Array], Array] = getattr(self, self.classifier_name)
        return classifier(self.flatten(self.avgpool(x)))


DEPTHS: dict[int, tuple[type[ResidualBlock], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _register(name: str, depth: int, style: Style, image_sizes: tuple[int, ...], variant_of: str | None = None) -> None:
    block, blocks = DEPTHS[depth]
    landmarks = stage_landmarks(blocks, block.expansion, style.wider)
    landmarks |= {"layer1.0.conv2.weight": (64 * style.wider, 64 * style.wider // style.groups, 3, 3)}
    register(
        Architecture(
            name=name,
            build=partial(ResNet, style, block, blocks),
            classifier=f"{style.classifier}.weight",
            image_sizes=image_sizes,
            landmarks={"conv1.weight": (64, 3, style.kernel, style.kernel), "bn1.weight": (64,), **landmarks},
            torch_module=from_torchvision(name) if style.kernel == 7 and variant_of is None else None,
            variant_of=variant_of,
        )
    )


def _register_with_variants(name: str, depth: int, style: Style, image_sizes: tuple[int, ...]) -> None:
    """The style, and what has its names: other strides and pooling in the stem, and a bottleneck's stride as in v1."""
    other_stride, other_pool = 3 - style.stem_stride, not style.max_pool
    by_stride, by_pool = f"_stride{other_stride}", "_max_pool" if other_pool else "_no_pool"
    variants = {
        by_pool: replace(style, max_pool=other_pool),
        by_stride: replace(style, stem_stride=other_stride),
        by_stride + by_pool: replace(style, stem_stride=other_stride, max_pool=other_pool),
    }
    if DEPTHS[depth][0] is Bottleneck:
        variants["_v1"] = replace(style, v1_stride=True)
    _register(name, depth, style, image_sizes)
    for suffix, variant in variants.items():
        _register(name + suffix, depth, variant, image_sizes, variant_of=name)


# Depth, how much wider, and groups.
WIDER = {
    "wide_resnet50_2": (50, 2, 1),
    "wide_resnet101_2": (101, 2, 1),
    "resnext50_32x4d": (50, 2, 32),
    "resnext101_32x8d": (101, 4, 32),
    "resnext101_64x4d": (101, 4, 64),
}
for _name, (_depth, _wider, _groups) in WIDER.items():
    _register(_name, _depth, replace(TORCHVISION, wider=_wider, groups=_groups), (224,))
for _depth in DEPTHS:
    _register_with_variants(f"resnet{_depth}", _depth, TORCHVISION, (224,))
    _register_with_variants(f"resnet{_depth}_small_stem", _depth, TORCHVISION_SMALL, (32,))
    _register_with_variants(f"resnet{_depth}_cifar", _depth, CIFAR, (32,))
    _register(f"resnet{_depth}_cifar_64", _depth, CIFAR_64, (64,))
