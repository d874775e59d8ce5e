"""PNASNet's (Liu et al., 2018) cells A and B for CIFAR-10, as kuangliu names them.

Their depthwise convolutions have no pointwise ones behind them; where a cell widens, each channel makes two.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import Features, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import MaxPool, NamedSequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register

CELLS = 6  # of each stage


def _separate(in_features: int, features: int, kernel: int, stride: int, rngs: nnx.Rngs) -> NamedSequential:
    """kuangliu's `SepConv`: a convolution of each channel for itself."""
    convolution = conv(in_features, features, kernel, rngs, stride=stride, groups=in_features)
    return NamedSequential({"conv1": convolution, "bn1": batch_norm(features, rngs)})


class Cell(nnx.Module):
    """What both cells have: a 7x7 convolution of each channel, and a pooling, widened where the maps are halved."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        self.sep_conv1 = _separate(in_features, features, 7, stride, rngs)
        self.pool, self.activation = MaxPool(3, stride, 1), relu
        self.conv1 = conv(in_features, features, 1, rngs) if stride == 2 else None
        self.bn1 = batch_norm(features, rngs) if stride == 2 else None

    def pooled(self, x: Features) -> Features:
        """The pooling's output."""
        pooled = self.pool(x)
        return conv_norm(self.conv1, self.bn1, pooled) if self.conv1 and self.bn1 else pooled


class CellA(Cell):
    """The sum of both."""

    def __call__(self, x: Features) -> Features:
        return self.activation(self.sep_conv1(x) + self.pooled(x))


class CellB(Cell):
    """Two sums of two, beside one another: with smaller convolutions as well, reduced to fewer features again."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(rngs, in_features, features, stride)
        self.sep_conv2 = _separate(in_features, features, 3, stride, rngs)
        self.sep_conv3 = _separate(in_features, features, 5, stride, rngs)
        self.conv2, self.bn2 = conv(2 * features, features, 1, rngs), batch_norm(features, rngs)

    def __call__(self, x: Features) -> Features:
        left = self.activation(self.sep_conv1(x) + self.sep_conv2(x))
        right = self.activation(self.pooled(x) + self.sep_conv3(x))
        return self.activation(conv_norm(self.conv2, self.bn2, jnp.concatenate([left, right], axis=-1)))


class PNASNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, cell: type[Cell], width: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        made = partial(cell, rngs)
        self.conv1, self.bn1 = conv(3, width, 3, rngs), batch_norm(width, rngs)
        self.layer1, self.layer2 = stage(made, width, width, CELLS, 1), made(width, 2 * width, 2)
        self.layer3, self.layer4 = stage(made, 2 * width, 2 * width, CELLS, 1), made(2 * width, 4 * width, 2)
        self.layer5 = stage(made, 4 * width, 4 * width, CELLS, 1)
        self.linear = linear(4 * width, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = layer(x)
        return self.linear(global_average(x, kernel=8))


for _letter, _cell, _width in (("a", CellA, 44), ("b", CellB, 32)):
    register(
        Architecture(
            name=f"pnasnet_{_letter}_cifar",
            build=partial(PNASNet, _cell, _width),
            classifier="linear.weight",
            landmarks={
                "layer4.conv1.weight": (4 * _width, 2 * _width, 1, 1),
                "layer5.5.sep_conv1.conv1.weight": (4 * _width, 1, 7, 7),
            },
        )
    )
