"""Which classes are suspected of being a backdoor's target: a short audit, before the first round.

A backdoor makes its target a class that a small perturbation leads to.
"""

from collections.abc import Callable

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects
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
) -> Suspects:
    """The classes that the smallest perturbations lead to: as many as `config.suspects`, or more that are tied.

    Of tied ones, no more than there are perturbations: what none can lead to would count as left open for ever.
    """
    found = run_search(scan, model, clean_set, on_step)
    tied = int(np.sum(found.sizes <= (1 + config.tied) * found.sizes.min()))
    labels = np.argsort(found.sizes, kind="stable")[: max(config.suspects, min(tied, config.perturbations))]
    return Suspects(labels.astype(np.int32), found.sizes, found.triggers[labels, 0])
