"""ConvNeXt (Liu et al., 2022) and ConvNeXt V2 (Woo et al., 2023) of any stages, as torchvision names the first.

The second normalises the MLP's hidden features by their maps' norms (`GlobalResponseNorm`) in place of the layer scale.
"""

import re
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
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
    "atto": Stages((40, 80, 160, 320), (2, 2, 6, 2)),
    "femto": Stages((48, 96, 192, 384), (2, 2, 6, 2)),
    "pico": Stages((64, 128, 256, 512), (2, 2, 6, 2)),
    "nano": Stages((80, 160, 320, 640), (2, 2, 8, 2)),
    "tiny": Stages((96, 192, 384, 768), (3, 3, 9, 3)),
    "small": Stages((96, 192, 384, 768), (3, 3, 27, 3)),
    "base": Stages((128, 256, 512, 1024), (3, 3, 27, 3)),
    "large": Stages((192, 384, 768, 1536), (3, 3, 27, 3)),
    "xlarge": Stages((256, 512, 1024, 2048), (3, 3, 27, 3)),
    "huge": Stages((352, 704, 1408, 2816), (3, 3, 27, 3)),
}
IN_TORCHVISION = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
EPSILON = 1e-6  # added to the mean of norms
NAME = re.compile(rf"convnext(?P<second>v2)?_(?:(?P<size>{'|'.join(NAMED)})|{STAGES})")


def _widened(features: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    """A block's layers up to the MLP's hidden features."""
    return [
        conv(features, features, 7, rngs, groups=features, bias=True),
        Permute((0, 2, 3, 1)),
        layer_norm(features, rngs),
        linear(features, 4 * features, rngs),
        Activation(gelu),
    ]


class ConvNeXtBlock(nnx.Module):
    """A depthwise 7x7 convolution and a pointwise MLP, scaled channel by channel and added."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.layer_scale = parameter((features, 1, 1), rngs)
        self.block = Sequential(
            [
                *_widened(features, rngs),
                linear(4 * features, features, rngs),
                Permute((0, 3, 1, 2)),
            ]
        )

    def __call__(self, x: Features) -> Features:
        return x + self.block(x) * self.layer_scale.reshape(1, 1, 1, -1)


class GlobalResponseNorm(nnx.Module):
    """Each feature's map is scaled by its norm, divided by the mean of all features' norms, and added."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.weight, self.bias = parameter((features,), rngs), parameter((features,), rngs)

    def __call__(self, x: Features) -> Features:
        squares = jnp.sum(x**2, (1, 2), keepdims=True)
        # The derivative of the root at 0, which is infinite, is not asked for: PyTorch takes 0 for that of the norm.
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        scaled = x * (norms / (norms.mean(-1, keepdims=True) + EPSILON))
        return x + self.weight.reshape(1, 1, 1, -1) * scaled + self.bias.reshape(1, 1, 1, -1)


class ConvNeXtV2Block(nnx.Module):
    """A depthwise 7x7 convolution and a pointwise MLP whose hidden features are normalised, added."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.block = Sequential(
            [
                *_widened(features, rngs),
                GlobalResponseNorm(4 * features, rngs),
                linear(4 * features, features, rngs),
                Permute((0, 3, 1, 2)),
            ]
        )

    def __call__(self, x: Features) -> Features:
        return x + self.block(x)


MakeBlock = type[ConvNeXtBlock] | type[ConvNeXtV2Block]


class ConvNeXt(nnx.Module):
    """Logits of RGB images, which the stem makes four times smaller and each stage but the first twice."""

    def __init__(
        self, block: MakeBlock, stages: Stages, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        first, last = stages.widths[0], stages.widths[-1]
        layers = [Sequential([conv(3, first, 4, rngs, stride=4, padding=0, bias=True), layer_norm(first, rngs)])]
        for index, (features, blocks) in enumerate(zip(*stages, strict=True)):
            layers.append(Sequential([block(features, rngs) for _ in range(blocks)]))
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
        build=partial(ConvNeXt, ConvNeXtV2Block if match["second"] else ConvNeXtBlock, stages),
        classifier="classifier.2.weight",
        image_sizes=squares(224),
        landmarks={
            _depthwise(number, depth - 1): (width, 1, 7, 7)
            for number, (width, depth) in enumerate(zip(*stages, strict=True))
        },
        torch_module=from_torchvision(match[0]) if match[0] in IN_TORCHVISION else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    stages = told_stages(shapes, _depthwise)
    if stages.depths:
        size = next((name for name, known in NAMED.items() if known == stages), None)
        second = "v2" if len(shapes.get("features.1.0.block.5.weight", ())) == 1 else ""
        yield f"convnext{second}_{size or stages.spelled()}"


register_family(Family(NAME, "convnext_tiny", _make, _propose))
