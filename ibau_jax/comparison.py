"""Methods beside one another: what each makes of a model, and one table of all runs."""

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences import defences, get_defence
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.metrics import Metrics
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning import unlearn

OnStep = Callable[[int, int], None]
MEASURES = ("acc", "asr", "ra")
REFERENCE = "robust"  # the method that others are set beside


class Key(NamedTuple):
    """What tells a run from others; its fields are those of `Outcome`."""

    checkpoint: str
    method: str
    n_clean: int
    seed: int
    epochs: int | None


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        checkpoint, method, n_clean, seed: whose, of what, with how many clean images.
        before, after: shares in [0, 1].
        seconds: wall time with compilation, without evaluation.
        epochs: passes over the clean images where they were not the method's own.
    """

    checkpoint: str
    method: str
    n_clean: int
    seed: int
    before: Metrics
    after: Metrics
    seconds: float
    epochs: int | None = None

    @property
    def key(self) -> Key:
        """What tells it from other runs."""
        return Key(self.checkpoint, self.method, self.n_clean, self.seed, self.epochs)

    @property
    def der(self) -> float:
        """Defence effectiveness rating (Zhu et al., ICCV 2023)."""
        return effectiveness(self.before, self.after)


@dataclass(frozen=True)
class Trial:
    """What methods are tried on.

    Attributes:
        model: as it came; methods do not change it.
        clean_set: clean images with their true labels.
        measured: evaluates a model on images that do not unlearn.
    """

    model: nnx.Module
    clean_set: Dataset
    measured: Callable[[nnx.Module], Metrics]

    @cached_property
    def before(self) -> Metrics:
        """Those of the model as it came: measured once, for all methods."""
        return self.measured(self.model)


def effectiveness(before: Metrics, after: Metrics) -> float:
    """(max(0, ΔASR) − max(0, ΔACC) + 1) / 2, in [0, 1]: what the attack lost, less what accuracy lost."""
    attack = max(0.0, (before.asr or 0.0) - (after.asr or 0.0))
    return (attack - max(0.0, before.acc - after.acc) + 1) / 2


def key_of(checkpoint: str, method: str, n_clean: int, seed: int, epochs: int | None) -> Key:
    """That of a run to come; `epochs` says nothing to I-BAU."""
    return Key(checkpoint, method, n_clean, seed, None if method in PRESETS else epochs)


def method_names() -> tuple[str, ...]:
    """The presets of I-BAU and the other defences."""
    return (*PRESETS, *(one.name for one in defences()))


def check_methods(names: Iterable[str]) -> None:
    """Raises ConfigError unless all are methods."""
    for name in names:
        if name not in method_names():
            raise ConfigError(f"there is no method {name!r}; choose of {', '.join(method_names())}")


def defend(
    name: str,
    model: nnx.Module,
    clean_set: Dataset,
    seed: int,
    *,
    epochs: int | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    on_step: OnStep | None = None,
) -> tuple[nnx.Module, float]:
    """What a method makes of a model, and the seconds that it took.

    Args:
        name: a preset of I-BAU, or another defence.
        model: not changed.
        clean_set: clean images with their true labels.
        seed: of everything random in the method.
        epochs: passes over the images, of other defences; by default their own.
        execution: precision.
        on_step: called with the steps done and how many there are.
    """
    start = time.perf_counter()
    if name in PRESETS:
        config = replace(PRESETS[name], seed=seed)
        report = (lambda phase, number, done, count: on_step(done, count)) if on_step else None
        return unlearn(
            model, clean_set, config, execution=execution, on_batch=report
        ).model, time.perf_counter() - start
    defence = get_defence(name)
    tuning = defence.config(seed=seed)
    tuning = tuning.shortened(epochs) if epochs is not None else tuning
    found = defence(model, clean_set, tuning, execution=execution, on_epoch=on_step)
    return found, time.perf_counter() - start


def outcome_of(
    key: Key, trial: Trial, *, execution: Execution = DEFAULT_EXECUTION, on_step: OnStep | None = None
) -> Outcome:
    """What one run comes to.

    Args:
        key: as `Outcome.key`.
        trial: what the method is tried on.
        execution, on_step: see `defend`.
    """
    name, method, n_clean, seed, epochs = key
    found, seconds = defend(
        method, trial.model, trial.clean_set, seed, epochs=epochs, execution=execution, on_step=on_step
    )
    return Outcome(name, method, n_clean, seed, trial.before, trial.measured(found), seconds, epochs)


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for every number of clean images and method, over all checkpoints and seeds, the best DER first.

    Methods that did not have the same runs can't be compared by their means: `paired` has a method's mean DER and that
    of `REFERENCE` over the runs that both had, None where there are none.
    """
    kinds = dict.fromkeys((outcome.n_clean, outcome.method) for outcome in outcomes)
    found = []
    for n_clean, method in kinds:
        some = [outcome for outcome in outcomes if (outcome.n_clean, outcome.method) == (n_clean, method)]
        row: dict[str, Any] = {"n_clean": n_clean, "method": method, "runs": len(some)}
        for name in MEASURES:
            row |= _spread(name, [getattr(outcome.after, name) for outcome in some])
        row |= _spread("der", [outcome.der for outcome in some]) | _spread("seconds", [o.seconds for o in some])
        row["paired"] = _paired(some, [one for one in outcomes if (one.n_clean, one.method) == (n_clean, REFERENCE)])
        found.append(row)
    return sorted(found, key=lambda row: (-row["n_clean"], -row["der"]))


def _paired(some: Sequence[Outcome], reference: Sequence[Outcome]) -> tuple[float, float] | None:
    theirs = {(one.checkpoint, one.seed): one.der for one in reference}
    pairs = [(one.der, theirs[one.checkpoint, one.seed]) for one in some if (one.checkpoint, one.seed) in theirs]
    if not pairs:
        return None
    mine, other = np.mean(pairs, axis=0)
    return float(mine), float(other)


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    there = [value for value in values if value is not None]
    if not there:
        return {name: None, f"{name}_sd": None}
    return {name: float(np.mean(there)), f"{name}_sd": float(np.std(there, ddof=1)) if len(there) > 1 else 0.0}


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The table of all methods, and one of every run; shares in percent."""
    lines = [
        f"| clean images | method | runs | ACC | ASR | RA | DER | DER / {REFERENCE}'s on the same runs | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(outcomes):
        shares = [_percent(row[name], row[f"{name}_sd"]) for name in (*MEASURES, "der")]
        seconds = f"{row['seconds']:.0f} ± {row['seconds_sd']:.0f}"
        paired = " / ".join(f"{100 * der:.1f}" for der in row["paired"] or ()) or "–"
        cells = (str(row["n_clean"]), row["method"], str(row["runs"]), *shares, paired, seconds)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| checkpoint | clean images | method | seed | before: ACC / ASR / RA | after | DER | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in sorted(outcomes, key=lambda one: (one.checkpoint, -one.n_clean, one.method, one.seed)):
        method = one.method if one.epochs is None else f"{one.method}, {one.epochs} epochs"
        cells = (f"`{one.checkpoint}`", str(one.n_clean), method, str(one.seed), _figures(one.before))
        cells += (_figures(one.after), f"{100 * one.der:.1f}", f"{one.seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(mean: float | None, deviation: float | None) -> str:
    return "–" if mean is None or deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def _figures(metrics: Metrics) -> str:
    shares = (getattr(metrics, name) for name in MEASURES)
    return " / ".join("–" if share is None else f"{100 * share:.1f}" for share in shares)


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """A line a run."""
    stream = io.StringIO()
    names = ["checkpoint", "method", "n_clean", "seed", "epochs"]
    figures = [f"{when}_{name}" for when in ("before", "after") for name in (*MEASURES, "asr_all")]
    writer = csv.DictWriter(stream, [*names, *figures, "der", "seconds"], lineterminator="\n")
    writer.writeheader()
    for one in outcomes:
        shares = {
            f"{when}_{name}": value
            for when in ("before", "after")
            for name, value in asdict(getattr(one, when)).items()
            if f"{when}_{name}" in figures
        }
        writer.writerow(
            {**{name: getattr(one, name) for name in names}, **shares, "der": one.der, "seconds": one.seconds}
        )
    return stream.getvalue()
