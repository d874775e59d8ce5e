"""Which classes are suspected of being a backdoor's target: a short audit, before the first round.

A backdoor makes its target a class that a small perturbation leads to. Of several, one may be behind the others: where
more than one class stands out the audit is repeated after the rounds.
"""

from collections.abc import Callable

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects, standing_out
from ibau_jax.auditing.search import Search, compile_search, run_search
from ibau_jax.auditing.views import PERTURBATION
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.models.inference import count_classes

SCAN = AuditConfig(steps=60)


def compile_scan(model: nnx.Module, clean_set: Dataset, execution: Execution) -> Search:
    """Compiles the search for suspects, for all models of one architecture."""
    classes = count_classes(model, clean_set.images.shape[1:])
    return compile_search(model, classes, clean_set, PERTURBATION, SCAN, execution)


def find_suspects(
    scan: Search,
    model: nnx.Module,
    clean_set: Dataset,
    config: UnlearnConfig,
    on_step: Callable[[int, int], None] | None = None,
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
    return Suspects.of_search(labels, found.sizes, found.triggers[labels, 0], rounds)
