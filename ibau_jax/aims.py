"""What targeted perturbations aim at: suspected classes. (The published one leads away from the labels.)

They are larger than the smallest that does it: what an attacker stamps is no optimum, and takes more room.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from ibau_jax.batches import AnyArray
from ibau_jax.config import UnlearnConfig

ROUNDS = 2**31  # keys for norms are others than those for the images that are perturbed


class Aims(NamedTuple):
    """Of the targeted perturbations of a round.

    Attributes:
        target: the class that each leads to.
        radius: of the l2 ball that each is projected onto.
    """

    target: Int[AnyArray, " s"]
    radius: Float[AnyArray, " s"]


@dataclass(frozen=True)
class Suspects:
    """Classes that may be a backdoor's target, the likeliest first.

    Attributes:
        labels: the classes.
        norms: l2 norms of the smallest perturbations that lead most images to them.
        perturbations: those perturbations, in units of the image range.
    """

    labels: Int[np.ndarray, " t"]
    norms: Float[np.ndarray, " t"]
    perturbations: Float[np.ndarray, "t h w c"] = field(repr=False)


def aims_of_round(config: UnlearnConfig, suspects: Suspects, number: int) -> Aims:
    """The suspects in turn, with norms drawn anew for each round."""
    key = jax.random.fold_in(jax.random.key(config.seed), ROUNDS + number)
    which = np.arange(config.targeted) % len(suspects.labels)
    low, high = config.reach
    times = np.asarray(jax.random.uniform(key, (config.targeted,), minval=low, maxval=high))
    return Aims(suspects.labels[which], (suspects.norms[which] * times).astype(np.float32))
