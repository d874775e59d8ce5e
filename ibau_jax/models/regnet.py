"""RegNetX and RegNetY (Radosavovic et al., 2020) of any stages, as torchvision names them."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features, SqueezeExcitation, conv_norm_act
from ibau_jax.models.layers import Identity, NamedSequential, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register_family
from ibau_jax.models.sizes import STAGES, Stages, named_stages, told_stages

STEM_FEATURES = 32
SQUEEZE = 0.25  # of the features that a block comes with, in its squeeze-and-excitation


class Sizes(NamedTuple):
    """The stages, and the features of a group in their 3x3 convolutions; a narrower stage is one group."""

    stages: Stages
    group: int


# The sizes that have weights in torchvision: those of the paper, and 128GF by SWAG (Singh et al., 2022).
NAMED = {
    "x": {
        "400mf": Sizes(Stages((32, 64, 160, 400), (1, 2, 7, 12)), 16),
        "800mf": Sizes(Stages((64, 128, 288, 672), (1, 3, 7, 5)), 16),
        "1_6gf": Sizes(Stages((72, 168, 408, 912), (2, 4, 10, 2)), 24),
        "3_2gf": Sizes(Stages((96, 192, 432, 1008), (2, 6, 15, 2)), 48),
        "8gf": Sizes(Stages((80, 240, 720, 1920), (2, 5, 15, 1)), 120),
        "16gf": Sizes(Stages((256, 512, 896, 2048), (2, 6, 13, 1)), 128),
        "32gf": Sizes(Stages((336, 672, 1344, 2520), (2, 7, 13, 1)), 168),
    },
    "y": {
        "400mf": Sizes(Stages((48, 104, 208, 440), (1, 3, 6, 6)), 8),
        "800mf": Sizes(Stages((64, 144, 320, 784), (1, 3, 8, 2)), 16),
        "1_6gf": Sizes(Stages((48, 120, 336, 888), (2, 6, 17, 2)), 24),
        "3_2gf": Sizes(Stages((72, 216, 576, 1512), (2, 5, 13, 1)), 24),
        "8gf": Sizes(Stages((224, 448, 896, 2016), (2, 4, 10, 1)), 56),
        "16gf": Sizes(Stages((224, 448, 1232, 3024), (2, 4, 11, 1)), 112),
        "32gf": Sizes(Stages((232, 696, 1392, 3712), (2, 5, 12, 1)), 232),
        "128gf": Sizes(Stages((528, 1056, 2904, 7392), (2, 7, 17, 1)), 264),
    },
}
SIZES = "|".join(NAMED["y"])  # which has all that X has
NAME = re.compile(rf"regnet_(?P<kind>[xy])_(?:(?P<size>{SIZES})|{STAGES}_g(?P<group>[1-9]\d{{0,3}}))")


class Block(nnx.Module):
    """torchvision's `ResBottleneckBlock`: 1x1, grouped 3x3, 1x1, and a projection where shapes differ."""

    def __init__(
        self, squeezes: bool, group: int, rngs: nnx.Rngs, in_features: int, features: int, stride: int
    ) -> None:
        unchanged = stride == 1 and in_features == features
        self.proj = Identity() if unchanged else conv_norm_act(in_features, features, 1, rngs, None, stride=stride)
        groups = features // min(group, features)
        squeezed = round(SQUEEZE * in_features)
        self.f = NamedSequential(
            {
                "a": conv_norm_act(in_features, features, 1, rngs, relu),
                "b": conv_norm_act(features, features, 3, rngs, relu, stride=stride, groups=groups),
                **({"se": SqueezeExcitation(features, squeezed, relu, jax.nn.sigmoid, rngs)} if squeezes else {}),
                "c": conv_norm_act(features, features, 1, rngs, None),
            }
        )
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        return self.activation(self.proj(x) + self.f(x))


class RegNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, squeezes: bool, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        block = partial(Block, squeezes, sizes.group, rngs)
        self.stem = conv_norm_act(3, STEM_FEATURES, 3, rngs, relu, stride=2)
        stages, in_features = dict[str, nnx.Module](), STEM_FEATURES
        for number, (features, depth) in enumerate(zip(*sizes.stages, strict=True), start=1):
            widths = (in_features, *[features] * depth)
            blocks = {
                f"block{number}-{index}": block(*pair, 1 if index else 2) for index, pair in enumerate(pairwise(widths))
            }
            stages[f"block{number}"], in_features = NamedSequential(blocks), features
        self.trunk_output = NamedSequential(stages)
        self.fc = linear(in_features, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.fc(global_average(self.trunk_output(self.stem(x))))


def _grouped(stage: int, block: int) -> str:
    """The name of a block's 3x3 convolution."""
    return f"trunk_output.block{stage + 1}.block{stage + 1}-{block}.f.b.0.weight"


def _named_sizes(match: re.Match[str]) -> Sizes | None:
    stages = named_stages(match)
    return stages and Sizes(stages, int(match["group"]))


def _make(match: re.Match[str]) -> Architecture | None:
    sizes = NAMED[match["kind"]].get(match["size"]) if match["size"] else _named_sizes(match)
    if sizes is None or any(width % min(width, sizes.group) for width in sizes.stages.widths):
        return None
    return Architecture(
        name=match[0],
        build=partial(RegNet, match["kind"] == "y", sizes),
        classifier="fc.weight",
        image_sizes=squares(224),
        landmarks={
            _grouped(number, depth - 1): (width, min(width, sizes.group), 3, 3)
            for number, (width, depth) in enumerate(zip(*sizes.stages, strict=True))
        },
        torch_module=from_torchvision(match[0]) if match["size"] else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    stages = told_stages(shapes, _grouped)
    if not stages.depths:
        return
    kind = "y" if "trunk_output.block1.block1-0.f.se.fc1.weight" in shapes else "x"
    sizes = Sizes(stages, max(shapes[_grouped(number, 0)][1] for number in range(len(stages.depths))))
    size = next((name for name, known in NAMED[kind].items() if known == sizes), None)
    yield f"regnet_{kind}_{size or f'{stages.spelled()}_g{sizes.group}'}"


register_family(Family(NAME, "regnet_y_400mf", _make, _propose))
