"""What targeted perturbations aim at: suspected classes. (Untargeted ones lead away from the labels.)

They are larger than the smallest that does it: what an attacker stamps is no optimum, and takes more room.
"""

from dataclasses import dataclass, field, replace
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
        sizes: l2 norms of the smallest perturbations that lead most images to each class of the model.
        perturbations: those that lead to the suspects, in units of the image range.
    """

    labels: Int[np.ndarray, " t"]
    sizes: Float[np.ndarray, " classes"]
    perturbations: Float[np.ndarray, "t h w c"] = field(repr=False)

    @property
    def norms(self) -> Float[np.ndarray, " t"]:
        """Those of the suspects' perturbations."""
        return self.sizes[self.labels]

    @property
    def ratio(self) -> float:
        """How many times smaller the first suspect's perturbation is than the median class's."""
        return float(np.median(self.sizes) / self.norms[0])


def adapted(config: UnlearnConfig, suspects: Suspects) -> UnlearnConfig:
    """The configuration with what depends on the suspects settled.

    Where one stands out, targeted perturbations close its short cut, and untargeted ones, which find the same short
    cut, go so far beyond it that nothing in the image is left to learn from. Targeted ones close it at once, but what
    an attacker stamps is larger: there is no early end then.
    """
    if config.untargeted_reach:
        radius = config.untargeted_reach * float(suspects.norms[0])
        config = replace(config, norm_bound=min(config.norm_bound or radius, radius))
    if config.untargeted_max_ratio and suspects.ratio > config.untargeted_max_ratio:
        config = replace(config, untargeted_rounds=0, min_rounds=max(config.min_rounds, config.n_rounds))
    low, high = config.sure_ratios or (np.inf, np.inf)
    if low < suspects.ratio < high and config.more_rounds:
        count, left = config.n_rounds + 1, config.more_rounds - 1
        config = replace(config, n_rounds=count, more_rounds=left, min_rounds=count, sure_ratios=None)
    return config


def aims_of_round(config: UnlearnConfig, suspects: Suspects, number: int) -> Aims:
    """The suspects in turn, with norms drawn anew for each round."""
    key = jax.random.fold_in(jax.random.key(config.seed), ROUNDS + number)
    which = np.arange(config.perturbations) % len(suspects.labels)
    low, high = config.reach
    times = np.asarray(jax.random.uniform(key, (config.perturbations,), minval=low, maxval=high))
    return Aims(suspects.labels[which], (suspects.norms[which] * times).astype(np.float32))
