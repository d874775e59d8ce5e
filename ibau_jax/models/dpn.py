"""Dual path networks (Chen et al., 2017) 26 and 92 for CIFAR-10, as kuangliu names them."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import Sequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register

# Of each stage the width inside of its blocks, that of its residual path, what each block adds to its dense path, and
# the stride: table 1 of the paper.
STAGES = ((96, 256, 16, 1), (192, 512, 32, 2), (384, 1024, 24, 2), (768, 2048, 128, 2))
GROUPS, STEM_FEATURES = 32, 64
BLOCKS = {26: (2, 2, 2, 2), 92: (3, 4, 20, 3)}  # of each stage


class DualPathBlock(nnx.Module):
    """A bottleneck whose first features are added to the input's and whose last are put behind them."""

    def __init__(
        self, in_features: int, width: int, residual: int, dense: int, stride: int, first: bool, rngs: nnx.Rngs
    ) -> None:
        features = residual + dense
        self.conv1, self.bn1 = conv(in_features, width, 1, rngs), batch_norm(width, rngs)
        self.conv2, self.bn2 = conv(width, width, 3, rngs, stride=stride, groups=GROUPS), batch_norm(width, rngs)
        self.conv3, self.bn3 = conv(width, features, 1, rngs), batch_norm(features, rngs)
        projection = [conv(in_features, features, 1, rngs, stride=stride), batch_norm(features, rngs)]
        self.shortcut = Sequential(projection if first else [])
        self.residual, self.activation = residual, relu

    def __call__(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        added, new = jnp.split(conv_norm(self.conv3, self.bn3, out), [self.residual], axis=-1)
        residual, dense = jnp.split(self.shortcut(x), [self.residual], axis=-1)
        return self.activation(jnp.concatenate([residual + added, dense, new], axis=-1))


class DualPathNetwork(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, depth: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        in_features = STEM_FEATURES
        for number, (count, (width, residual, dense, stride)) in enumerate(
            zip(BLOCKS[depth], STAGES, strict=True), start=1
        ):
            blocks: list[nnx.Module] = []
            for index in range(count):
                strides = 1 if index else stride
                blocks.append(DualPathBlock(in_features, width, residual, dense, strides, index == 0, rngs))
                in_features = residual + (index + 2) * dense
            setattr(self, f"layer{number}", Sequential(blocks))
        self.linear = linear(in_features, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        for number in range(1, len(STAGES) + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(global_average(x, kernel=4))


for _depth, _blocks in BLOCKS.items():
    register(
        Architecture(
            name=f"dpn{_depth}_cifar",
            build=partial(DualPathNetwork, _depth),
            classifier="linear.weight",
            landmarks={
                f"layer4.{_blocks[-1] - 1}.conv3.weight": (2176, 768, 1, 1),
                f"layer3.{_blocks[2] - 1}.conv3.weight": (1048, 384, 1, 1),
            },
        )
    )
