"""ResNet (He et al., 2016), as torchvision names it and as the CIFAR code after kuangliu does.

The two differ in names (`downsample` and `fc`, `shortcut` and `linear`) and in the stem; torchvision's is also met with
a CIFAR stem: `conv1` 3x3 with stride 1, and no max pooling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import RESNET_WIDTHS, Features, four_stages, stage_landmarks
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import (
    AdaptiveAvgPool,
    AvgPool,
    Flatten,
    Identity,
    MaxPool,
    Sequential,
    batch_norm,
    conv,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register


@dataclass(frozen=True)
class Style:
    """What tells one way of writing a ResNet from another."""

    shortcut: str  # the attribute that holds a block's projection
    classifier: str  # the attribute that holds the last layer
    imagenet_stem: bool = False  # conv1 7x7 with stride 2, and max pooling
    pool: int | None = None  # windows of the last average pooling; None is over the whole image


CIFAR = Style("shortcut", "linear")
CIFAR_64 = Style("shortcut", "linear", pool=4)  # F.avg_pool2d(out, 4) leaves 2x2 of a 64x64 image
TORCHVISION = Style("downsample", "fc", imagenet_stem=True)
TORCHVISION_SMALL = Style("downsample", "fc")


class ResidualBlock(nnx.Module):
    """relu(branch(x) + projection(x)), where the projection is empty if shapes agree."""

    expansion = 1

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        out_features = features * self.expansion
        project = stride != 1 or in_features != out_features
        projection = [conv(in_features, out_features, 1, rngs, stride=stride), batch_norm(out_features, rngs)]
        setattr(self, style.shortcut, Sequential(projection if project else []))
        self.shortcut_name = style.shortcut

    def __call__(self, x: Features) -> Features:
        return relu(self.branch(x) + getattr(self, self.shortcut_name)(x))

    def branch(self, x: Features) -> Features:
        raise NotImplementedError


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        self.conv1, self.bn1 = conv(in_features, features, 3, rngs, stride=stride), batch_norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, rngs), batch_norm(features, rngs)

    def branch(self, x: Features) -> Features:
        return conv_norm(self.conv2, self.bn2, relu(conv_norm(self.conv1, self.bn1, x)))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 with the stride, 1x1 to four times the features."""

    expansion = 4

    def __init__(self, style: Style, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(style, rngs, in_features, features, stride)
        self.conv1, self.bn1 = conv(in_features, features, 1, rngs), batch_norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, rngs, stride=stride), batch_norm(features, rngs)
        self.conv3, self.bn3 = conv(features, 4 * features, 1, rngs), batch_norm(4 * features, rngs)

    def branch(self, x: Features) -> Features:
        out = relu(conv_norm(self.conv1, self.bn1, x))
        out = relu(conv_norm(self.conv2, self.bn2, out))
        return conv_norm(self.conv3, self.bn3, out)


class ResNet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(
        self,
        style: Style,
        block: type[ResidualBlock],
        blocks: tuple[int, ...],
        num_classes: int,
        image_size: int,
        rngs: nnx.Rngs,
    ) -> None:
        stem = {"kernel": 7, "stride": 2} if style.imagenet_stem else {"kernel": 3, "stride": 1}
        self.conv1, self.bn1 = conv(3, 64, stem["kernel"], rngs, stride=stem["stride"]), batch_norm(64, rngs)
        self.maxpool = MaxPool(3, 2, padding=1) if style.imagenet_stem else Identity()
        stages = four_stages(partial(block, style, rngs), 64, blocks, block.expansion)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        features = RESNET_WIDTHS[-1] * block.expansion
        self.avgpool = AvgPool(style.pool) if style.pool else AdaptiveAvgPool(1)
        self.flatten = Flatten()
        grid = image_size // 8 // style.pool if style.pool else 1
        setattr(self, style.classifier, linear(features * grid**2, num_classes, rngs))
        self.classifier_name = style.classifier

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.maxpool(relu(conv_norm(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        classifier: Callable[[Array], Array] = getattr(self, self.classifier_name)
        return classifier(self.flatten(self.avgpool(x)))


DEPTHS: dict[int, tuple[type[ResidualBlock], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _register(name: str, depth: int, style: Style, image_sizes: tuple[int, ...]) -> None:
    block, blocks = DEPTHS[depth]
    landmarks = stage_landmarks(blocks, block.expansion)
    stem = 7 if style.imagenet_stem else 3
    register(
        Architecture(
            name=name,
            build=partial(ResNet, style, block, blocks),
            classifier=f"{style.classifier}.weight",
            image_sizes=image_sizes,
            landmarks={"conv1.weight": (64, 3, stem, stem), "bn1.weight": (64,), **landmarks},
            torch_module=from_torchvision(name) if style is TORCHVISION else None,
        )
    )


for _depth in DEPTHS:
    _register(f"resnet{_depth}", _depth, TORCHVISION, (224,))
    _register(f"resnet{_depth}_small_stem", _depth, TORCHVISION_SMALL, (32,))
    _register(f"resnet{_depth}_cifar", _depth, CIFAR, (32,))
    _register(f"resnet{_depth}_cifar_64", _depth, CIFAR_64, (64,))
