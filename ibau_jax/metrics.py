"""Clean accuracy and what the attack still achieves, as shares in [0, 1].

ACC   images classified as their true class.
ASR   triggered images, whose true class is not the target, classified as the target (all-to-all: as label + 1).
RA    of the same images, those classified as their true class.
ASR_all counts images of the target class too, as the published code does. Of several attacks in one model each is
tried on all images, and counts alike.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from ibau_jax.batches import make_batches, to_unit
from ibau_jax.compilation import compiler_options
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.models.inference import NO_CLASS, classes_of, count_classes
from ibau_jax.triggers import Attack, Stamp


@dataclass(frozen=True)
class Metrics:
    """Shares in [0, 1]; None where there is no attack, or no image that it applies to."""

    acc: float
    asr: float | None = None
    asr_all: float | None = None
    ra: float | None = None


def evaluate(
    model: nnx.Module,
    dataset: Dataset,
    attack: Attack | None = None,
    target_label: int | None = None,
    *,
    batch_size: int = 200,
) -> Metrics:
    """Evaluates a model on images that did not unlearn it.

    Args:
        model: maps images, float32 (n, h, w, c) in [0, 1], to logits (n, classes).
        dataset: clean images with their true labels.
        attack: the trigger to test, if known.
        target_label: the class it aims at, where the attack does not say so itself; nothing to an all-to-all one.
        batch_size: images at a time.

    Raises:
        DataError: there are no images, or a label is no class of the model.
        ConfigError: the attack needs a target label and has none, or one that is no class.
        NotFiniteError: the model's logits are NaN or infinite for some image, with the trigger or without.
    """
    num_classes = count_classes(model, dataset.images.shape[1:])
    dataset.check_fits(dataset.images.shape[1:], num_classes)
    acc = float(np.mean(predict(model, dataset, batch_size=batch_size) == dataset.labels))
    if attack is None:
        return Metrics(acc)
    outcomes = []
    for part in attack.aimed_at(target_label).parts(num_classes):
        victims = part.victims(dataset)
        victims.check_fits(dataset.images.shape[1:], num_classes)
        triggered = predict(model, victims, part.stamp, batch_size=batch_size)
        outcomes.append((triggered, part.targets(victims.labels, num_classes), victims.labels))
    triggered, targets, labels = (np.concatenate(arrays) for arrays in zip(*outcomes, strict=True))
    counted = targets != labels
    return Metrics(
        acc,
        asr=_share(triggered[counted] == targets[counted]),
        asr_all=_share(triggered == targets),
        ra=_share(triggered[counted] == labels[counted]),
    )


def predict(model: nnx.Module, dataset: Dataset, stamp: Stamp | None = None, *, batch_size: int = 200) -> np.ndarray:
    """The class that the model gives each image, triggered where there is a `stamp`: int (n,).

    Raises:
        NotFiniteError: the logits of an image are NaN or infinite.
    """
    predicted = predict_where_finite(model, dataset, stamp, batch_size=batch_size)
    broken = int(np.sum(predicted == NO_CLASS))
    if broken:
        triggered = " with the trigger" if stamp else ""
        raise NotFiniteError(
            f"the logits of {broken} of {len(dataset)} images of {dataset.name}{triggered} are not finite (NaN or "
            "infinity): the model computes no class for them, and no figure or verdict can be had of it"
        )
    return predicted


def predict_where_finite(
    model: nnx.Module, dataset: Dataset, stamp: Stamp | None = None, *, batch_size: int = 200
) -> np.ndarray:
    """As `predict`, but -1 for images whose logits are NaN or infinite."""
    graph, state = nnx.split(model)
    batches = make_batches(dataset, batch_size)
    predictor = _predictor()
    predicted = [np.asarray(predictor(graph, stamp, state, images)) for images in batches.images]
    return np.concatenate(predicted)[: len(dataset)]


@functools.cache
def _predictor() -> Callable[..., jax.Array]:
    def classes(graph: nnx.GraphDef, stamp: Stamp | None, state: nnx.State, images: jax.Array) -> jax.Array:
        unit = to_unit(images)
        with jax.default_matmul_precision("highest"):  # figures do not depend on what a GPU would take for float32
            logits = nnx.merge(graph, state)(unit if stamp is None else stamp(unit))
        return classes_of(logits)

    return jax.jit(classes, static_argnums=(0, 1), compiler_options=compiler_options())


def _share(hits: np.ndarray) -> float | None:
    return float(np.mean(hits)) if hits.size else None
