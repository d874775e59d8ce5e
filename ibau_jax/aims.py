"""What targeted perturbations aim at: suspected classes. (Untargeted ones lead away from the labels.)

They are larger than the smallest that does it: what an attacker stamps is no optimum, and takes more room.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from ibau_jax.auditing.judgement import median_size
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

    A second search, after some rounds, may have found more: they follow.

    Attributes:
        labels: the classes.
        sizes: l2 norms of the smallest perturbations that lead most images to each class of the model as it came.
        perturbations: those that lead to the suspects, of the model that was searched, in units of the image range.
        norms: l2 norms of the smallest perturbations that lead to the suspects, of that model.
        found_after: rounds that were done when each was found.
    """

    labels: Int[np.ndarray, " t"]
    sizes: Float[np.ndarray, " classes"]
    perturbations: Float[np.ndarray, "t h w c"] = field(repr=False)
    norms: Float[np.ndarray, " t"]
    found_after: Int[np.ndarray, " t"]

    @classmethod
    def of_search(
        cls,
        labels: Int[np.ndarray, " t"],
        sizes: Float[np.ndarray, " classes"],
        perturbations: Float[np.ndarray, "t h w c"],
        rounds: int = 0,
    ) -> "Suspects":
        """Those of one search, after so many rounds; `sizes` are those of all classes."""
        return cls(labels, sizes, perturbations, sizes[labels], np.full(len(labels), rounds, np.int32))

    def and_more(self, later: "Suspects") -> "Suspects":
        """These, and those of a later search."""
        per_suspect = ("labels", "perturbations", "norms", "found_after")
        return replace(
            self, **{name: np.concatenate([getattr(self, name), getattr(later, name)]) for name in per_suspect}
        )

    def known_to(self, number: int) -> "Suspects":
        """Those that were found before a round."""
        return self._where(self.found_after < number)

    def found_before(self, number: int) -> list[int]:
        """The classes of those that were found right before a round."""
        return [int(label) for label in self.labels[self.found_after == number - 1]]

    @property
    def first(self) -> "Suspects":
        """Those of the model as it came."""
        return self._where(self.found_after == 0)

    @property
    def latest(self) -> "Suspects":
        """Those of the last search."""
        return self._where(self.found_after == self.found_after.max())

    def _where(self, chosen: Bool[np.ndarray, " t"]) -> "Suspects":
        arrays = (self.labels, self.perturbations, self.norms, self.found_after)
        labels, perturbations, norms, found_after = (array[chosen] for array in arrays)
        return Suspects(labels, self.sizes, perturbations, norms, found_after)

    @property
    def ratio(self) -> float:
        """How many times smaller the first suspect's perturbation is than the median class's."""
        return median_size(self.sizes) / float(self.norms[0])


def standing_out(sizes: Float[np.ndarray, " classes"], min_ratio: float | None) -> int:
    """Classes that are reached so many times as easily as the median class; 0 without a ratio."""
    return int(np.sum(median_size(sizes) > (min_ratio or np.inf) * sizes))


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
    """The suspects of the last search in turn, with norms drawn anew for each round."""
    aimed_at = suspects.known_to(number).latest
    key = jax.random.fold_in(jax.random.key(config.seed), ROUNDS + number)
    which = np.arange(config.perturbations) % len(aimed_at.labels)
    low, high = config.reach
    times = np.asarray(jax.random.uniform(key, (config.perturbations,), minval=low, maxval=high))
    return Aims(aimed_at.labels[which], (aimed_at.norms[which] * times).astype(np.float32))
