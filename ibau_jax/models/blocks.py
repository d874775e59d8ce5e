"""Blocks that several families are built from, named as PyTorch and torchvision name their parts."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.convolution import Conv
from ibau_jax.models.layers import (
    Activation,
    Function,
    Identity,
    NamedSequential,
    Sequential,
    batch_norm,
    conv,
    gelu,
    linear,
)

Features = Float[Array, "n h w c"]
Block = Callable[[int, int, int], nnx.Module]  # (in_features, features, stride)


def stage(block: Block, in_features: int, features: int, count: int, stride: int, expansion: int = 1) -> Sequential:
    """`count` blocks of which the first has the stride and widens, as ResNets' `layer1` to `layer4`."""
    first = block(in_features, features, stride)
    return Sequential([first, *(block(features * expansion, features, 1) for _ in range(count - 1))])


def stage_widths(width: int) -> tuple[int, int, int, int]:
    """Features of a ResNet's stages, each twice as wide as the one before."""
    return width, 2 * width, 4 * width, 8 * width


RESNET_WIDTHS = stage_widths(64)


def four_stages(
    block: Block,
    in_features: int,
    blocks: tuple[int, ...],
    expansion: int,
    widths: tuple[int, ...] = RESNET_WIDTHS,
) -> tuple[Sequential, Sequential, Sequential, Sequential]:
    """A ResNet's `layer1` to `layer4`: each but for the first half as large as the one before."""
    made = []
    for number, (features, count) in enumerate(zip(widths, blocks, strict=True)):
        made.append(stage(block, in_features, features, count, 2 if number else 1, expansion))
        in_features = features * expansion
    layer1, layer2, layer3, layer4 = made
    return layer1, layer2, layer3, layer4


def stage_landmarks(
    blocks: tuple[int, ...],
    expansion: int,
    wider: int = 1,
    widths: tuple[int, ...] = RESNET_WIDTHS,
    in_features: int = RESNET_WIDTHS[0],
) -> dict[str, tuple[int, ...]]:
    """The first convolution of each stage's last block, which tells depth, width and kind of a ResNet."""
    landmarks: dict[str, tuple[int, ...]] = {}
    kernel = 3 if expansion == 1 else 1
    for number, (features, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        before = in_features if count == 1 else features * expansion
        landmarks[f"layer{number}.{count - 1}.conv1.weight"] = (wider * features, before, kernel, kernel)
        in_features = features * expansion
    return landmarks


def conv_norm_act(
    in_features: int,
    features: int,
    kernel: int,
    rngs: nnx.Rngs,
    activation: Function | None,
    *,
    stride: int = 1,
    groups: int = 1,
    epsilon: float = 1e-5,
) -> Sequential:
    """`torchvision.ops.Conv2dNormActivation`: convolution `0`, BatchNorm `1`, activation `2` unless it is None."""
    layers = [
        conv(in_features, features, kernel, rngs, stride=stride, groups=groups),
        batch_norm(features, rngs, epsilon),
    ]
    return Sequential(layers + ([Activation(activation)] if activation else []))


class SqueezeExcitation(nnx.Module):
    """`torchvision.ops.SqueezeExcitation`: scales each channel by what the image's mean says of it."""

    def __init__(self, features: int, squeezed: int, activation: Function, gate: Function, rngs: nnx.Rngs) -> None:
        self.fc1 = conv(features, squeezed, 1, rngs, bias=True)
        self.fc2 = conv(squeezed, features, 1, rngs, bias=True)
        self.activation, self.gate = activation, gate

    def __call__(self, x: Features) -> Features:
        return squeeze_and_excite(x, self.fc1, self.fc2, self.activation, self.gate)


class CifarSqueezeExcitation(nnx.Module):
    """The same with the names of the CIFAR code after kuangliu."""

    def __init__(self, features: int, squeezed: int, activation: Function, rngs: nnx.Rngs) -> None:
        self.se1 = conv(features, squeezed, 1, rngs, bias=True)
        self.se2 = conv(squeezed, features, 1, rngs, bias=True)
        self.activation, self.gate = activation, jax.nn.sigmoid

    def __call__(self, x: Features) -> Features:
        return squeeze_and_excite(x, self.se1, self.se2, self.activation, self.gate)


def squeeze_and_excite(x: Features, squeeze: Conv, excite: Conv, activation: Function, gate: Function) -> Features:
    """Scales each channel by the gate of what two 1x1 convolutions make of the image's mean (Hu et al., 2018)."""
    return gate(excite(activation(squeeze(x.mean((1, 2), keepdims=True))))) * x


def shuffled(x: Features, groups: int) -> Features:
    """Channels of all groups in turn, the first of each first."""
    *places, channels = x.shape
    return x.reshape(*places, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)


class Residual(nnx.Module):
    """x + branch(x) where `add`, else branch(x), the branch found under the name that the family gives it."""

    def __init__(self, name: str, branch: nnx.Module, add: bool) -> None:
        setattr(self, name, branch)
        self.name, self.add = name, add

    def __call__(self, x: Features) -> Features:
        out = getattr(self, self.name)(x)
        return x + out if self.add else out


def mlp(width: int, hidden: int, rngs: nnx.Rngs) -> Sequential:
    """`torchvision.ops.MLP` as transformers have it: linear `0`, GELU `1`, dropout `2`, linear `3`."""
    return Sequential([linear(width, hidden, rngs), Activation(gelu), Identity(), linear(hidden, width, rngs)])


def named_mlp(width: int, hidden: int, rngs: nnx.Rngs) -> NamedSequential:
    """timm's `Mlp`."""
    layers = {"fc1": linear(width, hidden, rngs), "act": Activation(gelu), "fc2": linear(hidden, width, rngs)}
    return NamedSequential(layers)


# The stride of a stem's convolution, and whether a max pooling follows. A state dict tells neither.
STEMS = {"": (2, True), "_stride1": (1, True), "_no_pool": (2, False), "_stride1_no_pool": (1, False)}

# How many of the first strides of a mobile network are 1 instead of 2, for small images. Names end with the output
# stride: how many times smaller than the image the last features are. A state dict does not tell.
UNSTRIDED = {"": 0, "_stride16": 1, "_stride8": 2}


def without_first_strides(strides: Sequence[int], count: int) -> list[int]:
    """The strides with the first `count` twos replaced by ones."""
    strided = [place for place, stride in enumerate(strides) if stride == 2]
    return [1 if place in strided[:count] else stride for place, stride in enumerate(strides)]


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is at most a tenth smaller: how mobile networks round their widths."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
