"""ResNet (He et al., 2016), as torchvision names it and as the CIFAR code after kuangliu does, of any depth and width.

The two differ in names (`downsample` and `fc`, `shortcut` and `linear`) and in the stem; torchvision's is met with a
CIFAR stem as well: `conv1` 3x3. The stem's stride, its max pooling, and which convolution of a bottleneck has the
stride leave no trace in a state dict, so that each is a variant of its own (`ibau_jax.checkpoints.variants` chooses).
Wide ResNets and ResNeXts of bottlenecks are told by the sizes of the 3x3 convolutions.

timm's relatives of these are read too: `seresnet50` (squeeze-and-excitation), and He et al.'s (2019) tweaks, a stem of
three 3x3 convolutions (`resnet50c`, a wider one in `resnet50s`), and projections behind an average pooling besides
(`resnet50d`, with a narrower stem `resnet50t`). Some of timm's halve their maps by a pooling behind the convolution,
against aliasing (`resnetaa50`, `resnetblur50`), which leaves no trace either.

`ibau_jax.models.resnet_names` says which of them a name or a state dict means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import RESNET_WIDTHS, Features, SqueezeExcitation, four_stages
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    Activation,
    AdaptiveAvgPool,
    AvgPool,
    BlurPool,
    Flatten,
    Identity,
    MaxPool,
    Sequential,
    apply_in_order,
    batch_norm,
    check_averaged_whole,
    conv,
    linear,
    relu,
)

Padding = Literal["around", "behind"]
Pooling = Literal["average", "blur"]


class PadChannels(nnx.Module):
    """Takes every `stride`-th pixel and adds channels of zeros: option A of He et al. (2016), section 4.2."""

    def __init__(self, stride: int, features: int, where: Padding) -> None:
        self.stride, self.features, self.where = stride, features, where

    def __call__(self, x: Features) -> Features:
        missing = self.features - x.shape[3]
        before = missing // 2 if self.where == "around" else 0
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


@dataclass(frozen=True)
class Style:
    """What tells one way of writing a ResNet from another."""

    shortcut: str  # the attribute that holds a block's projection
    classifier: str  # the attribute that holds the last layer
    kernel: int = 3  # of conv1
    stem_stride: int = 1  # of conv1
    max_pool: bool = False  # 3x3 with stride 2, behind conv1
    grid_pool: int | None = None  # windows of the last average pooling; None is over the whole image
    padding: Padding | None = None  # where zeros stand for new channels in a shortcut without weights
    wider: int = 1  # a bottleneck's 3x3 convolution is so many times as wide (Zagoruyko & Komodakis, 2016)
    groups: int = 1  # of it (ResNeXt; Xie et al., 2017)
    v1_stride: bool = False  # a bottleneck's stride lies in its first 1x1 convolution (Caffe, MSRA), not in the 3x3 one
    squeezes: bool = False  # squeeze-and-excitation behind each block's last BatchNorm (Hu et al., 2018)
    deep_stem: tuple[int, int, int] | None = None  # features of three 3x3 convolutions in place of conv1
    pools_down: bool = False  # projections have an average pooling in place of their stride
    halves_by: Pooling | None = None  # what stands behind a 3x3 convolution in place of its stride, and in the stem

    def stem_features(self, width: int) -> int:
        """Features that the first stage, of this width, is given."""
        return self.deep_stem[-1] if self.deep_stem else width


CIFAR = Style("shortcut", "linear")
CIFAR_KERNEL = 4  # of kuangliu's F.avg_pool2d
CIFAR_64 = Style("shortcut", "linear", grid_pool=CIFAR_KERNEL)  # which leaves 2x2 of a 64x64 image
TORCHVISION = Style("downsample", "fc", kernel=7, stem_stride=2, max_pool=True)
TORCHVISION_SMALL = Style("downsample", "fc")


def _halving(style: Style, stride: int) -> nnx.Module | None:
    """What a style has in the place of a 3x3 convolution's stride."""
    if style.halves_by is None or stride == 1:
        return None
    return AvgPool(2) if style.halves_by == "average" else BlurPool()


def _projection(style: Style, rngs: nnx.Rngs, in_features: int, out_features: int, stride: int) -> list[nnx.Module]:
    """The layers of a shortcut between different shapes."""
    if style.padding:
        return [PadChannels(stride, out_features, style.padding)]
    pool = AvgPool(stride, ceil=True) if stride > 1 else Identity()
    pools, stride = ([pool], 1) if style.pools_down else ([], stride)
    return [*pools, conv(in_features, out_features, 1, rngs, stride=stride), batch_norm(out_features, rngs)]


class ResidualBlock(nnx.Module):
    """relu(branch(x) + projection(x)), where the projection is empty if shapes agree."""

    expansion = 1

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        out_features = features * self.expansion
        project = stride != 1 or in_features != out_features
        projection = _projection(style, rngs, in_features, out_features, stride) if project else []
        setattr(self, style.shortcut, Sequential(projection))
        self.shortcut_name, self.activation = style.shortcut, relu

    def __call__(self, x: Features) -> Features:
        return self.activation(self.branch(x) + getattr(self, self.shortcut_name)(x))

    def branch(self, x: Features) -> Features:
        raise NotImplementedError


def _squeeze_excitation(style: Style, features: int, rngs: nnx.Rngs) -> SqueezeExcitation | None:
    squeezed = max(8, (features + 64) // 128 * 8)  # a sixteenth, rounded to a multiple of 8
    return SqueezeExcitation(features, squeezed, relu, jax.nn.sigmoid, rngs) if style.squeezes else None


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        self.aa = _halving(style, stride)
        self.conv1 = conv(in_features, features, 3, rngs, stride=1 if self.aa else stride)
        self.bn1 = batch_norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, rngs), batch_norm(features, rngs)
        self.se = _squeeze_excitation(style, features, rngs)

    def branch(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = conv_norm(self.conv2, self.bn2, self.aa(out) if self.aa else out)
        return self.se(out) if self.se else out


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 to four times the features; the style says which of the first two has the stride."""

    expansion = 4

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        strides, width = (stride, 1) if style.v1_stride else (1, stride), style.wider * features
        self.conv1, self.bn1 = conv(in_features, width, 1, rngs, stride=strides[0]), batch_norm(width, rngs)
        self.aa = _halving(style, strides[1])
        self.conv2 = conv(width, width, 3, rngs, stride=1 if self.aa else strides[1], groups=style.groups)
        self.bn2 = batch_norm(width, rngs)
        self.conv3, self.bn3 = conv(width, 4 * features, 1, rngs), batch_norm(4 * features, rngs)
        self.se = _squeeze_excitation(style, 4 * features, rngs)

    def branch(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, self.aa(out) if self.aa else out)
        return self.se(out) if self.se else out


@dataclass(frozen=True)
class Size:
    """How large a ResNet is.

    Attributes:
        block: what its stages are made of.
        blocks: how many of them each stage has.
        widths: features of each stage's 3x3 convolutions, unless the style makes them wider.
    """

    block: type[ResidualBlock]
    blocks: tuple[int, ...]
    widths: tuple[int, ...] = RESNET_WIDTHS

    @property
    def width(self) -> int:
        """Of the first stage."""
        return self.widths[0]


def _stem(style: Style, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """What stands before the first BatchNorm."""
    if style.deep_stem is None:
        return conv(3, width, style.kernel, rngs, stride=style.stem_stride)
    first, second, third = style.deep_stem
    return Sequential(
        [
            *(conv(3, first, 3, rngs, stride=style.stem_stride), batch_norm(first, rngs), Activation(relu)),
            *(conv(first, second, 3, rngs), batch_norm(second, rngs), Activation(relu)),
            conv(second, third, 3, rngs),
        ]
    )


def _stem_pool(style: Style) -> nnx.Module:
    """What stands between the stem and the first stage."""
    if not style.max_pool:
        return Identity()
    halving = _halving(style, 2)
    if halving is None:
        return MaxPool(3, 2, padding=1)
    return Sequential([MaxPool(3, 1, padding=1), halving]) if style.halves_by == "blur" else halving


class ResNet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(self, style: Style, size: Size, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        width, expansion, widths = size.width, size.block.expansion, size.widths
        in_features = style.stem_features(width)
        self.conv1, self.bn1 = _stem(style, width, rngs), batch_norm(in_features, rngs)
        self.maxpool = _stem_pool(style)
        stages = four_stages(partial(size.block, style, rngs), in_features, size.blocks, expansion, widths)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = AvgPool(style.grid_pool) if style.grid_pool else AdaptiveAvgPool(1)
        self.flatten = Flatten()
        pool = style.grid_pool
        grid = image_size.places(lambda side: -(-side // 8) // pool) if pool else 1
        setattr(self, style.classifier, linear(widths[-1] * expansion * grid, num_classes, rngs))
        self.classifier_name, self.activation = style.classifier, relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        if isinstance(self.conv1, Sequential):
            x = apply_in_order([*self.conv1, self.bn1], x)
        else:
            x = conv_norm(self.conv1, self.bn1, x)
        x = self.maxpool(self.activation(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.classifier_name == CIFAR.classifier:
            check_averaged_whole(x, CIFAR_KERNEL)
        classifier: Callable[[Array], Array] = getattr(self, self.classifier_name)
        return classifier(self.flatten(self.avgpool(x)))
