"""Which classes are suspected of being a backdoor's target: a short audit, before the first round.

A backdoor makes its target a class that a small perturbation leads to. Of several, one may be behind the others: the
audit is repeated after the rounds where more than one class stood out, or a small patch still leads to one.
"""

from dataclasses import replace

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects, standing_out
from ibau_jax.auditing.search import OnStep, Search, compile_search, run_search
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.models.inference import count_classes
from ibau_jax.perturbations import Patch, PerturbationSpace, Pixel
from ibau_jax.result import State

SCAN = AuditConfig(steps=60)
PIXEL = Pixel()


def compile_scan(
    model: nnx.Module, clean_set: Dataset, execution: Execution, space: PerturbationSpace = PIXEL
) -> Search:
    """Compiles the search for suspects, for all models of one architecture."""
    classes = count_classes(model, clean_set.images.shape[1:])
    return compile_search(model, classes, clean_set, space, SCAN, execution)


def find_hidden(
    state: State, clean_set: Dataset, config: UnlearnConfig, execution: Execution, on_step: OnStep | None = None
) -> Suspects | None:
    """The classes that are reached most easily after the rounds, one a perturbation; None where none may be hidden.

    They need not stand out: perturbations as large as some triggers lead anywhere.

    Args:
        state: after some rounds; it knows the suspects of the model as it came.
        clean_set: clean images with their true labels.
        config: says when others may be hidden.
        execution: see `ibau_jax.unlearn`.
        on_step: called with the steps done and how many there are, of each search.
    """
    if not _may_hide_others(state, clean_set, config, execution, on_step):
        return None
    scan = compile_scan(state.model, clean_set, execution)
    config = replace(config, suspects=max(config.suspects, config.perturbations))
    return find_suspects(scan, state.model, clean_set, config, on_step, rounds=len(state.rounds))


def _may_hide_others(
    state: State, clean_set: Dataset, config: UnlearnConfig, execution: Execution, on_step: OnStep | None
) -> bool:
    """Whether several stood out at first, or one does now by the smallest patch that leads to it."""
    assert state.suspects is not None
    if standing_out(state.suspects.sizes, config.suspects_min_ratio) > 1:
        return True
    if not config.hidden_min_ratio:
        return False
    scan = compile_scan(state.model, clean_set, execution, Patch())
    return standing_out(run_search(scan, state.model, clean_set, on_step).sizes, config.hidden_min_ratio) > 0


def find_suspects(
    scan: Search,
    model: nnx.Module,
    clean_set: Dataset,
    config: UnlearnConfig,
    on_step: OnStep | None = None,
    *,
    rounds: int = 0,
) -> Suspects:
    """The classes that the smallest perturbations lead to: `config.suspects`, or more: those tied or that stand out.

    Of the latter, no more than there are perturbations: what none can lead to would count as left open for ever.

    Args:
        scan: see `compile_scan`.
        model: as it came, or after some `rounds`.
        clean_set: clean images with their true labels.
        config: how many are suspected.
        on_step: called with the steps done and how many there are.
        rounds: those done.
    """
    found = run_search(scan, model, clean_set, on_step)
    tied = int(np.sum(found.sizes <= (1 + config.tied) * found.sizes.min()))
    near = max(tied, standing_out(found.sizes, config.suspects_min_ratio))
    count = max(config.suspects, min(near, config.perturbations))
    labels = np.argsort(found.sizes, kind="stable")[:count].astype(np.int32)
    return Suspects.of_search(labels, found.sizes, found.triggers[labels], rounds)
