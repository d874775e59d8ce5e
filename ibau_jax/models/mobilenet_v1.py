"""MobileNet (Howard et al., 2017) for small images, as the CIFAR code after kuangliu names it: fewer strides, ReLU."""

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import AvgPool, Flatten, Sequential, batch_norm, conv, linear, relu
from ibau_jax.models.registry import Architecture, register

STEM_FEATURES = 32
# Features and stride of each block: table 1 of the paper, without the stem's and the second block's stride.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableBlock(nnx.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(self, in_features: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1 = conv(in_features, in_features, 3, rngs, stride=stride, groups=in_features)
        self.bn1 = batch_norm(in_features, rngs)
        self.conv2, self.bn2 = conv(in_features, features, 1, rngs), batch_norm(features, rngs)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        return self.activation(conv_norm(self.conv2, self.bn2, x))


class CifarMobileNet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        blocks, in_features = [], STEM_FEATURES
        for features, stride in BLOCKS:
            blocks.append(SeparableBlock(in_features, features, stride, rngs))
            in_features = features
        self.layers = Sequential(blocks)
        self.pool, self.flatten = AvgPool(2), Flatten()
        self.linear = linear(in_features * image_size.places(lambda side: -(-side // 16) // 2), num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.layers(self.activation(conv_norm(self.conv1, self.bn1, x)))
        return self.linear(self.flatten(self.pool(x)))


register(
    Architecture(
        name="mobilenet_v1_cifar",
        build=CifarMobileNet,
        classifier="linear.weight",
        image_sizes=squares(32, 64),
        landmarks={"layers.12.conv1.weight": (1024, 1, 3, 3), "layers.12.conv2.weight": (1024, 1024, 1, 1)},
    )
)
