"""What a report shows beside the figures of a run: predictions of both models on images that did not unlearn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ibau_jax.batches import to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.metrics import predict, predict_where_finite
from ibau_jax.models.inference import NO_CLASS
from ibau_jax.perturbations import Pixel
from ibau_jax.triggers import Attack, planted
from ibau_jax.unlearning import Round
from ibau_jax.unlearning.state import that_found

EXAMPLES, TRIED = 8, 500


@dataclass(frozen=True)
class Pair:
    """Something of the model as it came and of the cleaned one."""

    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Example:
    """An image, with and without the trigger, float (h, w, c) in [0, 1], and the classes that the models give each."""

    label: int
    clean: Float[np.ndarray, "h w c"] = field(repr=False)
    triggered: Float[np.ndarray, "h w c"] = field(repr=False)
    clean_classes: tuple[int, int]
    triggered_classes: tuple[int, int]


@dataclass(frozen=True)
class Unlearned:
    """A perturbation of a round.

    Attributes:
        round: its number.
        perturbation: δ, float (h, w, c).
        share: of images of other classes that it takes to each class.
    """

    round: int
    perturbation: Float[np.ndarray, "h w c"] = field(repr=False)
    share: Pair


@dataclass(frozen=True)
class Evidence:
    """All of it.

    Attributes:
        counts: evaluation images of each class.
        unlearned: every perturbation, with the round that found it.
        examples: where the trigger is known.
    """

    counts: Int[np.ndarray, " classes"]
    unlearned: list[Unlearned]
    examples: list[Example]


def gather(
    before: nnx.Module,
    after: nnx.Module,
    images: Dataset,
    classes: int,
    rounds: tuple[Round, ...],
    config: UnlearnConfig,
    attack: Attack | None,
) -> Evidence:
    """Tries both models on `images`, which did not unlearn; perturbations on 500 of them."""
    models, some = (before, after), images.sample(TRIED, config.seed)
    unlearned = [
        Unlearned(done.number, delta, Pair(*(_shares(model, some, delta, config.clip, classes) for model in models)))
        for done in that_found(rounds)
        for delta in done.perturbation
    ]
    parts = attack.parts(classes) if attack else ()
    return Evidence(np.bincount(images.labels, minlength=classes), unlearned, _examples(models, images, parts, classes))


def _shares(model: nnx.Module, images: Dataset, delta: np.ndarray, clip: bool, classes: int) -> np.ndarray:
    moved = np.asarray(Pixel(clip).apply(jnp.asarray(delta), to_unit(jnp.asarray(images.images))))
    found = predict_where_finite(model, Dataset(moved, images.labels))  # δ may be so large that logits overflow
    others = len(images) - np.bincount(images.labels, minlength=classes)
    taken = np.bincount(found[(found != images.labels) & (found != NO_CLASS)], minlength=classes)
    return np.asarray(taken / np.maximum(others, 1))


def _examples(
    models: tuple[nnx.Module, nnx.Module], images: Dataset, parts: Sequence[Attack], classes: int
) -> list[Example]:
    if not parts or parts[0].stamp is None:
        return []
    meant = np.any([part.targets(images.labels, classes) == images.labels for part in parts], axis=0)
    chosen = images.take(np.flatnonzero(~meant)[:EXAMPLES])
    clean = np.asarray(to_unit(jnp.asarray(chosen.images)))
    triggered, _ = planted(clean, chosen.labels, parts, classes)
    said = [[predict(model, Dataset(some, chosen.labels)) for model in models] for some in (clean, triggered)]
    return [
        Example(
            int(chosen.labels[index]),
            clean[index],
            triggered[index],
            (int(said[0][0][index]), int(said[0][1][index])),
            (int(said[1][0][index]), int(said[1][1][index])),
        )
        for index in range(len(chosen))
    ]
