"""ConvNeXt (Liu et al., 2022) of any stages, as torchvision names it."""

import re
from collections.abc import Iterator
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.layers import (
    Activation,
    Flatten,
    Permute,
    Sequential,
    conv,
    gelu,
    layer_norm,
    linear,
    parameter,
)
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register_family
from ibau_jax.models.sizes import STAGES, Stages, named_stages, told_stages

NAMED = {
    "tiny": Stages((96, 192, 384, 768), (3, 3, 9, 3)),
    "small": Stages((96, 192, 384, 768), (3, 3, 27, 3)),
    "base": Stages((128, 256, 512, 1024), (3, 3, 27, 3)),
    "large": Stages((192, 384, 768, 1536), (3, 3, 27, 3)),
}
NAME = re.compile(rf"convnext_(?:(?P<size>{'|'.join(NAMED)})|{STAGES})")


class ConvNeXtBlock(nnx.Module):
    """A depthwise 7x7 convolution and a pointwise MLP, scaled channel by channel and added."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.layer_scale = parameter((features, 1, 1), rngs)
        self.block = Sequential(
            [
                conv(features, features, 7, rngs, groups=features, bias=True),
                Permute((0, 2, 3, 1)),
                layer_norm(features, rngs),
                linear(features, 4 * features, rngs),
                Activation(gelu),
                linear(4 * features, features, rngs),
                Permute((0, 3, 1, 2)),
            ]
        )

    def __call__(self, x: Features) -> Features:
        return x + self.block(x) * self.layer_scale.reshape(1, 1, 1, -1)


class ConvNeXt(nnx.Module):
    """Logits of RGB images, which the stem makes four times smaller and each stage but the first twice."""

    def __init__(self, stages: Stages, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        first, last = stages.widths[0], stages.widths[-1]
        layers = [Sequential([conv(3, first, 4, rngs, stride=4, padding=0, bias=True), layer_norm(first, rngs)])]
        for index, (features, blocks) in enumerate(zip(*stages, strict=True)):
            layers.append(Sequential([ConvNeXtBlock(features, rngs) for _ in range(blocks)]))
            if index + 1 < len(stages.widths):
                halve = conv(features, stages.widths[index + 1], 2, rngs, stride=2, padding=0, bias=True)
                layers.append(Sequential([layer_norm(features, rngs), halve]))
        self.features = Sequential(layers)
        self.classifier = Sequential([layer_norm(last, rngs), Flatten(), linear(last, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(self.features(x).mean((1, 2), keepdims=True))


def _depthwise(stage: int, block: int) -> str:
    """The name of a block's convolution."""
    return f"features.{2 * stage + 1}.{block}.block.0.weight"


def _make(match: re.Match[str]) -> Architecture | None:
    stages = NAMED[match["size"]] if match["size"] else named_stages(match)
    return stages and Architecture(
        name=match[0],
        build=partial(ConvNeXt, stages),
        classifier="classifier.2.weight",
        image_sizes=squares(224),
        landmarks={
            _depthwise(number, depth - 1): (width, 1, 7, 7)
            for number, (width, depth) in enumerate(zip(*stages, strict=True))
        },
        torch_module=from_torchvision(match[0]) if match["size"] else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    stages = told_stages(shapes, _depthwise)
    if stages.depths:
        size = next((name for name, known in NAMED.items() if known == stages), None)
        yield f"convnext_{size or stages.spelled()}"


register_family(Family(NAME, "convnext_tiny", _make, _propose))
