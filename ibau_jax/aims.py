"""What the perturbations of a round aim at: away from the labels, as published, or towards suspected targets.

Targeted ones are larger than the smallest that does it: what an attacker stamps is no optimum, and takes more room.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ibau_jax.batches import AnyArray
from ibau_jax.config import UnlearnConfig

AWAY = -1
ROUNDS = 2**31  # keys for norms are others than those for the images that are perturbed


class Aims(NamedTuple):
    """Of the perturbations of a round.

    Attributes:
        target: the class that each leads to, or -1: away from the images' labels.
        radius: of the l2 ball that each is projected onto; infinite where there is none.
    """

    target: Int[AnyArray, " s"]
    radius: Float[AnyArray, " s"]


@dataclass(frozen=True)
class Suspects:
    """Classes that may be a backdoor's target, the likeliest first.

    Attributes:
        labels: the classes.
        norms: l2 norms of the smallest perturbations that lead most images to them.
    """

    labels: Int[np.ndarray, " t"]
    norms: Float[np.ndarray, " t"]


def aims_of_round(config: UnlearnConfig, suspects: Suspects | None, number: int) -> Aims:
    """The published perturbation; or the targeted ones: suspects in turn, norms drawn anew for each round."""
    if suspects is None:
        bound = np.inf if config.norm_bound is None else config.norm_bound
        return Aims(np.full(1, AWAY, np.int32), np.full(1, bound, np.float32))
    key = jax.random.fold_in(jax.random.key(config.seed), ROUNDS + number)
    which = np.arange(config.targeted) % len(suspects.labels)
    low, high = config.reach
    times = np.asarray(jax.random.uniform(key, (config.targeted,), minval=low, maxval=high))
    return Aims(suspects.labels[which], (suspects.norms[which] * times).astype(np.float32))


def in_turn(images: int, perturbations: int) -> Int[Array, " n"]:
    """Which perturbation each image of a batch goes with where all do: one after the other."""
    return jnp.arange(images) % perturbations
