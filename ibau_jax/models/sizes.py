"""How names and shapes tell the sizes of a family's members: a multiplier of widths, or stages."""

import re
from collections.abc import Callable
from itertools import count, takewhile
from typing import NamedTuple

from ibau_jax.models.registry import Shapes

# All multipliers of two decimals. Several may round to the same widths: tenths come first, then twentieths.
MULTIPLIERS = [hundredths / 100 for hundredths in sorted(range(10, 301), key=lambda one: (one % 10 > 0, one % 5 > 0))]
MULTIPLIER = r"\d_\d{1,2}"
STAGES = r"w(?P<widths>[1-9]\d{0,3}(?:_[1-9]\d{0,3})*)_d(?P<depths>[1-9]\d?(?:_[1-9]\d?)*)"


def count_matching(pattern: str, shapes: Shapes) -> int:
    """How many tensors of a state dict have names of a pattern."""
    return sum(map(bool, map(re.compile(pattern).fullmatch, shapes)))


def spelled_multiplier(multiplier: float) -> str:
    """A multiplier in a name: `0_75`."""
    return str(multiplier).replace(".", "_")


def named_multiplier(text: str) -> float | None:
    """The multiplier that a name spells; None of another spelling, or out of bounds."""
    return next((one for one in MULTIPLIERS if spelled_multiplier(one) == text), None)


def fitting_multiplier(shapes: Shapes, expected: Callable[[float], Shapes]) -> float | None:
    """The simplest multiplier with which a network has tensors of these shapes; None where there is none.

    Args:
        shapes: of a state dict.
        expected: the shapes of some of its tensors with a multiplier.
    """
    return next((one for one in MULTIPLIERS if expected(one).items() <= shapes.items()), None)


class Stages(NamedTuple):
    """The features and the number of blocks of each stage."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]

    def spelled(self) -> str:
        """Stages in a name: `w96_192_d3_9`."""
        return f"w{'_'.join(map(str, self.widths))}_d{'_'.join(map(str, self.depths))}"


def named_stages(match: re.Match[str]) -> Stages | None:
    """The stages that a name which `STAGES` matches spells; None where not each has a width and a depth."""
    widths, depths = (tuple(map(int, match[part].split("_"))) for part in Stages._fields)
    return Stages(widths, depths) if len(widths) == len(depths) else None


def told_stages(shapes: Shapes, kernel: Callable[[int, int], str]) -> Stages:
    """The stages that a state dict has.

    Args:
        shapes: of the state dict.
        kernel: the name of a convolution's weight in block j of stage i, both counted from 0, that has the stage's
            features.
    """

    def depth(stage: int) -> int:
        return next(block for block in count() if len(shapes.get(kernel(stage, block), ())) != 4)

    depths = tuple(takewhile(bool, map(depth, count())))
    return Stages(tuple(shapes[kernel(stage, 0)][0] for stage in range(len(depths))), depths)
