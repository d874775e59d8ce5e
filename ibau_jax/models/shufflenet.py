"""ShuffleNetV2 (Ma et al., 2018), as torchvision names it, also without the stem's stride or max pooling.

CIFAR code leaves both out: `shufflenet_v2_x1_0_stride1_no_pool`.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import STEMS, Features, conv_norm_act, shuffled, stage
from ibau_jax.models.layers import Identity, MaxPool, Sequential, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register_family
from ibau_jax.models.sizes import STAGES, Stages, named_stages, told_stages

STEM_FEATURES = 24
FIRST_STAGE = 2  # the stem is the first


class Sizes(NamedTuple):
    """The stages, and the last convolution's features."""

    stages: Stages
    last: int


DEPTHS = (4, 8, 4)
# Table 5 of the paper.
NAMED = {
    "x0_5": Sizes(Stages((48, 96, 192), DEPTHS), 1024),
    "x1_0": Sizes(Stages((116, 232, 464), DEPTHS), 1024),
    "x1_5": Sizes(Stages((176, 352, 704), DEPTHS), 1024),
    "x2_0": Sizes(Stages((244, 488, 976), DEPTHS), 2048),
}
NAME = re.compile(
    rf"(?P<base>shufflenet_v2_(?:(?P<size>{'|'.join(NAMED)})|{STAGES}_l(?P<last>[1-9]\d{{0,3}})))"
    rf"(?P<stem>{'|'.join(STEMS)})"
)


class ShuffleBlock(nnx.Module):
    """torchvision's `InvertedResidual`: half of the channels pass, or with a stride all go through both branches."""

    def __init__(self, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> None:
        half, self.splits = features // 2, stride == 1
        pointwise = partial(conv_norm_act, features=half, kernel=1, rngs=rngs, activation=relu)
        depthwise = partial(_depthwise, stride=stride, rngs=rngs)
        self.branch1 = Sequential([] if self.splits else [*depthwise(in_features), *pointwise(in_features)])
        first = pointwise(half if self.splits else in_features)
        self.branch2 = Sequential([*first, *depthwise(half), *pointwise(half)])

    def __call__(self, x: Features) -> Features:
        passing, transformed = jnp.split(x, 2, axis=3) if self.splits else (x, x)
        return shuffled(jnp.concatenate([self.branch1(passing), self.branch2(transformed)], axis=3), 2)


def _depthwise(features: int, stride: int, rngs: nnx.Rngs) -> Sequential:
    return conv_norm_act(features, features, 3, rngs, None, stride=stride, groups=features)


class ShuffleNetV2(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self, sizes: Sizes, stride: int, max_pool: bool, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = conv_norm_act(3, STEM_FEATURES, 3, rngs, relu, stride=stride)
        self.maxpool = MaxPool(3, 2, padding=1) if max_pool else Identity()
        self.names = tuple(f"stage{FIRST_STAGE + number}" for number in range(len(sizes.stages.widths)))
        in_features = STEM_FEATURES
        for name, features, depth in zip(self.names, *sizes.stages, strict=True):
            setattr(self, name, stage(partial(ShuffleBlock, rngs), in_features, features, depth, 2))
            in_features = features
        self.conv5 = conv_norm_act(in_features, sizes.last, 1, rngs, relu)
        self.fc = linear(sizes.last, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.maxpool(self.conv1(x))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(global_average(self.conv5(x)))


def _kernel(stage: int, block: int) -> str:
    """The name of a block's last convolution."""
    return f"stage{stage + FIRST_STAGE}.{block}.branch2.5.weight"


def _named_sizes(match: re.Match[str]) -> Sizes | None:
    stages = named_stages(match)
    return stages and Sizes(stages, int(match["last"]))


def _make(match: re.Match[str]) -> Architecture | None:
    sizes = NAMED[match["size"]] if match["size"] else _named_sizes(match)
    if sizes is None or any(width % 2 for width in sizes.stages.widths):
        return None
    return Architecture(
        name=match[0],
        build=partial(ShuffleNetV2, sizes, *STEMS[match["stem"]]),
        classifier="fc.weight",
        image_sizes=squares(32 if match["stem"] else 224),
        landmarks={
            "conv5.0.weight": (sizes.last, sizes.stages.widths[-1], 1, 1),
            **{
                _kernel(number, depth - 1): (width // 2, width // 2, 1, 1)
                for number, (width, depth) in enumerate(zip(*sizes.stages, strict=True))
            },
        },
        torch_module=from_torchvision(match[0]) if match["size"] and not match["stem"] else None,
        variant_of=match["base"] if match["stem"] else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    halves, depths = told_stages(shapes, _kernel)
    last = shapes.get("conv5.0.weight", ())
    if depths and len(last) == 4:
        sizes = Sizes(Stages(tuple(2 * half for half in halves), depths), last[0])
        size = next((name for name, known in NAMED.items() if known == sizes), None)
        yield f"shufflenet_v2_{size or f'{sizes.stages.spelled()}_l{sizes.last}'}"


register_family(Family(NAME, "shufflenet_v2_x1_0", _make, _propose, tuple(filter(None, STEMS))))
