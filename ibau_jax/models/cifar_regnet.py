"""RegNets (Radosavovic et al., 2020) for CIFAR-10, as kuangliu names them: a stem of 64 features, strides 1, 1, 2, 2.

Any of them is `regnet_cifar_1x24_1x56_4x152_7x368_g8`: blocks and features of each stage, features of a group of the
3x3 convolutions, and `_se` where blocks have squeeze-and-excitation. The published sizes have names of their own.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import CifarSqueezeExcitation, Features, stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.regnet import SQUEEZE
from ibau_jax.models.resnet import CIFAR, ResidualBlock
from ibau_jax.models.sizes import count_matching

STEM_FEATURES, STRIDES = 64, (1, 1, 2, 2)
STAGE = r"\d{1,2}x\d{1,4}"
PUBLISHED = {
    "regnetx_200mf_cifar": "regnet_cifar_1x24_1x56_4x152_7x368_g8",
    "regnetx_400mf_cifar": "regnet_cifar_1x32_2x64_7x160_12x384_g16",
    "regnety_400mf_cifar": "regnet_cifar_1x32_2x64_7x160_12x384_g16_se",
}
ANY_SIZE = re.compile(rf"regnet_cifar_({STAGE})_({STAGE})_({STAGE})_({STAGE})_g(\d{{1,4}})(_se)?")


@dataclass(frozen=True)
class Layout:
    """What tells one RegNet from another.

    Attributes:
        stages: blocks and features of each.
        group_width: features of each group of a 3x3 convolution.
        squeezes: whether blocks have squeeze-and-excitation, as RegNetY's.
    """

    stages: tuple[tuple[int, int], ...]
    group_width: int
    squeezes: bool

    @property
    def name(self) -> str:
        """The name, that of a published one where it is one."""
        stages = "_".join(f"{count}x{features}" for count, features in self.stages)
        name = f"regnet_cifar_{stages}_g{self.group_width}{'_se' if self.squeezes else ''}"
        return next((published for published, same in PUBLISHED.items() if same == name), name)

    def is_possible(self) -> bool:
        """Whether there is such a network: each stage has blocks, and groups divide its features."""
        return all(
            count and features and self.group_width and features % self.group_width == 0
            for count, features in self.stages
        )


class RegNetBlock(ResidualBlock):
    """1x1, 3x3 in groups, 1x1, all of the same width."""

    def __init__(self, layout: Layout, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        super().__init__(CIFAR, rngs, in_features, features, stride)
        groups = features // layout.group_width
        self.conv1, self.bn1 = conv(in_features, features, 1, rngs), batch_norm(features, rngs)
        self.conv2 = conv(features, features, 3, rngs, stride=stride, groups=groups)
        self.bn2 = batch_norm(features, rngs)
        squeezed = round(SQUEEZE * in_features)
        self.se = CifarSqueezeExcitation(features, squeezed, relu, rngs) if layout.squeezes else None
        self.conv3, self.bn3 = conv(features, features, 1, rngs), batch_norm(features, rngs)

    def branch(self, x: Features) -> Features:
        out = self.activation(conv_norm(self.conv1, self.bn1, x))
        out = self.activation(conv_norm(self.conv2, self.bn2, out))
        return conv_norm(self.conv3, self.bn3, self.se(out) if self.se else out)


class CifarRegNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, layout: Layout, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(3, STEM_FEATURES, 3, rngs), batch_norm(STEM_FEATURES, rngs)
        in_features = STEM_FEATURES
        for number, ((count, features), stride) in enumerate(zip(layout.stages, STRIDES, strict=True), start=1):
            blocks = stage(partial(RegNetBlock, layout, rngs), in_features, features, count, stride)
            setattr(self, f"layer{number}", blocks)
            in_features = features
        self.linear = linear(in_features, num_classes, rngs)
        self.activation = relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        for number in range(1, len(STRIDES) + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(global_average(x))


def _make(match: re.Match[str]) -> Architecture | None:
    parsed = ANY_SIZE.fullmatch(PUBLISHED.get(match[0], match[0]))
    if parsed is None:
        return None
    *stages, group_width, squeezes = parsed.groups()
    numbers = [tuple(map(int, one.split("x"))) for one in stages]
    layout = Layout(tuple((count, features) for count, features in numbers), int(group_width), squeezes is not None)
    if not layout.is_possible():
        return None
    (_, first), *_, (_, before), (count, last) = layout.stages
    squeeze = {"layer1.0.se.se1.weight": (round(SQUEEZE * STEM_FEATURES), first, 1, 1)} if layout.squeezes else {}
    return Architecture(
        name=match[0],
        build=partial(CifarRegNet, layout),
        classifier="linear.weight",
        landmarks={
            f"layer4.{count - 1}.conv2.weight": (last, layout.group_width, 3, 3),
            "layer4.0.conv1.weight": (last, before, 1, 1),
            "layer1.0.conv3.weight": (first, first, 1, 1),
            **squeeze,
        },
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    counts = [_count(shapes, number) for number in range(1, len(STRIDES) + 1)]
    squares = [shapes.get(f"layer{number}.0.conv3.weight", ()) for number in range(1, len(STRIDES) + 1)]
    grouped = shapes.get("layer4.0.conv2.weight", ())
    if len(grouped) != 4 or any(len(shape) != 4 or shape[0] != shape[1] for shape in squares):
        return
    stages = tuple((count, shape[0]) for count, shape in zip(counts, squares, strict=True))
    layout = Layout(stages, grouped[1], "layer1.0.se.se1.weight" in shapes)
    if layout.is_possible():
        yield layout.name


def _count(shapes: Shapes, number: int) -> int:
    """How many blocks a stage has."""
    return count_matching(rf"layer{number}\.\d+\.conv3\.weight", shapes)


NAMES = re.compile("|".join((*PUBLISHED, ANY_SIZE.pattern)))
register_family(Family(NAMES, "regnetx_200mf_cifar", _make, _propose))
