"""Wide ResNets (Zagoruyko & Komodakis, 2016): WRN-depth-k, k times as wide as a thin one, as CIFAR code names them.

`wide_resnet28_10` is written as xternalz, TRADES and RobustBench have it. Semi-supervised learning's code has
LeakyReLU(0.1) in place of ReLU (`_leaky`), and first blocks that read their input as it is from the second group on
(`_raw`); neither leaves a trace in a state dict. The code of TRADES (Zhang et al., 2019) makes a second first group,
`sub_block1`, that it never calls. Two ways of writing have other names, and differ in what they compute:
`wide_resnet28_10_meliketoy`, found in backdoor-toolbox as well, and `wide_resnet28_10_deepmind`, which RobustBench
calls dm_wide_resnet.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import Features, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    Function,
    Sequential,
    batch_norm,
    conv,
    global_average,
    leaky_relu,
    linear,
    relu,
    silu,
)
from ibau_jax.models.registry import Architecture, Family, Shapes, register, register_family

STEM_FEATURES = 16
KERNEL = 8  # of the last avg_pool2d


def _widths(factor: int) -> tuple[int, int, int]:
    """Features of the three groups."""
    return 16 * factor, 32 * factor, 64 * factor


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


class BlockGroup(nnx.Module):
    """A stage, its blocks found under the name that the network gives them."""

    def __init__(self, name: str, blocks: Sequential) -> None:
        setattr(self, name, blocks)
        self.name = name

    def __call__(self, x: Features) -> Features:
        blocks: Sequential = getattr(self, self.name)
        return blocks(x)


class WideResNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self,
        activation: Function,
        raw: bool,
        count: int,
        factor: int,
        num_classes: int,
        image_size: ImageSize,
        rngs: nnx.Rngs,
    ) -> None:
        first, second, third = _widths(factor)
        not_raw, block = partial(WideBlock, activation, False, rngs), partial(WideBlock, activation, raw, rngs)
        self.conv1 = conv(3, STEM_FEATURES, 3, rngs)
        self.block1 = BlockGroup("layer", stage(not_raw, STEM_FEATURES, first, count, 1))
        self.block2 = BlockGroup("layer", stage(block, first, second, count, 2))
        self.block3 = BlockGroup("layer", stage(block, second, third, count, 2))
        self.bn1 = batch_norm(third, rngs)
        self.fc = linear(third, num_classes, rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_average(self.activation(self.bn1(x)), kernel=KERNEL))


class MeliketoyBlock(nnx.Module):
    """Two 3x3 convolutions behind their normalisations, the second with the stride; the shortcut reads the input."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        self.bn1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, features, 3, rngs, bias=True)
        self.bn2 = batch_norm(features, rngs)
        self.conv2 = conv(features, features, 3, rngs, stride=stride, bias=True)
        project = stride != 1 or in_features != features
        self.shortcut = Sequential([conv(in_features, features, 1, rngs, stride=stride, bias=True)] if project else [])
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        out = conv_norm(self.conv1, self.bn2, self.activation(self.bn1(x)))
        return self.conv2(self.activation(out)) + self.shortcut(x)


class MeliketoyWideResNet(nnx.Module):
    """meliketoy's, all of whose convolutions are biased: logits of RGB images of any size."""

    def __init__(self, count: int, factor: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        block, (first, second, third) = partial(MeliketoyBlock, rngs), _widths(factor)
        self.conv1 = conv(3, STEM_FEATURES, 3, rngs, bias=True)
        self.layer1 = stage(block, STEM_FEATURES, first, count, 1)
        self.layer2 = stage(block, first, second, count, 2)
        self.layer3 = stage(block, second, third, count, 2)
        self.bn1 = batch_norm(third, rngs)
        self.linear = linear(third, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(global_average(self.activation(self.bn1(x)), kernel=KERNEL))


class DeepMindBlock(nnx.Module):
    """Two 3x3 convolutions behind their normalisations; where the block projects, the shortcut sees activations.

    A convolution of stride 2 is padded below and on the right alone, as TensorFlow's `SAME` does it.
    """

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        self.batchnorm_0 = batch_norm(in_features, rngs)
        self.conv_0 = conv(in_features, features, 3, rngs, stride=stride, padding=0)
        self.batchnorm_1 = batch_norm(features, rngs)
        self.conv_1 = conv(features, features, 3, rngs)
        self.shortcut = conv(in_features, features, 1, rngs, stride=stride) if in_features != features else None
        self.activation = silu

    def __call__(self, x: Features) -> Features:
        active = self.activation(self.batchnorm_0(x))
        border = (1 if self.conv_0.strides == 1 else 0, 1)
        out = conv_norm(self.conv_0, self.batchnorm_1, jnp.pad(active, ((0, 0), border, border, (0, 0))))
        return self.conv_1(self.activation(out)) + (self.shortcut(active) if self.shortcut else x)


class DeepMindWideResNet(nnx.Module):
    """DeepMind's, with Swish (Gowal et al., 2020): logits of normalised RGB images of any size that 4 divides."""

    def __init__(self, count: int, factor: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        block, (first, second, third) = partial(DeepMindBlock, rngs), _widths(factor)
        self.init_conv = conv(3, STEM_FEATURES, 3, rngs)
        stages = (
            stage(block, STEM_FEATURES, first, count, 1),
            stage(block, first, second, count, 2),
            stage(block, second, third, count, 2),
        )
        self.layer = Sequential([BlockGroup("block", blocks) for blocks in stages])
        self.batchnorm = batch_norm(third, rngs)
        self.logits = linear(third, num_classes, rngs)
        self.activation = silu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(self.batchnorm(self.layer(self.init_conv(x))))
        return self.logits(global_average(x, kernel=KERNEL))


@dataclass(frozen=True)
class Style:
    """One way of writing a Wide ResNet.

    Attributes:
        network: `network(count, factor, num_classes, image_size, rngs)` builds it, of `count` blocks a group.
        classifier: the name of the last layer's weight.
        norm: the name of the last BatchNorm's weight.
        convolution: the name of a block's second convolution's weight in the last group, of the block numbered {}.
        unused: what the names of layers begin with that nothing calls.
    """

    network: Callable[..., nnx.Module]
    classifier: str = "fc.weight"
    norm: str = "bn1.weight"
    convolution: str = "block3.layer.{}.conv2.weight"
    unused: tuple[str, ...] = ("sub_block1",)


STYLES = {
    "": Style(partial(WideResNet, relu, False)),
    "_leaky_raw": Style(partial(WideResNet, leaky_relu, True)),
    "_leaky": Style(partial(WideResNet, leaky_relu, False)),
    "_raw": Style(partial(WideResNet, relu, True)),
    "_meliketoy": Style(MeliketoyWideResNet, "linear.weight", "bn1.weight", "layer3.{}.conv2.weight", ()),
    "_deepmind": Style(DeepMindWideResNet, "logits.weight", "batchnorm.weight", "layer.2.block.{}.conv_1.weight", ()),
}
VARIANTS = ("_leaky_raw", "_leaky", "_raw")  # of the first
DEEPEST, WIDEST = 202, 64
NAME = re.compile(rf"wide_resnet(?P<depth>\d{{2,3}})_(?P<factor>\d{{1,2}})(?P<style>{'|'.join(filter(None, STYLES))})?")


def _architecture(name: str, depth: int, factor: int, suffix: str) -> Architecture:
    style, count, features = STYLES[suffix], (depth - 4) // 6, _widths(factor)[-1]
    return Architecture(
        name=name,
        build=partial(style.network, count, factor),
        classifier=style.classifier,
        landmarks={style.convolution.format(count - 1): (features, features, 3, 3), style.norm: (features,)},
        variant_of=name.removesuffix(suffix) if suffix in VARIANTS else None,
        unused=style.unused,
    )


def _make(match: re.Match[str]) -> Architecture | None:
    depth, factor = int(match["depth"]), int(match["factor"])
    fits = depth % 6 == 4 and 10 <= depth <= DEEPEST and 1 <= factor <= WIDEST
    return _architecture(match[0], depth, factor, match["style"] or "") if fits else None


def _propose(shapes: Shapes) -> Iterator[str]:
    for suffix, style in STYLES.items():
        before, _, behind = style.convolution.partition("{}")
        pattern = re.compile(rf"{re.escape(before)}\d+{re.escape(behind)}")
        count = sum(pattern.fullmatch(name) is not None for name in shapes)
        features = max(shapes.get(style.norm, ()), default=0)
        last = shapes.get(style.convolution.format(count - 1))
        if suffix not in VARIANTS and last == (features, features, 3, 3) and features % _widths(1)[-1] == 0:
            yield f"wide_resnet{6 * count + 4}_{features // _widths(1)[-1]}{suffix}"


for _depth in (10, 16, 22, 28, 34, 40):
    for _factor in (1, 2, 3, 4, 5, 6, 8, 10, 12):
        register(_architecture(f"wide_resnet{_depth}_{_factor}", _depth, _factor, ""))
register_family(Family(NAME, "wide_resnet28_10_meliketoy", _make, _propose, VARIANTS))
