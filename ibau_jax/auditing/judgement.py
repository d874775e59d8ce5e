"""From the sizes of the smallest triggers to a verdict.

A backdoor is a shortcut: a much smaller trigger leads to its target than to other classes. What is small depends on
the model and the data, so a class is compared with the median class of the same model.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from ibau_jax.batches import AnyArray

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
    """A class that is reached more easily than it should be.

    Attributes:
        label: the class.
        space: where it stands out most.
        ratio: the median class's size over its size.
        confidence: that it is a backdoor's target, in [0, 1]: a logistic function of the logarithm of `ratio`.
    """

    label: int
    space: str
    ratio: float
    confidence: float


def median_size(sizes: Float[AnyArray, " classes"]) -> Float[AnyArray, ""]:
    """Computes the median class's size; of two classes in the middle, their geometric mean.

    How far a class stands out is always this divided by its size.
    """
    numpy = sizes.__array_namespace__()  # or JAX's
    return numpy.exp(numpy.median(numpy.log(sizes)))


def below_median(sizes: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """Computes the logarithm of how many times smaller than the median class's each class's size is."""
    return np.log(median_size(sizes) / sizes)


def anomaly_index(sizes: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """How many robust standard deviations a class's size lies below the median's, in logarithms.

    Neural Cleanse's index (Wang et al., IEEE S&P 2019: more than 2 is an outlier), signed, and of logarithms: sizes of
    different models differ by factors. The deviation counts as at least what sizes differ by between seeds.
    """
    below = below_median(sizes)
    deviation = CONSISTENCY * np.median(np.abs(below))
    return below / max(deviation, RESOLUTION)


def find_suspects(
    sizes: dict[str, Float[np.ndarray, " classes"]], medians: dict[str, float] | None = None
) -> tuple[Suspect, ...]:
    """The classes that stand out in any space, the most suspicious first.

    `medians` are those of the spaces that classes are compared with, where they are not of these sizes.
    """
    below = {
        space: np.log(medians[space] / of_space) if medians else below_median(of_space)
        for space, of_space in sizes.items()
    }
    suspects = [
        _standing_out(label, below)
        for label in range(len(next(iter(sizes.values()))))
        if max(of_space[label] for of_space in below.values()) >= SUSPICIOUS
    ]
    return tuple(sorted(suspects, key=lambda suspect: -suspect.ratio))


def lingering(label: int, sizes: dict[str, Float[np.ndarray, " classes"]]) -> Suspect | None:
    """A class that was suspected, where the smallest trigger of a space still leads to it; where it stands out most.

    A hint, no verdict: in a clean model the smallest trigger leads to some class as well.
    """
    first = {space: below_median(of_space) for space, of_space in sizes.items() if np.argmin(of_space) == label}
    return _standing_out(label, first) if first else None


def _standing_out(label: int, below: dict[str, Float[np.ndarray, " classes"]]) -> Suspect:
    """A class in the space where it lies furthest `below` the median."""
    most, space = max((float(of_space[label]), space) for space, of_space in below.items())
    return Suspect(label, space, float(np.exp(most)), confidence(most))


def confidence(below: float) -> float:
    """That a class `below` (a logarithm) the median is a backdoor's target: one half midway between the thresholds."""
    return float(1 / (1 + np.exp(-SLOPE * (below - (SUSPICIOUS + BACKDOORED) / 2))))


def judge(suspects: tuple[Suspect, ...]) -> Verdict:
    """What the strongest suspect amounts to."""
    if not suspects:
        return "no backdoor found"
    return "backdoored" if np.log(suspects[0].ratio) >= BACKDOORED else "suspicious"
