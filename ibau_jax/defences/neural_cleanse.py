"""NC: Neural Cleanse, the part that mends (Wang et al., IEEE S&P 2019).

The smallest patch for every class is searched for; classes whose patch is an outlier are suspected, and the model is
fine-tuned with their patches on a fifth of the images, which keep their labels.

The search is the audit's (`ibau_jax.auditing`), not the paper's: it needs a hundred steps where that needs thousands.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.auditing.judgement import anomaly_index
from ibau_jax.auditing.search import compile_search, run_search
from ibau_jax.config import AuditConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import (
    Gradient,
    Images,
    OnEpoch,
    Sample,
    Slope,
    TuneConfig,
    cross_entropy_gradient,
    tuned,
)
from ibau_jax.execution import Execution
from ibau_jax.functional import Run, Weights
from ibau_jax.models.inference import count_classes
from ibau_jax.perturbations import MaskAndPattern, Patch


@dataclass(frozen=True)
class CleanseConfig(TuneConfig):
    """The paper's anomaly index and share of patched images, BackdoorBench's fine-tuning."""

    outlier: float = 2.0
    """anomaly index from which a class is suspected"""
    patched: float = 0.2
    """share of each batch that gets a patch"""
    steps: int = 100
    """of the search"""


def suspected_patches(
    model: nnx.Module, clean_set: Dataset, config: CleanseConfig, execution: Execution
) -> list[MaskAndPattern]:
    """The smallest patches of the classes whose patch is an outlier, the smallest first."""
    classes = count_classes(model, clean_set.images.shape[1:])
    search = compile_search(
        model, classes, clean_set, Patch(), AuditConfig(steps=config.steps, seed=config.seed), execution
    )
    found = run_search(search, model, clean_set)
    index = anomaly_index(found.sizes)
    labels = [label for label in np.argsort(found.sizes[:classes]) if index[label] > config.outlier]
    return [jax.tree.map(lambda array, label=label: jnp.asarray(array[label]), found.triggers) for label in labels]


def patched_gradient(run: Run, patches: list[MaskAndPattern], share: float) -> Gradient:
    """That of cross-entropy, with patches in turn on the first images of a batch, which is in random order."""
    plain = cross_entropy_gradient(run)

    def stamped(images: Images) -> Images:
        for index, patch in enumerate(patches):
            turn = slice(index, int(share * len(images)), len(patches))
            images = images.at[turn].set(Patch().apply(patch, images[turn]))
        return images

    def gradient(weights: Weights, sample: Sample, before: Weights) -> Slope:
        return plain(weights, sample._replace(images=stamped(sample.images)), before)

    return gradient


@defence("nc", "Wang et al., Neural Cleanse, IEEE S&P 2019", CleanseConfig)
def neural_cleanse(
    model: nnx.Module, clean_set: Dataset, config: CleanseConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Unlearns the patches of suspected classes; where there are none the model stays as it is."""
    patches = suspected_patches(model, clean_set, config, execution)
    if not patches:
        return model
    return tuned(
        model, clean_set, config, lambda run: patched_gradient(run, patches, config.patched), execution, on_epoch
    )
