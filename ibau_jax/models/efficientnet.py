"""EfficientNet B0 to B7 (Tan & Le, 2019) and V2 S to L (Tan & Le, 2021), as torchvision names them.

timm has B0 to B4 also with TensorFlow's weights and padding (`tf_`); its larger ones are in `timm_efficientnet`.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import (
    UNSTRIDED,
    Residual,
    SqueezeExcitation,
    conv_norm_act,
    make_divisible,
    stage,
    without_first_strides,
)
from ibau_jax.models.layers import Identity, Sequential, global_average, linear, silu
from ibau_jax.models.registry import Architecture, from_torchvision, register
from ibau_jax.models.tensorflow import from_tensorflow


class Stage(NamedTuple):
    """Blocks of one width; those of V2's first stages have their first two convolutions fused into one."""

    expansion: int
    kernel: int
    stride: int
    features: int
    blocks: int
    fused: bool = False


class Sizes(NamedTuple):
    """What tells the networks apart, and the images' size in torchvision's weights."""

    stem: int
    stages: tuple[Stage, ...]
    last: int
    epsilon: float
    image_size: int


# B0: table 1 of the paper.
STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
STEM = 32
TORCH_EPSILON = 1e-5  # of BatchNorm; TensorFlow's is larger
# How many times as wide and as deep as B0, BatchNorm's ε and the images' size in torchvision's weights.
SCALES = {
    "b0": (1.0, 1.0, TORCH_EPSILON, 224),
    "b1": (1.0, 1.1, TORCH_EPSILON, 240),
    "b2": (1.1, 1.2, TORCH_EPSILON, 288),
    "b3": (1.2, 1.4, TORCH_EPSILON, 300),
    "b4": (1.4, 1.8, TORCH_EPSILON, 380),
    "b5": (1.6, 2.2, 1e-3, 456),
    "b6": (1.8, 2.6, 1e-3, 528),
    "b7": (2.0, 3.1, 1e-3, 600),
}
# Stages and images' size of V2: table 4 of its paper for S.
V2 = {
    "v2_s": (
        (
            Stage(1, 3, 1, 24, 2, fused=True),
            Stage(4, 3, 2, 48, 4, fused=True),
            Stage(4, 3, 2, 64, 4, fused=True),
            Stage(4, 3, 2, 128, 6),
            Stage(6, 3, 1, 160, 9),
            Stage(6, 3, 2, 256, 15),
        ),
        384,
    ),
    "v2_m": (
        (
            Stage(1, 3, 1, 24, 3, fused=True),
            Stage(4, 3, 2, 48, 5, fused=True),
            Stage(4, 3, 2, 80, 5, fused=True),
            Stage(4, 3, 2, 160, 7),
            Stage(6, 3, 1, 176, 14),
            Stage(6, 3, 2, 304, 18),
            Stage(6, 3, 1, 512, 5),
        ),
        480,
    ),
    "v2_l": (
        (
            Stage(1, 3, 1, 32, 4, fused=True),
            Stage(4, 3, 2, 64, 7, fused=True),
            Stage(4, 3, 2, 96, 7, fused=True),
            Stage(4, 3, 2, 192, 10),
            Stage(6, 3, 1, 224, 19),
            Stage(6, 3, 2, 384, 25),
            Stage(6, 3, 1, 640, 7),
        ),
        480,
    ),
}
V2_LAST = 1280
SQUEEZE = 4  # features that a block comes with, to features that its squeeze-and-excitation has


def sizes(name: str) -> Sizes:
    """What `b0` to `b7` and `v2_s` to `v2_l` stand for."""
    if name in V2:
        stages, image_size = V2[name]
        return Sizes(stages[0].features, stages, V2_LAST, 1e-3, image_size)
    width, depth, epsilon, image_size = SCALES[name]
    stages = tuple(
        stage._replace(features=make_divisible(width * stage.features), blocks=math.ceil(depth * stage.blocks))
        for stage in STAGES
    )
    return Sizes(make_divisible(width * STEM), stages, 4 * stages[-1].features, epsilon, image_size)


def _mb_conv(shape: Stage, epsilon: float, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> Residual:
    """torchvision's `MBConv` or `FusedMBConv`, its layers in `block`."""
    hidden, kernel = make_divisible(in_features * shape.expansion), shape.kernel
    norm = partial(conv_norm_act, rngs=rngs, epsilon=epsilon)
    expands = hidden != in_features
    layers: list[nnx.Module]
    if shape.fused:
        layers = [norm(in_features, hidden if expands else features, kernel, activation=silu, stride=stride)]
    else:
        layers = [norm(in_features, hidden, 1, activation=silu)] if expands else []
        layers += [
            norm(hidden, hidden, kernel, activation=silu, stride=stride, groups=hidden),
            SqueezeExcitation(hidden, max(1, in_features // SQUEEZE), silu, jax.nn.sigmoid, rngs),
        ]
    layers += [norm(hidden, features, 1, activation=None)] if expands or not shape.fused else []
    return Residual("block", Sequential(layers), stride == 1 and in_features == features)


class EfficientNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, name: str, unstrided: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        in_features, stages, last, epsilon, _ = sizes(name)
        first, *strides = without_first_strides([2, *(stage.stride for stage in stages)], unstrided)
        norm = partial(conv_norm_act, rngs=rngs, activation=silu, epsilon=epsilon)
        layers: list[nnx.Module] = [norm(3, in_features, 3, stride=first)]
        for shape, stride in zip(stages, strides, strict=True):
            block = partial(_mb_conv, shape, epsilon, rngs)
            layers.append(stage(block, in_features, shape.features, shape.blocks, stride))
            in_features = shape.features
        self.features = Sequential([*layers, norm(in_features, last, 1)])
        self.classifier = Sequential([Identity(), linear(last, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.features(x)))


def _register(name: str, suffix: str, *, tensorflow: bool = False) -> None:
    (_, stages, last, _, size), unstrided = sizes(name), UNSTRIDED[suffix]
    base, build = f"efficientnet_{name}", partial(EfficientNet, name, unstrided)
    is_base = not (suffix or tensorflow)
    register(
        Architecture(
            name=f"tf_{base}" if tensorflow else base + suffix,
            build=from_tensorflow(build) if tensorflow else build,
            classifier="classifier.1.weight",
            image_sizes=squares(32 if unstrided else size),
            landmarks={f"features.{len(stages) + 1}.0.weight": (last, stages[-1].features, 1, 1)},
            torch_module=from_torchvision(base) if is_base else None,
            variant_of=None if is_base else base,
        )
    )


for _name in (*SCALES, *V2):
    for _suffix in UNSTRIDED:
        _register(_name, _suffix)
for _name in SCALES:
    if sizes(_name).epsilon == TORCH_EPSILON:
        _register(_name, "", tensorflow=True)
