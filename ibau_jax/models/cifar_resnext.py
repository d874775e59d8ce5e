"""ResNeXts (Xie et al., 2017) for CIFAR-10, as the CIFAR code after kuangliu names them.

`resnext29_8x64d_cifar` has 9n + 2 = 29 layers: three stages of n bottlenecks behind a 1x1 stem. The first stage's 3x3
convolutions have 8 groups of 64 features each; every stage is twice as wide as the one before.
"""

import re
from collections.abc import Iterator
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import AvgPool, Flatten, batch_norm, conv, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.resnet import Bottleneck, Style
from ibau_jax.models.sizes import count_matching

STEM = (64, 3, 1, 1)  # shape of conv1
DEEPEST, WIDEST = 299, 1024
NAME = re.compile(r"resnext(?P<depth>\d{1,4})_(?P<groups>\d{1,4})x(?P<width>\d{1,4})d_cifar")


class CifarResNeXt(nnx.Module):
    """Logits of RGB images of `image_size`."""

    def __init__(
        self, count: int, groups: int, width: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        # A bottleneck whose result is twice, not four times, as wide as its 3x3 convolution.
        block = partial(Bottleneck, Style("shortcut", "linear", wider=2, groups=groups), rngs)
        features = groups * width // 2
        self.conv1, self.bn1 = conv(3, STEM[0], 1, rngs), batch_norm(STEM[0], rngs)
        self.layer1 = stage(block, STEM[0], features, count, 1, Bottleneck.expansion)
        self.layer2 = stage(block, 4 * features, 2 * features, count, 2, Bottleneck.expansion)
        self.layer3 = stage(block, 8 * features, 4 * features, count, 2, Bottleneck.expansion)
        self.pool, self.flatten = AvgPool(8), Flatten()
        self.linear = linear(16 * features * image_size.places(lambda side: -(-side // 4) // 8), num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        return self.linear(self.flatten(self.pool(self.layer3(self.layer2(self.layer1(x))))))


def _make(match: re.Match[str]) -> Architecture | None:
    depth, groups, width = (int(match[part]) for part in ("depth", "groups", "width"))
    features = groups * width
    if depth % 9 != 2 or not 11 <= depth <= DEEPEST or not 0 < features <= WIDEST or features % 2:
        return None
    count = (depth - 2) // 9
    return Architecture(
        name=match[0],
        build=partial(CifarResNeXt, count, groups, width),
        classifier="linear.weight",
        image_sizes=squares(32, 64),
        landmarks={
            "conv1.weight": STEM,
            f"layer1.{count - 1}.conv2.weight": (features, width, 3, 3),
            f"layer3.{count - 1}.conv2.weight": (4 * features, 4 * width, 3, 3),
        },
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    count = count_matching(r"layer3\.\d+\.conv3\.weight", shapes)
    grouped = shapes.get("layer1.0.conv2.weight", ())
    if count and shapes.get("conv1.weight") == STEM and len(grouped) == 4 and grouped[1]:
        yield f"resnext{9 * count + 2}_{grouped[0] // grouped[1]}x{grouped[1]}d_cifar"


register_family(Family(NAME, "resnext29_8x64d_cifar", _make, _propose))
