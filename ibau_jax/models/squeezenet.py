"""SqueezeNet 1.0 and 1.1 (Iandola et al., 2016), as torchvision names them."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.layers import Activation, AdaptiveAvgPool, Flatten, Identity, MaxPool, Sequential, conv, relu
from ibau_jax.models.registry import Architecture, from_torchvision, register

# The first convolution's features and kernel; then fires' squeezed and expanded features, or None for max pooling.
Layout = tuple[int, int, tuple[tuple[int, int] | None, ...]]
LAYOUTS: dict[str, Layout] = {
    "squeezenet1_0": (
        96,
        7,
        (None, (16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256)),
    ),
    "squeezenet1_1": (
        64,
        3,
        (None, (16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256)),
    ),
}


class Fire(nnx.Module):
    """A 1x1 convolution that squeezes; then 1x1 and 3x3 ones beside one another."""

    def __init__(self, in_features: int, squeezed: int, expanded: int, rngs: nnx.Rngs) -> None:
        self.squeeze = conv(in_features, squeezed, 1, rngs, bias=True)
        self.expand1x1 = conv(squeezed, expanded, 1, rngs, bias=True)
        self.expand3x3 = conv(squeezed, expanded, 3, rngs, bias=True)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        x = self.activation(self.squeeze(x))
        return self.activation(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=3))


class SqueezeNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, layout: Layout, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        before, kernel, fires = layout
        layers: list[nnx.Module] = [conv(3, before, kernel, rngs, stride=2, padding=0, bias=True), Activation(relu)]
        for fire in fires:
            if fire is None:
                layers.append(MaxPool(3, 2, ceil=True))
            else:
                layers.append(Fire(before, *fire, rngs))
                before = 2 * fire[1]
        self.features, self.flatten = Sequential(layers), Flatten()
        last = conv(before, num_classes, 1, rngs, bias=True)
        self.classifier = Sequential([Identity(), last, Activation(relu), AdaptiveAvgPool(1)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.flatten(self.classifier(self.features(x)))


for _name, _layout in LAYOUTS.items():
    register(
        Architecture(
            name=_name,
            build=partial(SqueezeNet, _layout),
            classifier="classifier.1.weight",
            image_sizes=squares(224),
            landmarks={
                "features.0.weight": (_layout[0], 3, _layout[1], _layout[1]),
                "features.12.expand3x3.weight": (256, 64, 3, 3),
            },
            torch_module=from_torchvision(_name),
        )
    )
