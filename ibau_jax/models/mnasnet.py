"""MNASNet-B1, without squeeze-and-excitation (Tan et al., 2019), of any width multiplier, as torchvision names it."""

import re
from collections.abc import Iterator
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Residual, conv_norm_act, make_divisible, stage
from ibau_jax.models.layers import Identity, Sequential, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register_family
from ibau_jax.models.sizes import MULTIPLIER, fitting_multiplier, named_multiplier, spelled_multiplier

STEM, SEPARABLE, LAST = 32, 16, 1280  # features of the first two pointwise convolutions, and of the last
# Expansion, kernel, stride, features and blocks of each stage behind the separable convolution.
STAGES = ((3, 3, 2, 24, 3), (3, 5, 2, 40, 3), (6, 5, 2, 80, 3), (6, 3, 1, 96, 2), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
FIRST_STAGE = 8  # its index in `layers`
NAME = re.compile(rf"mnasnet(?P<width>{MULTIPLIER})")


def _block(expansion: int, kernel: int, rngs: nnx.Rngs, in_features: int, features: int, stride: int) -> Residual:
    """torchvision's `_InvertedResidual`, its layers in `layers`."""
    hidden = expansion * in_features
    branch = [
        *conv_norm_act(in_features, hidden, 1, rngs, relu),
        *conv_norm_act(hidden, hidden, kernel, rngs, relu, stride=stride, groups=hidden),
        *conv_norm_act(hidden, features, 1, rngs, None),
    ]
    return Residual("layers", Sequential(branch), stride == 1 and in_features == features)


class MNASNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, width: float, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        stem, in_features = make_divisible(width * STEM), make_divisible(width * SEPARABLE)
        layers: list[nnx.Module] = [
            *conv_norm_act(3, stem, 3, rngs, relu, stride=2),
            *conv_norm_act(stem, stem, 3, rngs, relu, groups=stem),
            *conv_norm_act(stem, in_features, 1, rngs, None),
        ]
        for expansion, kernel, stride, base, count in STAGES:
            features = make_divisible(width * base)
            layers.append(stage(partial(_block, expansion, kernel, rngs), in_features, features, count, stride))
            in_features = features
        self.layers = Sequential([*layers, *conv_norm_act(in_features, LAST, 1, rngs, relu)])
        self.classifier = Sequential([Identity(), linear(LAST, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(global_average(self.layers(x)))


def _landmarks(width: float) -> dict[str, tuple[int, ...]]:
    """The last convolution, the first, and the last of each stage's first block."""
    widths = [make_divisible(width * base) for *_, base, _ in STAGES]
    widths_before = [make_divisible(width * SEPARABLE), *widths[:-1]]
    return {
        f"layers.{FIRST_STAGE + len(STAGES)}.weight": (LAST, widths[-1], 1, 1),
        "layers.0.weight": (make_divisible(width * STEM), 3, 3, 3),
        **{
            f"layers.{FIRST_STAGE + number}.0.layers.6.weight": (features, expansion * before, 1, 1)
            for number, ((expansion, *_), before, features) in enumerate(
                zip(STAGES, widths_before, widths, strict=True)
            )
        },
    }


def _make(match: re.Match[str]) -> Architecture | None:
    width = named_multiplier(match["width"])
    if width is None:
        return None
    return Architecture(
        name=match[0],
        build=partial(MNASNet, width),
        classifier="classifier.1.weight",
        image_sizes=squares(224),
        landmarks=_landmarks(width),
        torch_module=from_torchvision("MNASNet", alpha=width),
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    width = fitting_multiplier(shapes, _landmarks)
    if width is not None:
        yield f"mnasnet{spelled_multiplier(width)}"


register_family(Family(NAME, "mnasnet1_0", _make, _propose))
