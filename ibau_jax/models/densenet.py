"""DenseNet (Huang et al., 2017) 121 to 201, as torchvision names it, also without the stem's stride or max pooling.

Code for small images after huyvnphan takes torchvision's names with a 3x3 stem of stride 1, and mostly keeps the max
pooling (`_small_stem`).
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import STEMS, Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    Activation,
    AvgPool,
    Identity,
    MaxPool,
    NamedSequential,
    batch_norm,
    conv,
    global_average,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register

# Growth rate, layers of the four blocks, features of the stem.
CONFIGURATIONS: dict[int, tuple[int, tuple[int, ...], int]] = {
    121: (32, (6, 12, 24, 16), 64),
    161: (48, (6, 12, 36, 24), 96),
    169: (32, (6, 12, 32, 32), 64),
    201: (32, (6, 12, 48, 32), 64),
}


@dataclass(frozen=True)
class Stem:
    """What comes before the first block."""

    kernel: int  # of the first convolution
    stride: int  # of the first convolution
    max_pool: bool  # 3x3 with stride 2


TORCHVISION = Stem(7, 2, True)
BOTTLENECK = 4  # the inner convolution has this many times the growth rate of features


class DenseLayer(nnx.Module):
    """A bottleneck whose result is appended to what it saw."""

    def __init__(self, in_features: int, growth: int, rngs: nnx.Rngs) -> None:
        hidden = BOTTLENECK * growth
        self.norm1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, hidden, 1, rngs)
        self.norm2, self.conv2 = batch_norm(hidden, rngs), conv(hidden, growth, 3, rngs)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        hidden = conv_norm(self.conv1, self.norm2, self.activation(self.norm1(x)))
        new = self.conv2(self.activation(hidden))
        return jnp.concatenate([x, new], axis=-1)


def _dense_block(in_features: int, growth: int, count: int, rngs: nnx.Rngs) -> NamedSequential:
    layers = {f"denselayer{i + 1}": DenseLayer(in_features + i * growth, growth, rngs) for i in range(count)}
    return NamedSequential(layers)


def _transition(features: int, rngs: nnx.Rngs) -> NamedSequential:
    halved = conv(features, features // 2, 1, rngs)
    return NamedSequential(
        {"norm": batch_norm(features, rngs), "relu": Activation(relu), "conv": halved, "pool": AvgPool(2)}
    )


class DenseNet(nnx.Module):
    """Logits of RGB images of any size from 32 on."""

    def __init__(self, depth: int, stem: Stem, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        growth, blocks, features = CONFIGURATIONS[depth]
        layers: dict[str, nnx.Module] = {
            "conv0": conv(3, features, stem.kernel, rngs, stride=stem.stride),
            "norm0": batch_norm(features, rngs),
            "relu0": Activation(relu),
            "pool0": MaxPool(3, 2, padding=1) if stem.max_pool else Identity(),
        }
        for number, count in enumerate(blocks, start=1):
            layers[f"denseblock{number}"] = _dense_block(features, growth, count, rngs)
            features += count * growth
            if number < len(blocks):
                layers[f"transition{number}"] = _transition(features, rngs)
                features //= 2
        self.features = NamedSequential({**layers, "norm5": batch_norm(features, rngs)})
        self.classifier = linear(features, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.activation(self.features(x))))


# By what stands behind the depth in a name: networks of different shapes, and the variants of each.
BY_NAME = {
    "": {variant: Stem(7, *stem) for variant, stem in STEMS.items()},
    "_small_stem": {"": Stem(3, 1, True), "_no_pool": Stem(3, 1, False)},
}


def _register(base: str, depth: int, variant: str, stem: Stem) -> None:
    growth, blocks, features = CONFIGURATIONS[depth]
    in_torchvision = stem == TORCHVISION
    register(
        Architecture(
            name=base + variant,
            build=partial(DenseNet, depth, stem),
            classifier="classifier.weight",
            image_sizes=squares(224 if in_torchvision else 32),
            landmarks={
                "features.conv0.weight": (features, 3, stem.kernel, stem.kernel),
                f"features.denseblock4.denselayer{blocks[-1]}.conv2.weight": (growth, 4 * growth, 3, 3),
            },
            torch_module=from_torchvision(base) if in_torchvision else None,
            variant_of=base if variant else None,
        )
    )


for _depth in CONFIGURATIONS:
    for _kind, _variants in BY_NAME.items():
        for _variant, _stem in _variants.items():
            _register(f"densenet{_depth}{_kind}", _depth, _variant, _stem)
