"""DenseNets (Huang et al., 2017) for small images, as the CIFAR code after kuangliu names them.

`densenet_cifar` grows by 12 features a layer, `densenet121_cifar` to `densenet201_cifar` have the sizes of their
namesakes for ImageNet, and `densenet_cifar_k24_6_12_24_16` those that it says: growth, and layers of the four blocks.
Unlike torchvision's they have a bare 3x3 stem, and each layer puts its new features before those that it saw.
"""

import re
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.densenet import BOTTLENECK, CONFIGURATIONS
from ibau_jax.models.layers import AvgPool, Flatten, Sequential, apply_in_order, batch_norm, conv, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family

Sizes = tuple[int, tuple[int, ...]]  # growth, and layers of the four blocks
PUBLISHED: dict[str, Sizes] = {
    "densenet_cifar": (12, (6, 12, 24, 16)),
    **{f"densenet{depth}_cifar": (growth, blocks) for depth, (growth, blocks, _) in CONFIGURATIONS.items()},
}
NAME = re.compile(rf"{'|'.join(PUBLISHED)}|densenet_cifar_k(?P<growth>\d{{1,3}})(?P<blocks>(_\d{{1,3}}){{4}})")


class CifarDenseLayer(nnx.Module):
    """A bottleneck whose result is put before what it saw."""

    def __init__(self, in_features: int, growth: int, rngs: nnx.Rngs) -> None:
        hidden = BOTTLENECK * growth
        self.bn1, self.conv1 = batch_norm(in_features, rngs), conv(in_features, hidden, 1, rngs)
        self.bn2, self.conv2 = batch_norm(hidden, rngs), conv(hidden, growth, 3, rngs)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        hidden = conv_norm(self.conv1, self.bn2, self.activation(self.bn1(x)))
        return jnp.concatenate([self.conv2(self.activation(hidden)), x], axis=-1)


class Transition(nnx.Module):
    """Half the features, and maps of half the height and width."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.bn, self.conv = batch_norm(features, rngs), conv(features, features // 2, 1, rngs)
        self.pool, self.activation = AvgPool(2), relu

    def __call__(self, x: Features) -> Features:
        return self.pool(self.conv(self.activation(self.bn(x))))


class CifarDenseNet(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(self, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        growth, blocks = sizes
        features = 2 * growth
        self.conv1 = conv(3, features, 3, rngs)
        parts: dict[str, nnx.Module] = {}
        for number, count in enumerate(blocks, start=1):
            layers = [CifarDenseLayer(features + index * growth, growth, rngs) for index in range(count)]
            parts[f"dense{number}"] = Sequential(layers)
            features += count * growth
            if number < len(blocks):
                parts[f"trans{number}"] = Transition(features, rngs)
                features //= 2
        for name, part in parts.items():
            setattr(self, name, part)
        self.names, self.bn = tuple(parts), batch_norm(features, rngs)
        self.pool, self.flatten = AvgPool(4), Flatten()
        self.linear = linear(features * image_size.places(lambda side: side // 32), num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = apply_in_order([getattr(self, name) for name in self.names], self.conv1(x))
        return self.linear(self.flatten(self.pool(self.activation(self.bn(x)))))


def _make(match: re.Match[str]) -> Architecture | None:
    named = PUBLISHED.get(match[0])
    growth, blocks = named or (int(match["growth"]), tuple(map(int, match["blocks"].split("_")[1:])))
    if not growth or not all(blocks):
        return None
    return Architecture(
        name=match[0],
        build=partial(CifarDenseNet, (growth, blocks)),
        classifier="linear.weight",
        image_sizes=squares(32, 64),
        landmarks={
            "conv1.weight": (2 * growth, 3, 3, 3),
            f"dense4.{blocks[-1] - 1}.conv2.weight": (growth, BOTTLENECK * growth, 3, 3),
        },
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    layers = [re.fullmatch(r"dense([1-4])\.\d+\.conv2\.weight", name) for name in shapes]
    numbers = [match[1] for match in layers if match]
    blocks, stem = tuple(map(numbers.count, "1234")), shapes.get("conv1.weight", ())
    if not all(blocks) or len(stem) != 4:
        return
    sizes = (stem[0] // 2, blocks)
    named = next((name for name, published in PUBLISHED.items() if published == sizes), None)
    yield named or f"densenet_cifar_k{sizes[0]}_{'_'.join(map(str, blocks))}"


register_family(Family(NAME, "densenet_cifar", _make, _propose))
