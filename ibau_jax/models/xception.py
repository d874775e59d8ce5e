"""Xception (Chollet, 2017), as tstandley, Cadene and timm (`legacy_xception`) name it."""

from itertools import pairwise

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import Activation, MaxPool, Sequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register

STEM_FEATURES = (32, 64)
# The features that each block's convolutions are given and give, and its stride: figure 5 of the paper.
MIDDLE = ((728, 728, 728, 728), 1)
BLOCKS = (
    ((64, 128, 128), 2),
    ((128, 256, 256), 2),
    ((256, 728, 728), 2),
    *[MIDDLE] * 8,
    ((728, 728, 1024), 2),
)
LAST_FEATURES = (1536, 2048)


class SeparableConv(nnx.Module):
    """A 3x3 convolution of each channel, and a 1x1 convolution of all, with nothing between them."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs) -> None:
        self.conv1 = conv(in_features, in_features, 3, rngs, groups=in_features)
        self.pointwise = conv(in_features, features, 1, rngs)

    def __call__(self, x: Features) -> Features:
        return self.pointwise(self.conv1(x))


class Block(nnx.Module):
    """Separable convolutions behind ReLUs, a pooling if there is a stride, and a projection where shapes differ.

    The first block's features come from a ReLU, so that it begins without one.
    """

    def __init__(self, widths: tuple[int, ...], stride: int, is_first: bool, rngs: nnx.Rngs) -> None:
        layers: list[nnx.Module] = []
        for in_features, features in pairwise(widths):
            layers += [Activation(relu), SeparableConv(in_features, features, rngs), batch_norm(features, rngs)]
        self.rep = Sequential([*layers[is_first:], *([MaxPool(3, stride, padding=1)] if stride > 1 else [])])
        projects = stride > 1 or widths[0] != widths[-1]
        self.skip = conv(widths[0], widths[-1], 1, rngs, stride=stride) if projects else None
        self.skipbn = batch_norm(widths[-1], rngs) if projects else None

    def __call__(self, x: Features) -> Features:
        shortcut = conv_norm(self.skip, self.skipbn, x) if self.skip and self.skipbn else x
        return self.rep(x) + shortcut


class Xception(nnx.Module):
    """Logits of RGB images of any size from 33 on."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        first, second = STEM_FEATURES
        self.conv1, self.bn1 = conv(3, first, 3, rngs, stride=2, padding=0), batch_norm(first, rngs)
        self.conv2, self.bn2 = conv(first, second, 3, rngs, padding=0), batch_norm(second, rngs)
        for number, (widths, stride) in enumerate(BLOCKS, start=1):
            setattr(self, f"block{number}", Block(widths, stride, number == 1, rngs))
        third, last = LAST_FEATURES
        self.conv3, self.bn3 = SeparableConv(BLOCKS[-1][0][-1], third, rngs), batch_norm(third, rngs)
        self.conv4, self.bn4 = SeparableConv(third, last, rngs), batch_norm(last, rngs)
        self.fc = linear(last, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        x = self.activation(conv_norm(self.conv2, self.bn2, x))
        for number in range(1, len(BLOCKS) + 1):
            x = getattr(self, f"block{number}")(x)
        x = self.activation(self.bn3(self.conv3(x)))
        x = self.activation(self.bn4(self.conv4(x)))
        return self.fc(global_average(x))


register(
    Architecture(
        name="xception",
        build=Xception,
        classifier="fc.weight",
        image_sizes=squares(299),
        landmarks={
            "conv4.pointwise.weight": (LAST_FEATURES[1], LAST_FEATURES[0], 1, 1),
            "block12.skip.weight": (1024, 728, 1, 1),
        },
    )
)
