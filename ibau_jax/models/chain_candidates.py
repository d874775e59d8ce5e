"""The candidates for a plain chain: what may stand between its layers with weights, the most usual first."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product, takewhile
from typing import TypeVar

from ibau_jax.image_size import ImageSize
from ibau_jax.models.chain_steps import FLAT, LONGEST_NAME, MAX2, MEAN, RELU, Step, chain_name

Key = TypeVar("Key")

MOST_CANDIDATES = 24  # of a state dict
MOST_SHAPES = 200  # ways of making maps smaller, of which BatchNorm's places make candidates
FEW = 5  # convolutions: any of so few may be pooled
ADAPTIVE = 3.0  # how unusual adaptive pooling to a grid is
LARGEST_GRID = 7  # that adaptive pooling makes
# Sizes of images by their channels, the likeliest first, and how unusual they are; and others.
USUAL_SIZES = {
    1: {28: 0.0, 32: 1.0, 64: 1.5, 8: 2.0, 96: 2.0, 128: 2.0, 224: 2.0},
    3: {32: 0.0, 64: 1.0, 224: 1.5, 96: 1.5, 128: 1.5, 28: 2.0},
}
OTHER = 4.0  # how unusual any other size is
OTHER_SIZES = (
    16,
    20,
    24,
    36,
    40,
    48,
    50,
    56,
    60,
    72,
    80,
    84,
    100,
    112,
    150,
    160,
    192,
    200,
    227,
    256,
    299,
    300,
    384,
    512,
)


@dataclass(frozen=True)
class Weighted:
    """A convolution or a linear layer, as a state dict shows it.

    Attributes:
        step: without padding and stride.
        norm: the BatchNorm of its output; empty where there is none.
    """

    step: Step
    norm: str = ""


@dataclass(frozen=True)
class Skeleton:
    """What a state dict shows of a chain, and the size of its images.

    Attributes:
        channels, size: of an image.
        layers: those with weights, in the order of their use.
        places: of the maps that the first linear layer reads; 1 where they are averaged.
        first_norm: the BatchNorm of the images; empty where there is none.
        flat_norm: that of what the first linear layer reads.
    """

    channels: int
    size: ImageSize
    layers: tuple[Weighted, ...]
    places: int
    first_norm: str = ""
    flat_norm: str = ""

    @property
    def grid(self) -> int:
        """Height and width of the maps, where adaptive pooling may have made them; 0 where it has not."""
        side = math.isqrt(self.places)
        return side if side**2 == self.places and side <= LARGEST_GRID else 0

    @property
    def convolutions(self) -> tuple[Weighted, ...]:
        """The first layers, up to the linear ones."""
        return tuple(takewhile(lambda one: one.step.kind == "conv", self.layers))

    @property
    def linears(self) -> tuple[Weighted, ...]:
        """The last layers."""
        return self.layers[len(self.convolutions) :]


def candidates(skeleton: Skeleton) -> tuple[str, ...]:
    """The names of the chains that a state dict may be of, the most usual first."""
    return tuple(name for _, name in ranked(skeleton))


@functools.lru_cache(maxsize=256)
def ranked(skeleton: Skeleton) -> tuple[tuple[float, str], ...]:
    """The chains that a state dict may be of, and how unusual each is, at most `MOST_CANDIDATES`."""
    usual = USUAL_SIZES[skeleton.channels]
    of_size = usual.get(skeleton.size.height, OTHER) if skeleton.size.is_square else OTHER
    best: dict[str, float] = {}
    shapes = sorted(_usual(skeleton, list(_shaped(skeleton))), key=lambda one: one[0])[:MOST_SHAPES]
    for (cost, shape), (more, order) in product(shapes, _orders(skeleton)):
        steps = _arranged(skeleton, shape, order)
        spare = _spare_places(steps)
        name = chain_name(skeleton.channels, skeleton.size, steps)
        if spare is not None and len(name) <= LONGEST_NAME:
            _keep_least(best, name, cost + more + spare + of_size)
    best_of_pair: dict[str, float] = {}
    for name, cost in best.items():
        _keep_least(best_of_pair, _unpooled(name), cost)
    together = sorted(best, key=lambda name: (best_of_pair[_unpooled(name)], _unpooled(name), best[name]))
    return tuple((best[name], name) for name in together[:MOST_CANDIDATES])


def _keep_least(costs: dict[Key, float], key: Key, cost: float) -> None:
    """Notes how unusual something is, where that is less than was known."""
    costs[key] = min(costs.get(key, math.inf), cost)


def _unpooled(name: str) -> str:
    """The chain without a pooling just before the last average.

    The statistics of BatchNorm do not tell the two apart: both have to be among the candidates, or one would be taken
    for the other.
    """
    return name.replace(f"-{MAX2}-{MEAN}-", f"-{MEAN}-")


@dataclass(frozen=True)
class Shape:
    """How a chain makes maps smaller.

    Attributes:
        paddings, strides: of each convolution.
        pooled: the places of the convolutions behind which maximums of 2x2 are taken.
        averaged: whether adaptive pooling makes the last maps as small as they are read.
    """

    paddings: tuple[int, ...]
    strides: tuple[int, ...]
    pooled: frozenset[int]
    averaged: bool


def _usual(skeleton: Skeleton, shapes: Sequence[tuple[float, Shape]]) -> list[tuple[float, Shape]]:
    """Those that need no adaptive pooling to a grid of several places, if there are any."""
    exact = [(cost, shape) for cost, shape in shapes if skeleton.places == 1 or not shape.averaged]
    return exact or [(cost + ADAPTIVE, shape) for cost, shape in shapes if skeleton.grid]


def _shaped(skeleton: Skeleton) -> Iterator[tuple[float, Shape]]:
    """What makes the images into maps of the size that the first linear layer reads, and how unusual it is."""
    convolutions = [one.step for one in skeleton.convolutions]
    if not convolutions:
        if skeleton.places == math.prod(skeleton.size):
            yield 0.0, Shape((), (), frozenset(), False)
        return
    for (pooled, strides), cost in _reductions(convolutions, _roomy(skeleton)).items():
        for paddings, more in _paddings([step.kernel for step in convolutions], skeleton.places == 1).items():
            shape = Shape(paddings, strides, pooled, averaged=False)
            shrunk = {side: _shrunk(convolutions, shape, side) for side in set(skeleton.size)}
            (height, odd_rows), (width, odd_columns) = map(shrunk.__getitem__, skeleton.size)
            averaged = skeleton.places == 1 or height * width != skeleton.places
            if min(height, width) >= (skeleton.grid or 1):
                # Of an average of much or just pooled there is less use.
                unusual = (
                    max(0.0, math.log2(max(height, width) / 8)) + 2 * (len(convolutions) - 1 in pooled)
                    if averaged and height * width > 1
                    else 0.0
                )
                odd = max(odd_rows, odd_columns)
                yield cost + more + odd / 4 + unusual, replace(shape, averaged=averaged)


def _shrunk(convolutions: Sequence[Step], shape: Shape, side: int) -> tuple[int, int]:
    """The height or width of the last maps, of images of this one, and how often a step leaves a row of it out."""
    odd = 0
    for place, (step, padding, stride) in enumerate(zip(convolutions, shape.paddings, shape.strides, strict=True)):
        odd += stride > 1 and side % stride
        side = replace(step, padding=padding, stride=stride).side_after(side)
        odd += place in shape.pooled and side % 2
        side = MAX2.side_after(side) if place in shape.pooled else side
    return side, odd


Reduction = tuple[frozenset[int], tuple[int, ...]]


def _roomy(skeleton: Skeleton) -> frozenset[int]:
    """The convolutions behind which, and behind BatchNorm and activation, numbers of their Sequential are left over."""
    found = set[int]()
    for place, (one, following) in enumerate(pairwise(skeleton.convolutions)):
        parent, _, number = one.step.name.rpartition(".")
        other, _, after = following.step.name.rpartition(".")
        between = 1 + (one.norm.rpartition(".")[0] == parent and bool(one.norm))
        if parent == other and number.isdigit() and after.isdigit() and int(after) - int(number) - 1 > between:
            found.add(place)
    return frozenset(found)


def _reductions(convolutions: Sequence[Step], roomy: frozenset[int]) -> dict[Reduction, float]:
    """Which convolutions are pooled, the strides of all, and how unusual that is; `roomy` ones mostly are."""
    count, found = len(convolutions), dict[Reduction, float]()
    # A convolution of 1x1, or one that gives the classes, is neither pooled nor does it have a stride, as a rule.
    usual = [place for place, step in enumerate(convolutions) if step.kernel > 1 and step.features] or list(
        range(count)
    )
    places = {
        frozenset(usual[place] for place in chosen): cost
        for chosen, cost in _regular_places([convolutions[place].features for place in usual]).items()
    }

    def add(pooled: frozenset[int], strided: frozenset[int], cost: float) -> None:
        key = pooled, tuple(2 if place in strided else 1 for place in range(count))
        _keep_least(found, key, cost)

    even = all(step.kernel % 2 == 0 for step in convolutions)  # such kernels mostly have strides
    rare = 0 if even or not convolutions[-1].features else 2  # so do networks without linear layers
    for chosen in (roomy, roomy | {count - 1}) if roomy else ():
        add(chosen, frozenset(), 0.5)
    for chosen, cost in places.items():
        add(chosen, frozenset(), cost + 2 * even)
        if cost < 4:
            add(frozenset(), chosen, cost + rare)
            add(frozenset(), frozenset(place + 1 for place in chosen if place + 1 in usual), cost + rare)
    return found


def _regular_places(widths: Sequence[int]) -> dict[frozenset[int], float]:
    """The convolutions behind which maps may be halved, and how unusual that is."""
    count = len(widths)
    ends = [place for place in range(count) if place + 1 == count or widths[place + 1] != widths[place]]
    found = dict[frozenset[int], float]()

    def add(places: Sequence[int] | range, cost: float) -> None:
        _keep_least(found, frozenset(places), cost)

    add(range(count), 0.0 if len(ends) == count else 1.0)
    add(ends, 0.0)
    add(range(1, count, 2), 1.0 if count % 2 == 0 else 2.0)
    add(range(2, count, 3), 2.0)
    for places, cost in list(found.items()):
        add(sorted(places - {count - 1}), cost + 1)
        add(sorted(places - {0}), cost + 2)
    add(range(count - 1), 1.0)
    add([count - 1], 1.0)
    add([], 2.0)
    for place in range(1, count):
        add(range(place), 3.0)
        add(range(place, count), 3.0)
    if count <= FEW:
        for taken in product((False, True), repeat=count):
            add([place for place, one in enumerate(taken) if one], 4.0)
    return found


def _paddings(kernels: Sequence[int], averaged: bool) -> dict[tuple[int, ...], float]:
    """The paddings that convolutions may have, and how unusual they are: none, or what keeps the size.

    Where the last maps are averaged, the size is mostly kept, and nothing but custom speaks against other paddings.
    """
    same = [(kernel - 1) // 2 for kernel in kernels]
    large = max(kernels) >= 5 and not averaged
    found = dict[tuple[int, ...], float]()

    def add(paddings: Sequence[int], cost: float) -> None:
        _keep_least(found, tuple(paddings), cost * (2 if averaged else 1))

    add(same, 0.5 if large else 0.0)
    add([0] * len(same), 0.0 if large else 1.0)
    for kernel in set(kernels) - {1}:
        add([one if size == kernel else 0 for one, size in zip(same, kernels, strict=True)], 1.5)
        add([0 if size == kernel else one for one, size in zip(same, kernels, strict=True)], 1.5)
    add([*same[:1], *[0] * (len(same) - 1)], 1.0 if large else 2.0)
    add([0, *same[1:]], 2.5)
    add([*same[:-1], 0], 2.5)
    add([min(one, 1) for one in same], 2.5)
    return found


# What follows a layer with BatchNorm, and how unusual it is: most often normalised, activated, pooled.
ORDERS: dict[tuple[str, ...], float] = {
    ("norm", "relu", "max"): 0.0,
    ("relu", "norm", "max"): 1.0,
    ("relu", "max", "norm"): 1.0,
    ("max", "norm", "relu"): 2.5,
    ("relu", "norm", "relu", "max"): 3.0,
}


def _orders(skeleton: Skeleton) -> list[tuple[float, tuple[str, ...]]]:
    """The orders that differ for a state dict, and how unusual they are."""
    orders = [(cost, order) for order, cost in ORDERS.items()]
    return orders if any(one.norm for one in skeleton.layers) else orders[:1]


def _arranged(skeleton: Skeleton, shape: Shape, order: Sequence[str]) -> list[Step]:
    """All layers of a chain, in order."""
    steps = [Step("norm", skeleton.first_norm)] if skeleton.first_norm else []
    convolutions, last = skeleton.convolutions, skeleton.layers[-1]
    for place, one in enumerate(convolutions):
        sized = replace(one.step, padding=shape.paddings[place], stride=shape.strides[place])
        steps += [sized, *_following(_without_relu(order) if one is last else order, one.norm, place in shape.pooled)]
    if shape.averaged and convolutions:
        steps.append(replace(MEAN, kernel=skeleton.grid))
    steps += [FLAT, *([Step("norm", skeleton.flat_norm)] if skeleton.flat_norm else [])]
    for one in skeleton.linears:
        steps += [one.step, *_following(_without_relu(order) if one is last else order, one.norm, False)]
    return steps


def _without_relu(order: Sequence[str]) -> list[str]:
    """What follows the last layer, whose outputs are logits."""
    return [kind for kind in order if kind != "relu"]


def _following(order: Sequence[str], norm: str, is_pooled: bool) -> list[Step]:
    """What follows a layer with weights; without BatchNorm, one activation is enough."""
    kinds = order if norm else dict.fromkeys(kind for kind in order if kind != "norm")
    made = {"norm": Step("norm", norm), "relu": RELU, "max": MAX2}
    return [made[kind] for kind in kinds if kind != "max" or is_pooled]


def _spare_places(steps: Sequence[Step]) -> float | None:
    """How many numbers of Sequentials are left over, as dropout leaves them; None where there are too few."""
    spare, before, between = 0.0, None, 0
    listed = _lists([step for step in steps if step.name])
    for step in steps:
        if not step.name:
            between += 1
            continue
        parent, _, number = step.name.rpartition(".")
        if before and before[0] == parent and parent not in listed and number.isdigit() and before[1].isdigit():
            free = int(number) - int(before[1]) - 1 - between
            if free < 0:
                return None
            spare += min(free, 2)
        before, between = (parent, number), 0
    return spare


def _lists(steps: Sequence[Step]) -> set[str]:
    """The parents whose layers have numbers that say nothing of what is between them, as those of a ModuleList."""
    lists, before = set[str](), dict[str, int]()
    for step in steps:
        parent, _, number = step.name.rpartition(".")
        if not number.isdigit():
            lists.add(parent)
        elif step.kind == "norm":
            before[parent] = before.get(parent, 0) + 1
        else:
            if parent in before and int(number) - before[parent] < 2:
                lists.add(parent)
            before[parent] = int(number)
    return lists
