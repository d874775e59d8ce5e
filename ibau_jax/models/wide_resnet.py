"""Wide ResNets (Zagoruyko & Komodakis, 2016): WRN-depth-k, k times as wide as a thin one, as CIFAR code names them.

The code of TRADES (Zhang et al., 2019) makes a second first group, `sub_block1`, that it never calls.
Semi-supervised learning's code has LeakyReLU(0.1) in place of ReLU (`_leaky`), and first blocks that read their input
as it is from the second group on (`_raw`); neither leaves a trace in a state dict.
"""

from dataclasses import dataclass
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import Features, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import Function, batch_norm, conv, global_average, leaky_relu, linear, relu
from ibau_jax.models.registry import Architecture, register

DEPTHS = (10, 16, 22, 28, 34, 40)
WIDEN_FACTORS = (1, 2, 3, 4, 5, 6, 8, 10, 12)


@dataclass(frozen=True)
class Style:
    """What tells the ways of writing a Wide ResNet apart."""

    activation: Function = relu
    raw: bool = False  # the first blocks of groups 2 and 3 read their input as it is, past `bn1`


VARIANTS = {
    "": Style(),
    "_leaky_raw": Style(leaky_relu, raw=True),
    "_leaky": Style(leaky_relu),
    "_raw": Style(raw=True),
}


class WideBlock(nnx.Module):
    """Two 3x3 convolutions behind their normalisations.

    Where the block projects, convolution and shortcut see normalised features, unless the block is `raw`.
    """

    def __init__(
        self, activation: Function, raw: bool, rngs: nnx.Rngs, in_features: int, features: int, stride: int
    ) -> None:
        self.bn1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, features, 3, rngs, stride=stride)
        self.bn2, self.conv2 = batch_norm(features, rngs), conv(features, features, 3, rngs)
        projects = in_features != features
        self.convShortcut = conv(in_features, features, 1, rngs, stride=stride) if projects else None
        self.activation, self.raw = activation, raw and projects

    def __call__(self, x: Features) -> Features:
        active = x if self.raw else self.activation(self.bn1(x))
        out = self.conv2(self.activation(conv_norm(self.conv1, self.bn2, active)))
        return out + (self.convShortcut(active) if self.convShortcut else x)


class NetworkBlock(nnx.Module):
    """A stage, its blocks in `layer`."""

    def __init__(self, style: Style, in_features: int, features: int, count: int, stride: int, rngs: nnx.Rngs) -> None:
        block = partial(WideBlock, style.activation, style.raw and stride != 1, rngs)
        self.layer = stage(block, in_features, features, count, stride)

    def __call__(self, x: Features) -> Features:
        return self.layer(x)


class WideResNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self, depth: int, widen_factor: int, style: Style, num_classes: int, image_size: int, rngs: nnx.Rngs
    ) -> None:
        count, widths = (depth - 4) // 6, [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv(3, 16, 3, rngs)
        self.block1 = NetworkBlock(style, 16, widths[0], count, 1, rngs)
        self.block2 = NetworkBlock(style, widths[0], widths[1], count, 2, rngs)
        self.block3 = NetworkBlock(style, widths[1], widths[2], count, 2, rngs)
        self.bn1 = batch_norm(widths[2], rngs)
        self.fc = linear(widths[2], num_classes, rngs)
        self.activation = style.activation

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_average(self.activation(self.bn1(x))))


def _register(depth: int, factor: int, variant: str) -> None:
    base = f"wide_resnet{depth}_{factor}"
    last = f"block3.layer.{(depth - 4) // 6 - 1}.conv2.weight"
    register(
        Architecture(
            name=base + variant,
            build=partial(WideResNet, depth, factor, VARIANTS[variant]),
            classifier="fc.weight",
            landmarks={last: (64 * factor, 64 * factor, 3, 3), "bn1.weight": (64 * factor,)},
            variant_of=base if variant else None,
            unused=("sub_block1",),
        )
    )


for _depth in DEPTHS:
    for _factor in WIDEN_FACTORS:
        for _variant in VARIANTS:
            _register(_depth, _factor, _variant)
