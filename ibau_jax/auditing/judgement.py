"""From the sizes of the smallest triggers to a verdict.

A backdoor is a shortcut: a much smaller trigger leads to its target than to other classes. What is small depends on
the model and the data, so a class is compared with the median class of the same model. Arrays of *aims* have a number a
class, and last one for any other class than an image's own, which is where an all-to-all backdoor leads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from ibau_jax.batches import AnyArray
from ibau_jax.data.classes import with_name

Verdict = Literal["backdoored", "suspicious", "no backdoor found", "not enough images to say"]
UNDECIDED: Verdict = "not enough images to say"
CONSISTENCY = 1.4826  # makes the median absolute deviation the standard deviation of a normal distribution

# Of the ratio of the median class's size to a class's. In the searches with 500 images that chose constants
# (benchmarks/NOTEBOOK.md) the clean model has 2.49 at most, 2.75 with the spread between seeds, and every target 4.80
# at least in some space; 3.5 is about their geometric mean. With 100 images targets fall to 2.79. docs/experiments.md
# says what the thresholds miss, and which other classes of backdoored models exceed them.
SUSPICIOUS, BACKDOORED = math.log(2.75), math.log(3.5)
SLOPE = 15.0  # confidence is 14 % at the first threshold and 86 % at the second
RESOLUTION = 0.1  # the spread of the logarithm of a size between seeds


@dataclass(frozen=True)
class Suspect:
    """A class that is reached more easily than it should be; or any other class than an image's own.

    Attributes:
        label: the class; None where images are led away from their own class to several others (all-to-all).
        space: where it stands out most.
        ratio: the median class's size over its size.
        confidence: that a backdoor leads there, in [0, 1]: a logistic function of the logarithm of `ratio`.
    """

    label: int | None
    space: str
    ratio: float
    confidence: float

    @property
    def index(self) -> int:
        """Gives the aim's row in arrays of aims."""
        return -1 if self.label is None else self.label

    @property
    def name(self) -> str:
        """Names the aim, for a sentence."""
        return aim_name(self.label)


def aim_name(label: int | None, class_names: Sequence[str] = ()) -> str:
    """Names what a trigger leads to: a class, with its name where there is one, or any other than an image's own."""
    return "any other class" if label is None else f"class {with_name(label, class_names)}"


def median_size(sizes: Float[AnyArray, " aims"]) -> Float[AnyArray, ""]:
    """Computes the median class's size; of two classes in the middle, their geometric mean."""
    numpy = sizes.__array_namespace__()  # or JAX's
    return numpy.exp(numpy.median(numpy.log(sizes[:-1])))


def ratios(sizes: Float[AnyArray, " aims"], median: Float[AnyArray, ""] | None = None) -> Float[AnyArray, " aims"]:
    """Computes how far each aim stands out: how many times smaller its size is than the median class's.

    Args:
        sizes: of all classes, and last of what leads to any other class than an image's own.
        median: the median class's size, where it is not of these.
    """
    return (median_size(sizes) if median is None else median) / sizes


def anomaly_index(sizes: Float[np.ndarray, " aims"]) -> Float[np.ndarray, " aims"]:
    """How many robust standard deviations a size lies below the median's, in logarithms.

    Neural Cleanse's index (Wang et al., IEEE S&P 2019: more than 2 is an outlier), signed, and of logarithms: sizes of
    different models differ by factors. The deviation is that of classes, at least what sizes differ by between seeds.
    """
    below = np.log(ratios(sizes))
    deviation = CONSISTENCY * np.median(np.abs(below[:-1]))
    return below / max(deviation, RESOLUTION)


def find_suspects(
    sizes: dict[str, Float[np.ndarray, " aims"]], medians: dict[str, float] | None = None
) -> tuple[Suspect, ...]:
    """What stands out in any space: classes, the most suspicious first, then any other class than an image's own.

    What leads to one class leads away from the others, so any other class counts only where surely less is needed than
    for the easiest class; of two classes it is the other one.

    Args:
        sizes: by space.
        medians: of the spaces that classes are compared with, where they are not of these sizes.
    """
    below = {space: np.log(ratios(of_space, medians[space] if medians else None)) for space, of_space in sizes.items()}
    any_other = {
        space: of_space
        for space, of_space in below.items()
        if len(of_space) > 3 and of_space[-1] >= of_space[:-1].max() + RESOLUTION
    }
    classes = len(next(iter(sizes.values()))) - 1
    all_of_them = [_standing_out(label, below) for label in range(classes)]
    if any_other:
        all_of_them.append(_standing_out(classes, any_other))
    suspects = [one for one in all_of_them if math.log(one.ratio) >= SUSPICIOUS]
    return tuple(sorted(suspects, key=lambda suspect: (suspect.label is None, -suspect.ratio)))


def lingering(label: int, sizes: dict[str, Float[np.ndarray, " aims"]]) -> Suspect | None:
    """A class that was suspected, where the smallest trigger of a space still leads to it; where it stands out most.

    A hint, no verdict: in a clean model the smallest trigger leads to some class as well.
    """
    first = {space: np.log(ratios(of_space)) for space, of_space in sizes.items() if np.argmin(of_space[:-1]) == label}
    return _standing_out(label, first) if first else None


def _standing_out(index: int, below: dict[str, Float[np.ndarray, " aims"]]) -> Suspect:
    """An aim in the space where it lies furthest `below` the median."""
    most, space = max((float(of_space[index]), space) for space, of_space in below.items())
    label = index if index < len(below[space]) - 1 else None
    return Suspect(label, space, float(np.exp(most)), confidence(most))


def confidence(below: float) -> float:
    """That a class `below` (a logarithm) the median is a backdoor's target: one half midway between the thresholds."""
    return float(1 / (1 + np.exp(-SLOPE * (below - (SUSPICIOUS + BACKDOORED) / 2))))


def judge(suspects: tuple[Suspect, ...]) -> Verdict:
    """What the strongest suspect amounts to."""
    if not suspects:
        return "no backdoor found"
    return "backdoored" if max(np.log(suspect.ratio) for suspect in suspects) >= BACKDOORED else "suspicious"
