"""The audit of a model: the smallest trigger for every class in every space, and the verdict on their sizes."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ibau_jax.auditing.judgement import UNDECIDED, Suspect, Verdict, anomaly_index, find_suspects, judge, ratios
from ibau_jax.auditing.search import Search, SmallestTriggers, compile_search, measure, run_search
from ibau_jax.config import AuditConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import structure
from ibau_jax.metrics import ENOUGH, MAJORITY, confidence_interval, predict
from ibau_jax.models.inference import count_classes
from ibau_jax.perturbations import SPACES, Perturbation, PerturbationSpace, Shape

OnStep = Callable[[str, int, int], None]
MIN_IMAGES = 10  # to search on, and as many to measure on
MIN_OTHERS = 5  # of them of other classes than any one: a trigger is searched on those


@dataclass(frozen=True)
class SpaceFindings:
    """What one space shows, a number a class, and last one for any other class than an image's own.

    Attributes:
        space: what was searched.
        smallest: the triggers that take the share `AuditConfig.success` of other classes' images there.
        success: share of held-out images of other classes that follow it, in [0, 1]; NaN where the search was not
            finished.
        earlier: share of held-out images of other classes that follow an earlier audit's triggers, if there was one;
            NaN where that had none.
    """

    space: PerturbationSpace
    smallest: SmallestTriggers
    success: Float[np.ndarray, " aims"]
    earlier: Float[np.ndarray, " aims"] | None = None

    @property
    def sizes(self) -> Float[np.ndarray, " aims"]:
        """Of the triggers, in the space's unit."""
        return self.smallest.sizes

    @property
    def triggers(self) -> Perturbation:
        """The triggers, a pytree of arrays with a leading axis of aims."""
        return self.smallest.triggers

    @property
    def ratios(self) -> Float[np.ndarray, " aims"]:
        """See `ibau_jax.auditing.judgement.ratios`."""
        return ratios(self.sizes)

    @property
    def anomaly_index(self) -> Float[np.ndarray, " aims"]:
        """See `ibau_jax.auditing.judgement.anomaly_index`."""
        return anomaly_index(self.sizes)


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        verdict: `backdoored`, `suspicious`, `no backdoor found` or `not enough images to say`.
        suspects: what stands out, the likeliest target first.
        spaces: by name.
        shape: of the images.
        seconds: wall time, without compiling the search.
        n_searched, n_measured: how many images the triggers were searched and measured on.
        config: its constants.
    """

    verdict: Verdict
    suspects: tuple[Suspect, ...]
    spaces: dict[str, SpaceFindings] = field(repr=False)
    shape: Shape
    seconds: float
    n_searched: int
    n_measured: int
    config: AuditConfig

    def smallest(self) -> dict[str, SmallestTriggers]:
        """Collects the smallest triggers by space."""
        return {name: findings.smallest for name, findings in self.spaces.items()}


class Auditor:
    """Audits models; what it compiled for one serves all others of its architecture, on images of the same size."""

    def __init__(self, config: AuditConfig | None = None, execution: Execution = DEFAULT_EXECUTION) -> None:
        self.config, self.execution = config or AuditConfig(), execution
        self._compiled: dict[Any, dict[str, Search]] = {}

    def __call__(
        self,
        model: nnx.Module,
        images: Dataset,
        held_out: Dataset | None = None,
        on_step: OnStep | None = None,
        earlier: Audit | None = None,
    ) -> Audit:
        """Audits a model.

        Args:
            model: see `ibau_jax.unlearn`.
            images: clean images with their true labels.
            held_out: others, to measure on; by default a half of `images`.
            on_step: called with a space's name, the steps done and how many there are.
            earlier: of another model of this architecture: how many images still follow its triggers is measured too.

        Raises:
            DataError: there are fewer than 10 images to search or to measure on, or fewer than 5 of them of other
                classes than the commonest, or they do not fit the model.
            NotFiniteError: the model computes NaN or infinity for some image, with a trigger or without.
        """
        searched, measured = self._divided(images, held_out)
        classes = count_classes(model, images.images.shape[1:])
        for some in (searched, measured):
            some.check_fits(images.images.shape[1:], classes)
            _check_others(some)
        searches = self._searches(model, searched, SPACES)
        start = time.perf_counter()
        found = _run_all(searches, model, searched, on_step)
        own = predict(model, measured)
        spaces = {
            name: _findings(search, found[name], model, measured, own, earlier) for name, search in searches.items()
        }
        suspects = find_suspects({name: findings.sizes for name, findings in spaces.items()})
        verdict = _verdict(suspects, spaces, searched, measured)
        seconds = time.perf_counter() - start
        shape = images.images.shape[1:]
        return Audit(verdict, suspects, spaces, shape, seconds, len(searched), len(measured), self.config)

    def search(
        self, model: nnx.Module, images: Dataset, spaces: Collection[str] = SPACES.keys(), on_step: OnStep | None = None
    ) -> dict[str, SmallestTriggers]:
        """Finds the smallest triggers, by space, as an audit does, but measures nothing and judges nothing.

        Raises:
            NotFiniteError: the model computes NaN or infinity with a trigger.
        """
        some = self._to_search(images, self._order(images))
        return _run_all(self._searches(model, some, spaces), model, some, on_step)

    def _order(self, images: Dataset) -> Int[np.ndarray, " n"]:
        return np.random.default_rng(self.config.seed).permutation(len(images))

    def _to_search(self, images: Dataset, order: Int[np.ndarray, " n"]) -> Dataset:
        """Takes the first that a search looks at, of no class more than of all others, unless too few are left.

        A class's trigger is searched on images of others; one that has to lead only few of them is too small.
        """
        labels = images.labels[order]
        values, counts = np.unique(labels, return_counts=True)
        commonest = labels == values[counts.argmax()]
        others = np.count_nonzero(~commonest)
        most = max(min(others, self.config.search_images // 2), self.config.batch_size - others)
        kept = ~commonest | (np.cumsum(commonest) <= most)
        return images.take(order[kept][: self.config.search_images])

    def _divided(self, images: Dataset, held_out: Dataset | None) -> tuple[Dataset, Dataset]:
        order = self._order(images)
        half = len(images) // 2
        rest = order[:half] if held_out is None else self._order(held_out)
        some = order[half:] if held_out is None else order
        if min(len(some), len(rest)) < MIN_IMAGES:
            raise DataError(
                f"an audit takes {MIN_IMAGES} clean images to search on and {MIN_IMAGES} others to measure on, "
                f"not {len(some)} and {len(rest)}"
            )
        measured = (held_out or images).take(rest[: self.config.held_out_images])
        return self._to_search(images, some), measured

    def _searches(self, model: nnx.Module, images: Dataset, spaces: Collection[str]) -> dict[str, Search]:
        shape, batch = images.images.shape[1:], min(len(images), self.config.batch_size)
        searches = self._compiled.setdefault((structure(model), shape, images.images.dtype, batch), {})
        for name in spaces:
            if name not in searches:
                classes = count_classes(model, shape)
                searches[name] = compile_search(model, classes, images, SPACES[name], self.config, self.execution)
        return {name: searches[name] for name in spaces}


def _run_all(
    searches: dict[str, Search], model: nnx.Module, images: Dataset, on_step: OnStep | None
) -> dict[str, SmallestTriggers]:
    own = predict(model, images)
    return {
        name: run_search(search, model, images, partial(on_step, name) if on_step else None, own)
        for name, search in searches.items()
    }


def _check_others(images: Dataset) -> None:
    """Raises DataError where a class has too few images of other classes, which its trigger is searched on."""
    label = int(np.bincount(images.labels).argmax())
    others = int(np.count_nonzero(images.labels != label))
    if others < MIN_OTHERS:
        raise DataError(
            f"an audit takes images of several classes: {len(images) - others} of {len(images)} are of class {label}"
        )


def _verdict(
    suspects: tuple[Suspect, ...], spaces: dict[str, SpaceFindings], searched: Dataset, measured: Dataset
) -> Verdict:
    """The verdict; of few images only what most images that did not search confirm."""
    if min(len(searched), len(measured)) >= ENOUGH:
        return judge(suspects)
    confirmed = tuple(one for one in suspects if _confirmed(one, spaces, measured))
    return judge(confirmed) if confirmed else UNDECIDED


def _confirmed(suspect: Suspect, spaces: dict[str, SpaceFindings], measured: Dataset) -> bool:
    """Says whether most images surely follow."""
    share = float(spaces[suspect.space].success[suspect.index])
    others = len(measured) if suspect.label is None else int(np.count_nonzero(measured.labels != suspect.label))
    return not np.isnan(share) and confidence_interval(share, others)[0] >= MAJORITY


def _findings(
    search: Search,
    smallest: SmallestTriggers,
    model: nnx.Module,
    measured: Dataset,
    own: Int[np.ndarray, " n"],
    earlier: Audit | None,
) -> SpaceFindings:
    success = measure(search, model, smallest.triggers, measured, smallest.finished, own)
    if earlier is None:
        return SpaceFindings(search.space, smallest, success)
    before = earlier.spaces[search.space.name].smallest
    still = measure(search, model, before.triggers, measured, before.finished, own)
    return SpaceFindings(search.space, smallest, success, still)


def audit(
    model: nnx.Module,
    images: Dataset,
    config: AuditConfig | None = None,
    *,
    held_out: Dataset | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Audit:
    """Audits one model: see `Auditor`."""
    return Auditor(config, execution)(model, images, held_out)
