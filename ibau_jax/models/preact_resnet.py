"""PreActResNet (He et al., 2016b) for small images, as BackdoorBench and the CIFAR code after kuangliu name it.

Normalisation and ReLU come before each convolution, the shortcut is a bare convolution, and nothing normalises the last
features; some code does normalise them, in a last BatchNorm called `bn`. The shortcut projects the activated features,
or in some code the block's own input (`_raw_shortcut`), which leaves no trace in a state dict.
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import RESNET_WIDTHS, Features, four_stages, stage_landmarks
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import Sequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register


class PreActivation(nnx.Module):
    """branch(active) + projection(active), or + x where shapes agree; `active` is x normalised and rectified."""

    expansion = 1

    def __init__(self, raw_shortcut: bool, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        self.bn1, out_features = batch_norm(in_features, rngs), features * self.expansion
        project = stride != 1 or in_features != out_features
        self.shortcut = Sequential([conv(in_features, out_features, 1, rngs, stride=stride)] if project else [])
        self.raw_shortcut, self.activation = raw_shortcut, relu

    def __call__(self, x: Features) -> Features:
        active = self.activation(self.bn1(x))
        return self.branch(active) + (self.shortcut(x if self.raw_shortcut else active) if self.shortcut else x)

    def branch(self, active: Features) -> Features:
        raise NotImplementedError


class PreActBlock(PreActivation):
    """Two 3x3 convolutions."""

    def __init__(self, raw_shortcut: bool, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(raw_shortcut, rngs, in_features, features, stride)
        self.conv1 = conv(in_features, features, 3, rngs, stride=stride)
        self.bn2, self.conv2 = batch_norm(features, rngs), conv(features, features, 3, rngs)

    def branch(self, active: Features) -> Features:
        return self.conv2(self.activation(conv_norm(self.conv1, self.bn2, active)))


class PreActBottleneck(PreActivation):
    """1x1, 3x3 with the stride, 1x1 to four times the features."""

    expansion = 4

    def __init__(self, raw_shortcut: bool, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(raw_shortcut, rngs, in_features, features, stride)
        self.conv1 = conv(in_features, features, 1, rngs)
        self.bn2, self.conv2 = batch_norm(features, rngs), conv(features, features, 3, rngs, stride=stride)
        self.bn3, self.conv3 = batch_norm(features, rngs), conv(features, 4 * features, 1, rngs)

    def branch(self, active: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn2, active))
        return self.conv3(self.activation(conv_norm(self.conv2, self.bn3, out)))


class PreActResNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self,
        block: type[PreActivation],
        blocks: tuple[int, ...],
        final_norm: bool,
        raw_shortcut: bool,
        num_classes: int,
        image_size: ImageSize,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = conv(3, 64, 3, rngs)
        self.layer1, self.layer2, self.layer3, self.layer4 = four_stages(
            partial(block, raw_shortcut, rngs), 64, blocks, block.expansion
        )
        features = RESNET_WIDTHS[-1] * block.expansion
        self.bn = batch_norm(features, rngs) if final_norm else None
        self.linear = linear(features, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = self.activation(self.bn(x)) if self.bn else x
        return self.linear(global_average(x, kernel=4))


DEPTHS: dict[int, tuple[type[PreActivation], tuple[int, ...]]] = {
    18: (PreActBlock, (2, 2, 2, 2)),
    34: (PreActBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
    101: (PreActBottleneck, (3, 4, 23, 3)),
    152: (PreActBottleneck, (3, 8, 36, 3)),
}


def _register(depth: int, final_norm: bool, raw_shortcut: bool) -> None:
    block, blocks = DEPTHS[depth]
    landmarks = stage_landmarks(blocks, block.expansion)
    last = {"bn.weight": (RESNET_WIDTHS[-1] * block.expansion,)} if final_norm else {}
    base = f"preact_resnet{depth}" + "_bn" * final_norm
    register(
        Architecture(
            name=base + "_raw_shortcut" * raw_shortcut,
            build=partial(PreActResNet, block, blocks, final_norm, raw_shortcut),
            classifier="linear.weight",
            landmarks={"layer1.0.bn1.weight": (64,), **landmarks, **last},
            variant_of=base if raw_shortcut else None,
        )
    )


for _depth in DEPTHS:
    for _final_norm in (False, True):
        for _raw_shortcut in (False, True):
            _register(_depth, _final_norm, _raw_shortcut)
