"""VGG (Simonyan & Zisserman, 2015) 11 to 19, with and without BatchNorm.

The convolutions are torchvision's; what follows them is torchvision's three layers behind a 7x7 adaptive pooling, or
one linear layer as CIFAR code after kuangliu has it, or three layers of 512 as backdoor-toolbox has them (`_cifar_3`),
or torchvision's three layers of any width without its pooling: `vgg16_bn_cifar_w4096` as huyvnphan has it, `_w512` as
chenyaofo does.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.layers import (
    Activation,
    AdaptiveAvgPool,
    Flatten,
    Identity,
    MaxPool,
    Sequential,
    batch_norm,
    conv,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register, register_family

# Features of the convolutions of the five blocks, each of which ends with a max pooling.
BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
FLAT_IN_TORCHVISION = 512 * 7 * 7  # features of the last maps, behind torchvision's pooling
WIDEST = 1 << 16
NAME = re.compile(rf"vgg(?P<depth>{'|'.join(map(str, BLOCKS))})(?P<bn>_bn)?_cifar_w(?P<width>\d{{1,5}})")


def convolutions(depth: int, normalized: bool, rngs: nnx.Rngs) -> Sequential:
    """The part called `features`: it shrinks an image 32 times."""
    layers: list[nnx.Module] = []
    in_features = 3
    for block in BLOCKS[depth]:
        for features in block:
            layers.append(conv(in_features, features, 3, rngs, bias=True))
            layers += [batch_norm(features, rngs)] if normalized else []
            layers.append(Activation(relu))
            in_features = features
        layers.append(MaxPool(2))
    return Sequential(layers)


def _three_layers(in_features: int, width: int, num_classes: int, order: str, rngs: nnx.Rngs) -> Sequential:
    """Linear layers (L) with ReLUs (R) and dropouts (D) in the given order."""
    sizes = iter([(in_features, width), (width, width), (width, num_classes)])
    makers: dict[str, Callable[[], nnx.Module]] = {
        "L": lambda: linear(*next(sizes), rngs),
        "R": lambda: Activation(relu),
        "D": Identity,
    }
    return Sequential([makers[kind]() for kind in order])


class VGG(nnx.Module):
    """Logits of RGB images, the classifier made by `classifier(num_classes, image_size, rngs)`."""

    def __init__(
        self,
        depth: int,
        normalized: bool,
        grid: int | None,
        classifier: Callable[[int, ImageSize, nnx.Rngs], nnx.Module],
        num_classes: int,
        image_size: ImageSize,
        rngs: nnx.Rngs,
    ) -> None:
        self.features = convolutions(depth, normalized, rngs)
        self.avgpool = AdaptiveAvgPool(grid) if grid else Identity()
        self.flatten = Flatten()
        self.classifier = classifier(num_classes, image_size, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(self.flatten(self.avgpool(self.features(x))))


def _torchvision_classifier(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Sequential:
    return _three_layers(FLAT_IN_TORCHVISION, 4096, num_classes, "LRDLRDL", rngs)


def _single_linear(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(_flat(image_size), num_classes, rngs)


def _three_of(width: int, order: str, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Sequential:
    return _three_layers(_flat(image_size), width, num_classes, order, rngs)


def _flat(image_size: ImageSize) -> int:
    """The features of all places together, behind the convolutions."""
    return 512 * image_size.places(lambda side: side // 32)


def _named(depth: int, normalized: bool) -> str:
    return f"vgg{depth}" + ("_bn" if normalized else "")


def landmarks_of(depth: int, normalized: bool) -> dict[str, tuple[int, ...]]:
    """The last convolution."""
    layers = sum(len(block) * (3 if normalized else 2) + 1 for block in BLOCKS[depth])
    return {f"features.{layers - (4 if normalized else 3)}.weight": (512, 512, 3, 3)}


def _register(depth: int, normalized: bool) -> None:
    base, landmarks = _named(depth, normalized), landmarks_of(depth, normalized)
    for name, grid, head, classifier, sizes in (
        (base, 7, _torchvision_classifier, "classifier.6.weight", squares(224)),
        (f"{base}_cifar", None, _single_linear, "classifier.weight", squares(32, 64)),
        (f"{base}_cifar_3", None, partial(_three_of, 512, "DLRDLRL"), "classifier.6.weight", squares(32, 64)),
    ):
        oracle = from_torchvision(name) if grid else None
        build = partial(VGG, depth, normalized, grid, head)
        register(Architecture(name, build, classifier, sizes, landmarks, oracle))


for _depth in BLOCKS:
    for _normalized in (False, True):
        _register(_depth, _normalized)


def _make(match: re.Match[str]) -> Architecture | None:
    depth, normalized, width = int(match["depth"]), match["bn"] is not None, int(match["width"])
    if not 0 < width <= WIDEST:
        return None
    return Architecture(
        name=match[0],
        build=partial(VGG, depth, normalized, None, partial(_three_of, width, "LRDLRDL")),
        classifier="classifier.6.weight",
        image_sizes=squares(32, 64),
        landmarks={"classifier.3.weight": (width, width), **landmarks_of(depth, normalized)},
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    first, second = shapes.get("classifier.0.weight", ()), shapes.get("classifier.3.weight", ())
    if len(first) != 2 or len(second) != 2 or first[1] == FLAT_IN_TORCHVISION:
        return
    for depth in BLOCKS:
        for normalized in (False, True):
            if all(shapes.get(name) == shape for name, shape in landmarks_of(depth, normalized).items()):
                yield f"{_named(depth, normalized)}_cifar_w{first[0]}"


register_family(Family(NAME, "vgg16_bn_cifar_w512", _make, _propose))
