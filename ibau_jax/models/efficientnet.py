"""EfficientNet (Tan & Le, 2019) B0 to B4, as torchvision names it."""

import math
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import (
    UNSTRIDED,
    Residual,
    SqueezeExcitation,
    conv_norm_act,
    make_divisible,
    without_first_strides,
)
from ibau_jax.models.layers import Identity, Sequential, global_average, linear, silu
from ibau_jax.models.registry import Architecture, from_torchvision, register

# Expansion, kernel, stride, features and blocks of each stage of B0: table 1 of the paper.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# How many times as wide and as deep as B0, and the images' size in torchvision's weights.
SCALES = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 288),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
}
SQUEEZE = 4  # features that a block comes with, to features that its squeeze-and-excitation has


def _mb_conv(in_features: int, features: int, expansion: int, kernel: int, stride: int, rngs: nnx.Rngs) -> Residual:
    """torchvision's `MBConv`, its layers in `block`."""
    hidden = make_divisible(in_features * expansion)
    layers: list[nnx.Module] = [conv_norm_act(in_features, hidden, 1, rngs, silu)] if hidden != in_features else []
    layers += [
        conv_norm_act(hidden, hidden, kernel, rngs, silu, stride=stride, groups=hidden),
        SqueezeExcitation(hidden, max(1, in_features // SQUEEZE), silu, jax.nn.sigmoid, rngs),
        conv_norm_act(hidden, features, 1, rngs, None),
    ]
    return Residual("block", Sequential(layers), stride == 1 and in_features == features)


class EfficientNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self, width: float, depth: float, unstrided: int, num_classes: int, image_size: int, rngs: nnx.Rngs
    ) -> None:
        in_features = make_divisible(32 * width)
        first, *strides = without_first_strides([2, *(stage[2] for stage in STAGES)], unstrided)
        layers: list[nnx.Module] = [conv_norm_act(3, in_features, 3, rngs, silu, stride=first)]
        for (expansion, kernel, _, base, blocks), stride in zip(STAGES, strides, strict=True):
            features, made = make_divisible(base * width), []
            for index in range(math.ceil(blocks * depth)):
                made.append(_mb_conv(in_features, features, expansion, kernel, 1 if index else stride, rngs))
                in_features = features
            layers.append(Sequential(made))
        self.features = Sequential([*layers, conv_norm_act(in_features, 4 * in_features, 1, rngs, silu)])
        self.classifier = Sequential([Identity(), linear(4 * in_features, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.features(x)))


def _register(scale: str, suffix: str) -> None:
    (width, depth, size), unstrided = SCALES[scale], UNSTRIDED[suffix]
    last, base = make_divisible(320 * width), f"efficientnet_{scale}"
    register(
        Architecture(
            name=base + suffix,
            build=partial(EfficientNet, width, depth, unstrided),
            classifier="classifier.1.weight",
            image_sizes=(32 if unstrided else size,),
            landmarks={"features.8.0.weight": (4 * last, last, 1, 1)},
            torch_module=None if unstrided else from_torchvision(base),
            variant_of=base if suffix else None,
        )
    )


for _scale in SCALES:
    for _suffix in UNSTRIDED:
        _register(_scale, _suffix)
