"""Clean accuracy and what the attack still achieves, as shares in [0, 1].

ACC   images classified as their true class.
ASR   triggered images, whose true class is not the target, classified as the target (all-to-all: as label + 1).
RA    of the same images, those classified as their true class.
ASR_all counts images of the target class too, as the published code does. Of several attacks in one model each is
tried on all images, and counts alike.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from scipy.special import betaincinv

from ibau_jax.batches import make_batches, to_unit
from ibau_jax.compilation import compiler_options
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError, NotFiniteError
from ibau_jax.models.inference import NO_CLASS, classes_of, count_classes
from ibau_jax.triggers import Attack, Stamp

ENOUGH = 100  # images, below which figures are said to be uncertain
CONFIDENCE = 0.95
MAJORITY = 0.5  # share that is most images
VISIBLE = 0.5 / 255  # change of a pixel that is lost, if smaller, where an image is stored
SHARES = {"acc": "n_images", "asr": "n_triggered", "asr_all": "n_triggered_all", "ra": "n_triggered"}


@dataclass(frozen=True)
class Metrics:
    """Shares in [0, 1], and on how many images they were measured.

    Attributes:
        acc, asr, asr_all, ra: the shares; None where there is no attack, or no image that it applies to.
        n_images: images that `acc` was measured on; the counts are None where nobody counted.
        n_triggered: triggered images that `asr` and `ra` were measured on; of several attacks, the most of one.
        n_triggered_all: those that `asr_all` was measured on.
        n_classes: true classes among `n_images`.
        leads_to: another class than the target, to which the trigger takes most of the images of others.
        class_acc: `acc` of the images of each class; None for a class without images, and where nobody counted.
    """

    acc: float
    asr: float | None = None
    asr_all: float | None = None
    ra: float | None = None
    n_images: int | None = None
    n_triggered: int | None = None
    n_triggered_all: int | None = None
    n_classes: int | None = None
    leads_to: int | None = None
    class_acc: tuple[float | None, ...] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Metrics":
        """The figures in a record that may hold more, such as a round of result.json.

        Raises:
            KeyError, TypeError, ValueError: one is missing, or is no share or no number of images.
        """
        counts: dict[str, Any] = {
            field.name: record.get(field.name) for field in fields(cls) if field.name not in (*SHARES, "class_acc")
        }
        shares = {name: record[name] for name in SHARES}
        class_acc = None if record.get("class_acc") is None else tuple(record["class_acc"])
        if not all(type(count) in (int, NoneType) and (count is None or count >= 0) for count in counts.values()):
            raise ValueError("a number of images is none")
        if not all(share is None or 0 <= share <= 1 for share in (*shares.values(), *(class_acc or ()))):
            raise ValueError("a share is not between 0 and 1")
        if shares["acc"] is None:
            raise ValueError("the accuracy is none")
        return cls(**shares, **counts, class_acc=class_acc)

    @property
    def doubt_of_target(self) -> str | None:
        """Says of the original model that its trigger leads elsewhere than was named."""
        if self.leads_to is None:
            return None
        return f"the trigger takes most images to class {self.leads_to}, not to its target: check --target-label"

    @property
    def fewest(self) -> int | None:
        """The smaller number of the images that `acc` and `asr` were measured on; None where nobody counted."""
        counts = [count for count in (self.n_images, self.n_triggered) if count is not None]
        return min(counts) if counts else None

    def interval(self, name: str) -> tuple[float, float] | None:
        """The confidence interval of a share; None where there is none, or nobody counted the images."""
        share, count = getattr(self, name), getattr(self, SHARES[name])
        if share is None or not count or not math.isfinite(share):
            return None
        return confidence_interval(share, count)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Those of all shares that have one, by name."""
        found = {name: self.interval(name) for name in SHARES}
        return {name: interval for name, interval in found.items() if interval is not None}


def confidence_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share that was measured on `count` images.

    It is the one of Clopper and Pearson (1934): never narrower than it says, also of few images and of shares near
    0 and 1. Images are taken for independent draws of those that the model will see.
    """
    hits, tail = round(share * count), (1 - CONFIDENCE) / 2
    low = betaincinv(hits, count - hits + 1, tail) if hits else 0.0
    high = betaincinv(hits + 1, count - hits, 1 - tail) if hits < count else 1.0
    return float(low), float(high)


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
    right = predict(model, dataset, batch_size=batch_size) == dataset.labels
    class_acc = tuple(_share(right[dataset.labels == label]) for label in range(num_classes))
    seen = len(np.unique(dataset.labels))
    plain = Metrics(float(np.mean(right)), n_images=len(dataset), n_classes=seen, class_acc=class_acc)
    if attack is None:
        return plain
    outcomes = []
    for part in attack.aimed_at(target_label).parts(num_classes):
        victims = part.victims(dataset)
        victims.check_fits(dataset.images.shape[1:], num_classes)
        triggered = predict(model, victims, part.stamp, batch_size=batch_size)
        outcomes.append((triggered, part.targets(victims.labels, num_classes), victims.labels))
    triggered, targets, labels = (np.concatenate(arrays) for arrays in zip(*outcomes, strict=True))
    counted = targets != labels
    elsewhere = [
        _elsewhere(*outcome) for outcome, part in zip(outcomes, attack.each, strict=True) if not part.all_to_all
    ]
    return replace(
        plain,
        asr=_share(triggered[counted] == targets[counted]),
        asr_all=_share(triggered == targets),
        ra=_share(triggered[counted] == labels[counted]),
        # Several attacks are tried on the same images, which are no more independent for that.
        n_triggered=max(int(np.count_nonzero(aims != true)) for _, aims, true in outcomes),
        n_triggered_all=max(len(true) for *_, true in outcomes),
        leads_to=next((label for label in elsewhere if label is not None), None),
    )


def _elsewhere(
    triggered: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> int | None:
    """Finds the class, neither target nor label, that most of the other classes' triggered images are given."""
    others = (labels != targets) & (triggered >= 0)
    classes, counts = np.unique(triggered[others & (triggered != targets) & (triggered != labels)], return_counts=True)
    if not len(counts):
        return None
    label = int(classes[np.argmax(counts)])
    return label if counts.max() > MAJORITY * np.count_nonzero(others & (labels != label)) else None


def check_measurable(attack: Attack, dataset: Dataset, num_classes: int) -> None:
    """Raises DataError where an attack can't be measured: all images are of the class that it aims at, or its trigger
    changes none of them.

    Args:
        attack: with its target.
        dataset: the images that evaluate.
        num_classes: of the model.
    """
    for part in attack.parts(num_classes):
        labels = part.victims(dataset).labels
        if not len(labels):
            raise DataError(f"there is no image to measure {part.description} on")
        if np.all(part.targets(labels, num_classes) == labels):
            raise DataError(
                f"no image is left to measure {part.description} on: all {len(labels)} images that evaluate are of the "
                "target class; choose images of other classes too"
            )
        if part.stamp is not None and not _shows(part.stamp, dataset.first(ENOUGH).images):
            raise DataError(
                f"the trigger of {part.description} changes no pixel of the first {min(ENOUGH, len(dataset))} images "
                "that evaluate by a level of 255, so that nothing can be measured with it; check the trigger"
            )


def _shows(stamp: Stamp, images: np.ndarray) -> bool:
    """Says whether a trigger changes images that are stored as 8 bits."""
    unit = np.asarray(to_unit(jnp.asarray(images)))
    return bool(np.abs(np.asarray(stamp(unit)) - unit).max() >= VISIBLE)


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
