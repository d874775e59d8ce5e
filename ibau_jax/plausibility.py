"""Do labelled images belong to a model? Asked of the original model, before any long work.

A model that is worth cleaning classifies clean images well, poisoned or not. Where it does not, the mistake mostly lies
in what it is given: labels in another order, another normalisation, blue first. Each such explanation is a second
series of hits and misses on the same images, and two series are compared by a paired test (McNemar, 1947). All classes
count alike, so that a model that says one class of everything gains nothing by it. From few images, or from images of
one class, nothing is concluded, though a low accuracy is told.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from ibau_jax.batches import to_unit
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import and_more
from ibau_jax.metrics import predict, predict_where_finite
from ibau_jax.models.inference import count_classes
from ibau_jax.models.normalized import NORMALIZATIONS, Normalization

Labels = Int[np.ndarray, " n"]
Hits = Bool[np.ndarray, " n"]

IMAGES = 1000  # that are looked at, at most
TRIED = 200  # of them, those that are given to the model in other forms: one batch of `predict`
SURE = 3.0  # standard errors
EXPLAINED = 0.25  # share of the misses, among the images that it is about, that an explanation has to account for
SLIGHT, SUBSTANTIAL = 0.2, 0.6  # chance-corrected agreement: Landis and Koch (Biometrics, 1977) call it so up to, above
SHOWN = 4  # labels that a mapping is described by
HABIT = 0.5  # images: what a label's own class is ahead of others, so that it is kept where nothing speaks against it


@dataclass(frozen=True)
class Explanation:
    """What may be wrong: under it these would be the model's predictions and the labels of the same images.

    Attributes:
        mending: how that comes about, to stand behind an accuracy.
        predicted, labels: classes.
        about: the images that it is about, those that another label or other pixels would be had for.
    """

    mending: str
    predicted: Labels = field(repr=False)
    labels: Labels = field(repr=False)
    about: Hits = field(repr=False)

    @property
    def hits(self) -> Hits:
        """Whether each image is classified rightly."""
        return self.predicted == self.labels

    def is_better(self, hits: Hits) -> bool:
        """Whether it has far more than these hits on the same images, not by chance, and leaves a model of some use."""
        weights = weights_of(self.labels)
        gains = weights * (self.hits.astype(int) - hits)
        far = np.sum(gains) > max(EXPLAINED * np.sum(weights[self.about & ~hits]), SURE * np.sqrt(np.sum(gains**2)))
        return bool(far) and agreement(self.predicted, self.labels) > SLIGHT


@dataclass(frozen=True)
class Doubt:
    """Why images and model can't belong together.

    Attributes:
        message: what was measured, and what mends it.
        is_sure: the images are enough to conclude it.
    """

    message: str
    is_sure: bool = True


def doubt(model: nnx.Module, images: Dataset, normalization: Normalization | None = None) -> Doubt | None:
    """Why images and model can't belong together, and what mends it; None where they may.

    Args:
        model: the original model, its normalisation inside.
        images: clean images with their labels. Up to 1000 random ones are looked at.
        normalization: the one inside the model.

    Raises:
        DataError: the images do not fit the model.
        NotFiniteError: the logits of an image are NaN or infinite.
    """
    classes = count_classes(model, images.images.shape[1:])
    images.check_fits(images.images.shape[1:], classes)
    some = images.take(np.random.default_rng(0).permutation(len(images))[:IMAGES])
    predicted = predict(model, some)
    hits, tried = predicted == some.labels, some.first(TRIED)
    where = f"of {len(some)} images of {images.name} the original model classifies"
    if len(np.unique(some.labels)) == 1:
        message = f"{where} {_percent(hits)} rightly; all are labelled as one class, which says little"
        return None if np.mean(hits) > SLIGHT else Doubt(message, is_sure=False)
    better = [one for one in of_labels(predicted, some.labels, classes) if one.is_better(hits)]
    if np.sum(~hits[:TRIED]) >= SURE**2:  # else there are too few misses for anything to be far better
        better += [one for one in of_pixels(model, tried, normalization) if one.is_better(hits[:TRIED])]
    if better:
        best = max(better, key=lambda one: np.mean(one.hits))
        return Doubt(f"{where} {_percent(hits[: len(best.hits)])} rightly, but {_percent(best.hits)} {best.mending}")
    is_sure = agreement(predicted, some.labels, SURE) < SLIGHT
    if not is_sure and (agreement(predicted, some.labels) >= SLIGHT or agreement(predicted, some.labels, -SURE) > 0):
        return None
    few = "" if is_sure else ", though so few images say little"
    return Doubt(
        f"{where} {_percent(hits)} rightly, which is near chance{few}, and no order of the classes, normalisation, "
        "scale or order of the colours that was tried mends it; check "
        "--dataset and its labels (--class-order), --normalize or --mean and --std, and --model",
        is_sure,
    )


def _percent(hits: Hits) -> str:
    return f"{100 * np.mean(hits):.1f} %"


def weights_of(labels: Labels) -> Float[np.ndarray, " n"]:
    """Weights of images that sum to 1, each class that occurs having as much as every other."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[classes])


def agreement(predicted: Labels, labels: Labels, errors: float = 0.0) -> float:
    """(accuracy - chance) / (1 - chance), all classes counted alike (Cohen's kappa), or that many standard errors off.

    Chance is the accuracy of the same predictions made without a look at the images. The bound is Wilson's, for Kish's
    effective number of images: where a class has few of them, the upper one is high, and the lower one, of a negative
    number of errors, low.
    """
    weights, present = weights_of(labels), np.unique(labels)
    chance = np.sum(weights * np.isin(predicted, present)) / len(present)
    accuracy, doubtful = np.sum(weights * (predicted == labels)), errors**2 * np.sum(weights**2)
    spread = np.sign(errors) * np.sqrt(doubtful * max(0.0, accuracy * (1 - accuracy)) + doubtful**2 / 4)
    bound = (accuracy + doubtful / 2 + spread) / (1 + doubtful)
    return float((bound - chance) / max(1 - chance, 1e-9))  # 0 / 0 where one class is all there is


def of_labels(predicted: Labels, labels: Labels, classes: int) -> Iterator[Explanation]:
    """Explanations by labels that number the classes otherwise than the model does."""

    def explanation(mending: str, others: Labels) -> Explanation:
        return Explanation(mending, predicted, others, others != labels)

    as_text = np.asarray(sorted(range(classes), key=str))  # 0, 1, 10, 11, ..., 2: the class in each place
    ranks = np.argsort(as_text)
    why = "the model's classes are in the order of their numbers as text: 0, 1, 10, 11, ..."
    yield explanation(f"with --class-order text, or labels of arrays numbered so ({why})", ranks[labels])
    why = "the labels are in the order of the classes' numbers as text: 0, 1, 10, 11, ..."
    yield explanation(f"with --class-order number, or labels of arrays numbered so ({why})", as_text[labels])
    mapping = described_mapping(best_mapping(predicted, labels))
    causes = "is a class missing, are labels counted from 1, or the classes in another order? See --class-order"
    yield explanation(f"where label {mapping}: {causes}", cross_fitted(predicted, labels))


def best_mapping(predicted: Labels, labels: Labels) -> dict[int, int]:
    """The one-to-one mapping of the labels that occur to the model's classes that fits most images."""
    rows = np.unique(labels)
    columns = np.union1d(rows, predicted)
    table = np.zeros((len(rows), len(columns)))
    np.add.at(table, (np.searchsorted(rows, labels), np.searchsorted(columns, predicted)), 1)
    table[np.arange(len(rows)), np.searchsorted(columns, rows)] += HABIT
    row, column = linear_sum_assignment(table, maximize=True)
    return {int(label): int(number) for label, number in zip(rows[row], columns[column], strict=True)}


def cross_fitted(predicted: Labels, labels: Labels) -> Labels:
    """The labels mapped, each half of them by the mapping that fits the other half best: so chance gains nothing."""
    mapped, first = labels.copy(), np.arange(len(labels)) % 2 == 0
    for half in (first, ~first):
        mapping = best_mapping(predicted[~half], labels[~half])
        mapped[half] = [mapping.get(int(label), int(label)) for label in labels[half]]
    return mapped


def described_mapping(mapping: dict[int, int]) -> str:
    """The first labels that a mapping moves."""
    moved = [(label, number) for label, number in mapping.items() if label != number]
    listed = ", ".join(f"{label} is {number}" for label, number in moved[:SHOWN])
    return listed.replace(" is ", " is the model's class ", 1) + and_more(moved, SHOWN)


def of_pixels(model: nnx.Module, images: Dataset, normalization: Normalization | None) -> Iterator[Explanation]:
    """Explanations by pixels that the model takes in another form; each is one `predict` of the images."""
    channels = images.images.shape[3]
    present, unit = normalization or _alike(0, 1, channels), np.asarray(to_unit(jnp.asarray(images.images)))

    def explanation(mending: str, pixels: Float[np.ndarray, "n h w c"]) -> Explanation:
        seen = Dataset(pixels.astype(np.float32), images.labels)
        return Explanation(mending, predict_where_finite(model, seen), images.labels, np.ones(len(images), bool))

    for option, other in _normalizations(channels).items():
        if len(other.mean) == channels and other != present:
            pixels = (unit - np.asarray(other.mean)) / np.asarray(other.std)
            yield explanation(f"with {option}", pixels * np.asarray(present.std) + np.asarray(present.mean))
    if channels == 3:
        yield explanation("with red and blue exchanged: swap them in the images", unit[..., ::-1])
    if unit.shape[1] == unit.shape[2]:
        yield explanation("with rows and columns exchanged: transpose the images", unit.swapaxes(1, 2))
    yield explanation("upside down: turn the images over", unit[:, ::-1])
    yield explanation("with left and right exchanged: mirror the images", unit[:, :, ::-1])
    if 0 < unit.max() < 1:
        brightest = unit.max() * (255 if images.images.dtype == np.uint8 else 1)
        mending = f"with the brightest pixel, {brightest:.3g}, as white: scale the pixels to 0..255, or floats to 0..1"
        yield explanation(mending, unit / unit.max())
    yield explanation("with dark and light exchanged: invert the images", 1 - unit)


def _normalizations(channels: int) -> dict[str, Normalization]:
    """What is tried, by the options that ask for it: those with names, [-1, 1] and 0..255."""
    none = _alike(0, 1, channels)
    named = {f"--normalize {name}": one or none for name, one in NORMALIZATIONS.items()}
    for mean, std in ((0.5, 0.5), (0, 1 / 255)):
        options = (" ".join(["--mean", *[f"{mean:g}"] * channels]), " ".join(["--std", *[f"{std:.6f}"] * channels]))
        named[" ".join(options)] = _alike(mean, std, channels)
    return named


def _alike(mean: float, std: float, channels: int) -> Normalization:
    """The same for all channels."""
    return Normalization((float(mean),) * channels, (float(std),) * channels)
