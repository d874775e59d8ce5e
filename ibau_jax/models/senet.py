"""SENet (Hu et al., 2018) for small images, as BackdoorBench and the CIFAR code after kuangliu name it.

A PreActResNet with a normalised stem, whose blocks squeeze and excite the channels that they add.
"""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import RESNET_WIDTHS, Features, four_stages, squeeze_and_excite, stage_landmarks
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import AvgPool, Flatten, batch_norm, check_averaged_whole, conv, linear, relu
from ibau_jax.models.preact_resnet import DEPTHS, PreActBlock
from ibau_jax.models.registry import Architecture, register

REDUCTION = 16  # features of a block, to features that its squeeze-and-excitation has


class SqueezedPreActBlock(PreActBlock):
    """A PreActBlock that scales each channel of its branch by what the image's mean says of it."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(False, rngs, in_features, features, stride)
        self.fc1 = conv(features, features // REDUCTION, 1, rngs, bias=True)
        self.fc2 = conv(features // REDUCTION, features, 1, rngs, bias=True)

    def branch(self, active: Features) -> Features:
        maps = super().branch(active)
        check_averaged_whole(maps, maps.shape[1])  # F.avg_pool2d(maps, maps.size(2))
        return squeeze_and_excite(maps, self.fc1, self.fc2, self.activation, jax.nn.sigmoid)


class SENet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(self, blocks: tuple[int, ...], num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, 64, 3, rngs), batch_norm(64, rngs)
        self.layer1, self.layer2, self.layer3, self.layer4 = four_stages(
            partial(SqueezedPreActBlock, rngs), 64, blocks, 1
        )
        self.pool, self.flatten = AvgPool(4), Flatten()
        self.linear = linear(RESNET_WIDTHS[-1] * image_size.places(lambda side: -(-side // 8) // 4), num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.flatten(self.pool(x)))


for _depth, (_block, _blocks) in DEPTHS.items():
    if _block is PreActBlock:
        register(
            Architecture(
                name=f"senet{_depth}",
                build=partial(SENet, _blocks),
                classifier="linear.weight",
                image_sizes=squares(32, 64),
                landmarks={"layer1.0.fc1.weight": (64 // REDUCTION, 64, 1, 1), **stage_landmarks(_blocks, 1)},
            )
        )
