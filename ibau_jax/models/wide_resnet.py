"""Wide ResNets (Zagoruyko & Komodakis, 2016): WRN-depth-k, k times as wide as a thin one, as CIFAR code names them."""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import Features, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register

DEPTHS = (10, 16, 22, 28, 34, 40)
WIDEN_FACTORS = (1, 2, 3, 4, 5, 6, 8, 10, 12)


class WideBlock(nnx.Module):
    """Two 3x3 convolutions behind their normalisations; the shortcut sees normalised features where it projects."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        self.bn1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, features, 3, rngs, stride=stride)
        self.bn2, self.conv2 = batch_norm(features, rngs), conv(features, features, 3, rngs)
        projects = in_features != features
        self.convShortcut = conv(in_features, features, 1, rngs, stride=stride) if projects else None

    def __call__(self, x: Features) -> Features:
        active = relu(self.bn1(x))
        out = self.conv2(relu(conv_norm(self.conv1, self.bn2, active)))
        return out + (self.convShortcut(active) if self.convShortcut else x)


class NetworkBlock(nnx.Module):
    """A stage, its blocks in `layer`."""

    def __init__(self, in_features: int, features: int, count: int, stride: int, rngs: nnx.Rngs) -> None:
        self.layer = stage(partial(WideBlock, rngs), in_features, features, count, stride)

    def __call__(self, x: Features) -> Features:
        return self.layer(x)


class WideResNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int, image_size: int, rngs: nnx.Rngs) -> None:
        count, widths = (depth - 4) // 6, [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv(3, 16, 3, rngs)
        self.block1 = NetworkBlock(16, widths[0], count, 1, rngs)
        self.block2 = NetworkBlock(widths[0], widths[1], count, 2, rngs)
        self.block3 = NetworkBlock(widths[1], widths[2], count, 2, rngs)
        self.bn1 = batch_norm(widths[2], rngs)
        self.fc = linear(widths[2], num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_average(relu(self.bn1(x))))


for _depth in DEPTHS:
    for _factor in WIDEN_FACTORS:
        register(
            Architecture(
                name=f"wide_resnet{_depth}_{_factor}",
                build=partial(WideResNet, _depth, _factor),
                classifier="fc.weight",
                landmarks={
                    f"block3.layer.{(_depth - 4) // 6 - 1}.conv2.weight": (64 * _factor, 64 * _factor, 3, 3),
                    "bn1.weight": (64 * _factor,),
                },
            )
        )
