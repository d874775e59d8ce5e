"""EfficientNet-B0 (Tan & Le, 2019) for small images, as the CIFAR code after kuangliu names it.

The stem has no stride, and nothing stands between the last block and the pooling. The first block, which does not
expand its features, holds an expansion all the same in a file; nothing uses it.
"""

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import CifarSqueezeExcitation, Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.efficientnet import SQUEEZE, STAGES
from ibau_jax.models.layers import Sequential, batch_norm, conv, global_average, linear, silu
from ibau_jax.models.registry import Architecture, register

STEM_FEATURES = 32


class CifarMBConv(nnx.Module):
    """Expansion, a convolution of each channel by itself, squeeze-and-excitation, and a projection."""

    def __init__(
        self, in_features: int, features: int, expansion: int, kernel: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        hidden = in_features * expansion
        self.expands, self.add = expansion != 1, stride == 1 and in_features == features
        if self.expands:
            self.conv1, self.bn1 = conv(in_features, hidden, 1, rngs), batch_norm(hidden, rngs)
        self.conv2 = conv(hidden, hidden, kernel, rngs, stride=stride, groups=hidden)
        self.bn2 = batch_norm(hidden, rngs)
        self.se = CifarSqueezeExcitation(hidden, in_features // SQUEEZE, silu, rngs)
        self.conv3, self.bn3 = conv(hidden, features, 1, rngs), batch_norm(features, rngs)
        self.activation = silu

    def __call__(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x)) if self.expands else x
        out = self.se(self.activation(conv_norm(self.conv2, self.bn2, out)))
        out = conv_norm(self.conv3, self.bn3, out)
        return out + x if self.add else out


class CifarEfficientNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        blocks, in_features = [], STEM_FEATURES
        for one in STAGES:
            for index in range(one.blocks):
                stride = 1 if index else one.stride
                blocks.append(CifarMBConv(in_features, one.features, one.expansion, one.kernel, stride, rngs))
                in_features = one.features
        self.layers = Sequential(blocks)
        self.linear = linear(in_features, num_classes, rngs)
        self.activation = silu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layers(self.activation(conv_norm(self.conv1, self.bn1, x)))
        return self.linear(global_average(x))


register(
    Architecture(
        name="efficientnet_b0_cifar",
        build=CifarEfficientNet,
        classifier="linear.weight",
        landmarks={"layers.15.conv3.weight": (320, 1152, 1, 1), "layers.15.se.se1.weight": (48, 1152, 1, 1)},
        unused=("layers.0.conv1", "layers.0.bn1"),
    )
)
