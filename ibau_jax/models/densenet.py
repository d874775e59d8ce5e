"""DenseNet (Huang et al., 2017) 121 and 161, as torchvision names it."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    Activation,
    AvgPool,
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
}
BOTTLENECK = 4  # the inner convolution has this many times the growth rate of features


class DenseLayer(nnx.Module):
    """A bottleneck whose result is appended to what it saw."""

    def __init__(self, in_features: int, growth: int, rngs: nnx.Rngs) -> None:
        hidden = BOTTLENECK * growth
        self.norm1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, hidden, 1, rngs)
        self.norm2, self.conv2 = batch_norm(hidden, rngs), conv(hidden, growth, 3, rngs)

    def __call__(self, x: Features) -> Features:
        new = self.conv2(relu(conv_norm(self.conv1, self.norm2, relu(self.norm1(x)))))
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

    def __init__(self, variant: int, num_classes: int, image_size: int, rngs: nnx.Rngs) -> None:
        growth, blocks, features = CONFIGURATIONS[variant]
        layers: dict[str, nnx.Module] = {
            "conv0": conv(3, features, 7, rngs, stride=2),
            "norm0": batch_norm(features, rngs),
            "relu0": Activation(relu),
            "pool0": MaxPool(3, 2, padding=1),
        }
        for number, count in enumerate(blocks, start=1):
            layers[f"denseblock{number}"] = _dense_block(features, growth, count, rngs)
            features += count * growth
            if number < len(blocks):
                layers[f"transition{number}"] = _transition(features, rngs)
                features //= 2
        self.features = NamedSequential({**layers, "norm5": batch_norm(features, rngs)})
        self.classifier = linear(features, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(relu(self.features(x))))


for _variant, (_growth, _blocks, _features) in CONFIGURATIONS.items():
    register(
        Architecture(
            name=f"densenet{_variant}",
            build=partial(DenseNet, _variant),
            classifier="classifier.weight",
            image_sizes=(224,),
            landmarks={
                "features.conv0.weight": (_features, 3, 7, 7),
                f"features.denseblock4.denselayer{_blocks[-1]}.conv2.weight": (_growth, 4 * _growth, 3, 3),
            },
            torch_module=from_torchvision(f"densenet{_variant}"),
        )
    )
