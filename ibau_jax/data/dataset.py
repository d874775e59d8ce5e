"""Labelled images in memory, and the checks that every source's images go through."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Shaped

from ibau_jax.data.classes import MOST_CLASSES
from ibau_jax.errors import DataError, shortened

NUMBERS = "biuf"  # kinds of dtype
LEAST_CONTRAST = 3  # levels of 255 by which an image's values differ
MOST_UNIFORM = 0.9  # share of images that may have less


@dataclass(frozen=True)
class Dataset:
    """Images and their classes.

    Attributes:
        images: uint8 in 0..255 or float32 in [0, 1]; NHWC, RGB or grey.
        labels: true classes, int64, counted from 0.
        name: what messages call it.
        class_names: names of the classes in the order of labels, where the data have some; "" for one without.
    """

    images: Shaped[np.ndarray, "n h w c"] = field(repr=False)
    labels: Int[np.ndarray, " n"] = field(repr=False)
    name: str = "data"
    class_names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{self.name} has {len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Dataset":
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def first(self, count: int) -> "Dataset":
        """The first `count` images, or all where there are fewer."""
        return self.take(np.arange(min(count, len(self))))

    def sample(self, count: int, seed: int) -> "Dataset":
        """Random `count` images in their order, or all where there are fewer: a file may hold class after class."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:count]))

    def check_fits(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        """Raises DataError unless a model with this input and so many classes can take the images and labels."""
        if not len(self):
            raise DataError(f"{self.name} is empty")
        if self.images.shape[1:] != tuple(input_shape):
            height, width, channels = self.images.shape[1:]
            other = f"--image-size {height}x{width}" if channels == input_shape[-1] else "another --image-size"
            raise DataError(
                f"{self.name} has images of {_size(self.images.shape[1:])} (height x width x channels), "
                f"but the model takes {_size(tuple(input_shape))}; choose other images, or {other}"
            )
        if self.labels.max() >= num_classes:
            hint = "; if its labels count from 1, subtract 1" if self.labels.min() == 1 else ""
            raise DataError(
                f"{self.name} has the label {self.labels.max()}, but the model has {num_classes} classes "
                f"(labels 0 to {num_classes - 1}){hint}"
            )

    def check_contrast(self) -> None:
        """Raises DataError where nearly all images have a single colour, so that no model can tell them apart."""
        if not len(self):
            return
        scale = 1 if self.images.dtype == np.uint8 else 255
        pixels = self.images.reshape(len(self), -1)
        ranges = scale * (pixels.max(1).astype(np.float64) - pixels.min(1))
        if np.mean(ranges < LEAST_CONTRAST) >= MOST_UNIFORM:
            brightest = scale * float(pixels.max())
            cause = "; were they divided by 255 twice?" if brightest <= 1 and scale == 255 else ""
            raise DataError(
                f"{self.name}: of {len(self)} images {np.sum(ranges < LEAST_CONTRAST)} have no contrast (their values "
                f"differ by less than {LEAST_CONTRAST} of 255; the brightest is {brightest:.3g} of 255){cause}"
            )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def make_dataset(images: Any, labels: Any, name: str, *, bytes_as_float: bool = False) -> Dataset:
    """A data set from arrays as files hold them.

    Args:
        images: (n, h, w, c), or (n, h, w) for grey ones; integers in 0..255, floats in [0, 1], or False and True for
            black and white.
        labels: (n,) or (n, 1) integers, or (n, classes) one-hot rows.
        name: what messages call it.
        bytes_as_float: whether floats may be integers in 0..255, as the published GTSRB file has them.

    Raises:
        DataError: shapes, dtypes or values are others.
    """
    return Dataset(
        checked_images(np.asarray(images), name, bytes_as_float), checked_labels(np.asarray(labels), name), name
    )


class Form(Protocol):
    """What is known of an array before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def check_forms(images: Form, labels: Form, name: str) -> None:
    """Raises DataError unless arrays of these shapes and dtypes can be images and as many labels."""
    _check_image_form(images, name)
    _check_label_form(labels, name)
    if images.shape[0] != labels.shape[0]:
        raise DataError(f"{name} has {images.shape[0]} images but {labels.shape[0]} labels")


def _check_image_form(images: Form, name: str) -> None:
    shape = images.shape
    if len(shape) == 3 and shape[2] not in (1, 3):  # grey images without an axis of channels, as MNIST has them
        shape = (*shape, 1)
    if len(shape) != 4 or shape[3] not in (1, 3):
        hint = "; transpose them from NCHW to NHWC" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise DataError(
            f"{name}: images must be (n, height, width, 1 or 3), or (n, height, width), not {shortened(shape)}{hint}"
        )
    if images.dtype.kind not in NUMBERS:
        raise DataError(f"{name}: images must be numbers, not {shortened(images.dtype)}")


def _check_label_form(labels: Form, name: str) -> None:
    if len(labels.shape) not in (1, 2) or 0 in labels.shape[1:]:
        raise DataError(f"{name}: labels must be (n,) integers or one-hot rows, not {shortened(labels.shape)}")
    if len(labels.shape) == 2 and labels.shape[1] > MOST_CLASSES:
        raise DataError(f"{name}: labels of {labels.shape[1]:,} classes; at most {MOST_CLASSES:,} are possible")
    if labels.dtype.kind not in NUMBERS:
        raise DataError(f"{name}: labels must be integers, not {shortened(labels.dtype)}")


def checked_images(images: np.ndarray, name: str, bytes_as_float: bool = False) -> np.ndarray:
    """`images` as uint8 in 0..255 or float32 in [0, 1], else DataError."""
    _check_image_form(images, name)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype == np.bool_:
        return images * np.uint8(255)
    if not images.size:
        return images.astype(np.uint8)
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        raise DataError(f"{name}: images hold NaN or infinite values")
    whole = images.dtype.kind in "iu" or (bytes_as_float and high > 1 and _all_whole(images))
    if low < 0 or high > (255 if whole else 1):
        raise DataError(
            f"{name}: images hold {images.dtype} values from {low:g} to {high:g}, outside "
            f"{'0..255' if whole else '[0, 1]'}; {_remedy(images, low, high)}"
        )
    if whole and high == 1:
        raise DataError(
            f"{name}: images hold {images.dtype} values of 0 and 1 only, of 255: all but black. Floats in [0, 1] that "
            "were stored as integers are lost; store floats, or 255 times as much (True and False are black and white)"
        )
    return images.astype(np.uint8 if whole else np.float32, copy=False)


def _all_whole(images: np.ndarray) -> bool:
    return all(np.array_equal(image, np.floor(image)) for image in images)


def _remedy(images: np.ndarray, low: Any, high: Any) -> str:
    """What to do with values outside the range."""
    if low < 0:
        signed = images.dtype.kind == "i" and low >= -128 and high <= 127
        return "bytes that were stored with a sign? Store them as uint8" if signed else "undo any normalisation"
    if high <= 255:
        return "divide them by 255, or store uint8"
    if high <= 65535:
        return "values of 16 bits? Divide them by 257 and store uint8, or by 65535 and store floats"
    return "undo any scaling"


def checked_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """`labels` as (n,) int64, else DataError."""
    _check_label_form(labels, name)
    if labels.ndim == 2:
        if labels.shape[1] > 1 and not (
            ((labels == 0) | (labels == 1)).all() and (np.count_nonzero(labels, axis=1) == 1).all()
        ):
            raise DataError(f"{name}: labels of shape {labels.shape} are not one-hot")
        labels = labels.argmax(1) if labels.shape[1] > 1 else labels[:, 0]
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == np.floor(labels)).all()):
        raise DataError(f"{name}: labels must be integers, and there are {labels.dtype} values that are none")
    if len(labels) and labels.min() < 0:
        raise DataError(f"{name}: labels hold {labels.min():g}; classes are counted from 0")
    if len(labels) and labels.max() >= MOST_CLASSES:
        raise DataError(f"{name}: labels hold {labels.max():g}, which can be no class")
    return labels.astype(np.int64)
