"""DenseNet (Huang et al., 2017) 121 to 201, as torchvision names it, also without the stem's stride or max pooling."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import Features
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

    def __init__(
        self, depth: int, stride: int, max_pool: bool, num_classes: int, image_size: int, rngs: nnx.Rngs
    ) -> None:
        growth, blocks, features = CONFIGURATIONS[depth]
        layers: dict[str, nnx.Module] = {
            "conv0": conv(3, features, 7, rngs, stride=stride),
            "norm0": batch_norm(features, rngs),
            "relu0": Activation(relu),
            "pool0": MaxPool(3, 2, padding=1) if max_pool else Identity(),
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


# Stride of the first convolution, and whether a max pooling follows.
STEMS = {"": (2, True), "_stride1": (1, True), "_no_pool": (2, False), "_stride1_no_pool": (1, False)}


def _register(depth: int, stem: str) -> None:
    growth, blocks, features = CONFIGURATIONS[depth]
    register(
        Architecture(
            name=f"densenet{depth}{stem}",
            build=partial(DenseNet, depth, *STEMS[stem]),
            classifier="classifier.weight",
            image_sizes=(32 if stem else 224,),
            landmarks={
                "features.conv0.weight": (features, 3, 7, 7),
                f"features.denseblock4.denselayer{blocks[-1]}.conv2.weight": (growth, 4 * growth, 3, 3),
            },
            torch_module=None if stem else from_torchvision(f"densenet{depth}"),
            variant_of=f"densenet{depth}" if stem else None,
        )
    )


for _depth in CONFIGURATIONS:
    for _stem in STEMS:
        _register(_depth, _stem)
