"""ShuffleNets for CIFAR-10, as kuangliu names them: V1 (Zhang et al., 2018) and V2 (Ma et al., 2018)."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import Block, Features, shuffled, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    AvgPool,
    Sequential,
    batch_norm,
    conv,
    global_average,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, register

STEM_FEATURES, KERNEL = 24, 4  # KERNEL: of the last avg_pool2d
BLOCKS = (4, 8, 4)  # of each stage
# Groups, and features of the stages: table 1 of V1's paper.
V1_SIZES: dict[str, tuple[int, tuple[int, ...]]] = {"g2": (2, (200, 400, 800)), "g3": (3, (240, 480, 960))}
# Features of the stages and of the last convolution: table 5 of V2's paper, but that its 244 are 224 here.
V2_SIZES: dict[str, tuple[int, ...]] = {
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (224, 488, 976, 2048),
}


class GroupedBlock(nnx.Module):
    """V1's bottleneck: 1x1 convolutions in groups, shuffled between them.

    Where it halves the maps, it widens by putting a pooling of its input behind its output.
    """

    def __init__(self, groups: int, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        own = features - in_features if stride == 2 else features
        hidden = own // 4
        self.groups = 1 if in_features == STEM_FEATURES else groups
        self.conv1, self.bn1 = conv(in_features, hidden, 1, rngs, groups=self.groups), batch_norm(hidden, rngs)
        self.conv2 = conv(hidden, hidden, 3, rngs, stride=stride, groups=hidden)
        self.bn2 = batch_norm(hidden, rngs)
        self.conv3, self.bn3 = conv(hidden, own, 1, rngs, groups=groups), batch_norm(own, rngs)
        self.shortcut = Sequential([AvgPool(3, 2, 1)] if stride == 2 else [])
        self.stride, self.activation = stride, relu

    def __call__(self, x: Features) -> Features:
        out = shuffled(self.activation(conv_norm(self.conv1, self.bn1, x)), self.groups)
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        out, shortcut = conv_norm(self.conv3, self.bn3, out), self.shortcut(x)
        return self.activation(jnp.concatenate([out, shortcut], axis=-1) if self.stride == 2 else out + shortcut)


class ShuffleNet(nnx.Module):
    """V1: logits of RGB images of any size."""

    def __init__(
        self, groups: int, widths: tuple[int, ...], num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 1, rngs), batch_norm(STEM_FEATURES, rngs)
        self.layer1, self.layer2, self.layer3 = _stages(partial(GroupedBlock, groups, rngs), widths)
        self.linear = linear(widths[-1], num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        return self.linear(global_average(self.layer3(self.layer2(self.layer1(x))), kernel=KERNEL))


def _stages(block: Block, widths: tuple[int, ...]) -> list[Sequential]:
    """The three stages, each of which halves the maps."""
    before = (STEM_FEATURES, *widths[:-1])
    return [stage(block, *sizes, 2) for sizes in zip(before, widths, BLOCKS, strict=True)]


class SplitBlock(nnx.Module):
    """V2's unit: the second half of the channels goes through convolutions, then both halves are shuffled."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        half = features // 2
        self.conv1, self.bn1 = conv(half, half, 1, rngs), batch_norm(half, rngs)
        self.conv2, self.bn2 = conv(half, half, 3, rngs, groups=half), batch_norm(half, rngs)
        self.conv3, self.bn3 = conv(half, half, 1, rngs), batch_norm(half, rngs)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        kept, out = jnp.split(x, 2, axis=-1)
        out = self.activation(conv_norm(self.conv1, self.bn1, out))
        out = self.activation(conv_norm(self.conv3, self.bn3, conv_norm(self.conv2, self.bn2, out)))
        return shuffled(jnp.concatenate([kept, out], axis=-1), 2)


class DownBlock(nnx.Module):
    """V2's unit that halves the maps: two branches of convolutions, each of which gives half of the channels."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs) -> None:
        half = features // 2
        self.conv1 = conv(in_features, in_features, 3, rngs, stride=2, groups=in_features)
        self.bn1 = batch_norm(in_features, rngs)
        self.conv2, self.bn2 = conv(in_features, half, 1, rngs), batch_norm(half, rngs)
        self.conv3, self.bn3 = conv(in_features, half, 1, rngs), batch_norm(half, rngs)
        self.conv4, self.bn4 = conv(half, half, 3, rngs, stride=2, groups=half), batch_norm(half, rngs)
        self.conv5, self.bn5 = conv(half, half, 1, rngs), batch_norm(half, rngs)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        one = self.activation(conv_norm(self.conv2, self.bn2, conv_norm(self.conv1, self.bn1, x)))
        other = conv_norm(self.conv4, self.bn4, self.activation(conv_norm(self.conv3, self.bn3, x)))
        other = self.activation(conv_norm(self.conv5, self.bn5, other))
        return shuffled(jnp.concatenate([one, other], axis=-1), 2)


def _v2_block(rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> nnx.Module:
    return DownBlock(in_features, features, rngs) if stride == 2 else SplitBlock(features, rngs)


class CifarShuffleNetV2(nnx.Module):
    """V2: logits of RGB images of any size."""

    def __init__(self, widths: tuple[int, ...], num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        *stages, last = widths
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        self.layer1, self.layer2, self.layer3 = _stages(partial(_v2_block, rngs), tuple(stages))
        self.conv2, self.bn2 = conv(stages[-1], last, 1, rngs), batch_norm(last, rngs)
        self.linear = linear(last, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layer3(self.layer2(self.layer1(self.activation(conv_norm(self.conv1, self.bn1, x)))))
        return self.linear(global_average(self.activation(conv_norm(self.conv2, self.bn2, x)), kernel=KERNEL))


for _size, (_groups, _widths) in V1_SIZES.items():
    register(
        Architecture(
            name=f"shufflenet_{_size}_cifar",
            build=partial(ShuffleNet, _groups, _widths),
            classifier="linear.weight",
            landmarks={
                "conv1.weight": (STEM_FEATURES, 3, 1, 1),
                "layer3.3.conv1.weight": (_widths[-1] // 4, _widths[-1] // _groups, 1, 1),
            },
        )
    )
for _size, _widths in V2_SIZES.items():
    register(
        Architecture(
            name=f"shufflenet_v2_{_size}_cifar",
            build=partial(CifarShuffleNetV2, _widths),
            classifier="linear.weight",
            landmarks={
                "conv2.weight": (*_widths[:1:-1], 1, 1),
                "layer3.3.conv3.weight": (_widths[2] // 2, _widths[2] // 2, 1, 1),
            },
        )
    )
