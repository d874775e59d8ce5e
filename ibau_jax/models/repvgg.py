"""RepVGG (Ding et al., 2021) of any stages, as its authors name it, also without the first strides, for small images.

A block adds a 3x3 convolution, a 1x1 one and what it was given, each normalised. After training people join the three
to one convolution with a bias, as `repvgg_a0_deploy` has them.

The stem's stride leaves no trace in a state dict. That of the first stage does where the stem has as many features:
only without it has the first block all three branches, as in `repvgg_a0_stride8`, which is no variant of `repvgg_a0`.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import count, pairwise
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import UNSTRIDED, Features, without_first_strides
from ibau_jax.models.layers import NamedSequential, Sequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.sizes import STAGES, Stages, named_stages, told_stages

WIDEST_STEM = 64


class Sizes(NamedTuple):
    """The stages, and the groups of every second block's convolutions."""

    stages: Stages
    groups: int = 1


A_DEPTHS, B_DEPTHS = (2, 4, 14, 1), (4, 6, 16, 1)
B_WIDTHS = {"b1": (128, 256, 512, 2048), "b2": (160, 320, 640, 2560), "b3": (192, 384, 768, 2560)}
NAMED = {
    "a0": Sizes(Stages((48, 96, 192, 1280), A_DEPTHS)),
    "a1": Sizes(Stages((64, 128, 256, 1280), A_DEPTHS)),
    "a2": Sizes(Stages((96, 192, 384, 1408), A_DEPTHS)),
    "b0": Sizes(Stages((64, 128, 256, 1280), B_DEPTHS)),
    **{
        size + (f"g{groups}" if groups > 1 else ""): Sizes(Stages(widths, B_DEPTHS), groups)
        for size, widths in B_WIDTHS.items()
        for groups in (1, 2, 4)
    },
}
VARIANTS = tuple(filter(None, UNSTRIDED))
NAME = re.compile(
    rf"repvgg_(?:(?P<size>{'|'.join(NAMED)})|{STAGES}(?:_g(?P<groups>[2-9]))?)"
    rf"(?P<deploy>_deploy)?(?P<variant>{'|'.join(VARIANTS)})?"
)


class Block(nnx.Module):
    """Three branches, added; what the block was given is one of them where shapes agree."""

    def __init__(self, in_features: int, features: int, stride: int, groups: int, rngs: nnx.Rngs) -> None:
        def normalized(kernel: int) -> NamedSequential:
            layer = conv(in_features, features, kernel, rngs, stride=stride, groups=groups)
            return NamedSequential({"conv": layer, "bn": batch_norm(features, rngs)})

        unchanged = stride == 1 and in_features == features
        self.rbr_identity = batch_norm(features, rngs) if unchanged else None
        self.rbr_dense, self.rbr_1x1 = normalized(3), normalized(1)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.activation(out + self.rbr_identity(x) if self.rbr_identity else out)


class JoinedBlock(nnx.Module):
    """The three branches as one convolution."""

    def __init__(self, in_features: int, features: int, stride: int, groups: int, rngs: nnx.Rngs) -> None:
        self.rbr_reparam = conv(in_features, features, 3, rngs, stride=stride, groups=groups, bias=True)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        return self.activation(self.rbr_reparam(x))


def _blocks(sizes: Sizes) -> list[list[tuple[int, int, int]]]:
    """Features before, features behind and groups of each block, stage by stage; the stem is the first stage."""
    widths, depths = sizes.stages
    in_features = min(WIDEST_STEM, widths[0])
    stages, numbers = [[(3, in_features, 1)]], count(1)
    for features, depth in zip(widths, depths, strict=True):
        pairs = pairwise((in_features, *[features] * depth))
        stages.append([(*pair, 1 if next(numbers) % 2 else sizes.groups) for pair in pairs])
        in_features = features
    return stages


class RepVGG(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self,
        sizes: Sizes,
        block: type[Block] | type[JoinedBlock],
        unstrided: int,
        num_classes: int,
        image_size: ImageSize,
        rngs: nnx.Rngs,
    ) -> None:
        (stem,), *stages = _blocks(sizes)
        first, *strides = without_first_strides([2] * (1 + len(stages)), unstrided)
        in_features, features, groups = stem
        self.stage0 = block(in_features, features, first, groups, rngs)
        for number, (stage, stride) in enumerate(zip(stages, strides, strict=True), start=1):
            blocks = [
                block(in_features, features, 1 if index else stride, groups, rngs)
                for index, (in_features, features, groups) in enumerate(stage)
            ]
            setattr(self, f"stage{number}", Sequential(blocks))
        self.names = tuple(f"stage{number}" for number in range(1 + len(stages)))
        self.linear = linear(sizes.stages.widths[-1], num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        for name in self.names:
            x = getattr(self, name)(x)
        return self.linear(global_average(x))


FORMS: dict[str, tuple[str, type[Block] | type[JoinedBlock]]] = {
    "": ("rbr_dense.conv", Block),
    "_deploy": ("rbr_reparam", JoinedBlock),
}


def _named_sizes(match: re.Match[str]) -> Sizes | None:
    if match["size"]:
        return NAMED[match["size"]]
    stages = named_stages(match)
    return stages and Sizes(stages, int(match["groups"] or 1))


def _tells_first_stride(sizes: Sizes, block: type[Block] | type[JoinedBlock]) -> bool:
    """Whether names tell the stride of the first stage."""
    return block is Block and sizes.stages.widths[0] <= WIDEST_STEM


def _make(match: re.Match[str]) -> Architecture | None:
    sizes, variant = _named_sizes(match), match["variant"] or ""
    if sizes is None:
        return None
    blocks, (convolution, block) = _blocks(sizes), FORMS[match["deploy"] or ""]
    if any(features % groups for stage in blocks for before, behind, groups in stage for features in (before, behind)):
        return None
    landmarks = {
        f"stage{number}.{len(stage) - 1}.{convolution}.weight": (features, in_features // groups, 3, 3)
        for number, stage in enumerate(blocks[1:], start=1)
        for in_features, features, groups in stage[-1:]
    }
    is_told = UNSTRIDED[variant] == 2 and _tells_first_stride(sizes, block)
    return Architecture(
        name=match[0],
        build=partial(RepVGG, sizes, block, UNSTRIDED[variant]),
        classifier="linear.weight",
        image_sizes=squares(32 if variant else 224),
        landmarks={f"stage0.{convolution}.weight": (blocks[0][0][1], 3, 3, 3), **landmarks},
        variant_of=match[0].removesuffix(variant) if variant and not is_told else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    for form, (convolution, _) in FORMS.items():

        def weight(stage: int, block: int, convolution: str = convolution) -> str:
            return f"stage{stage + 1}.{block}.{convolution}.weight"

        stages = told_stages(shapes, weight)
        if not stages.depths:
            continue
        second = shapes.get(weight(0, 1) if stages.depths[0] > 1 else weight(1, 0), stages.widths)
        groups = stages.widths[0] // second[1] if all(second) and len(second) == 4 else 1
        size = next((name for name, known in NAMED.items() if known == Sizes(stages, groups)), None)
        size = size or stages.spelled() + (f"_g{groups}" if groups > 1 else "")
        unstrided = "_stride8" if "stage1.0.rbr_identity.weight" in shapes else ""
        yield f"repvgg_{size}{form}{unstrided}"


register_family(Family(NAME, "repvgg_a0", _make, _propose, VARIANTS))
