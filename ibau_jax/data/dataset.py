"""Labelled images in memory, and the checks that every source's images go through."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from ibau_jax.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Images and their classes.

    Attributes:
        images: uint8 in 0..255 or float32 in [0, 1]; NHWC, RGB or grey.
        labels: true classes, int64, counted from 0.
        name: what messages call it.
    """

    images: Shaped[np.ndarray, "n h w c"] = field(repr=False)
    labels: Int[np.ndarray, " n"] = field(repr=False)
    name: str = "data"

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{self.name} has {len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Dataset":
        """The images at `indices`, in that order."""
        return Dataset(self.images[indices], self.labels[indices], self.name)

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
            raise DataError(
                f"{self.name} has images of {_size(self.images.shape[1:])} (height x width x channels), "
                f"but the model takes {_size(tuple(input_shape))}; choose other images, or another --image-size"
            )
        if self.labels.max() >= num_classes:
            raise DataError(
                f"{self.name} has the label {self.labels.max()}, but the model has {num_classes} classes "
                f"(labels 0 to {num_classes - 1})"
            )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def make_dataset(images: Any, labels: Any, name: str, *, bytes_as_float: bool = False) -> Dataset:
    """A data set from arrays as files hold them.

    Args:
        images: (n, h, w, c); integers in 0..255, or floats in [0, 1].
        labels: (n,) or (n, 1) integers, or (n, classes) one-hot rows.
        name: what messages call it.
        bytes_as_float: whether floats may be integers in 0..255, as the published GTSRB file has them.

    Raises:
        DataError: shapes, dtypes or values are others.
    """
    return Dataset(
        checked_images(np.asarray(images), name, bytes_as_float), checked_labels(np.asarray(labels), name), name
    )


def checked_images(images: np.ndarray, name: str, bytes_as_float: bool = False) -> np.ndarray:
    """`images` as uint8 in 0..255 or float32 in [0, 1], else DataError."""
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        hint = "; transpose them from NCHW to NHWC" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise DataError(f"{name}: images must be (n, height, width, 1 or 3), not {images.shape}{hint}")
    if images.dtype == np.uint8 or not images.size:
        return images
    if images.dtype.kind not in "biuf":
        raise DataError(f"{name}: images must be numbers, not {images.dtype}")
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        raise DataError(f"{name}: images hold NaN or infinite values")
    whole = images.dtype.kind in "biu" or (bytes_as_float and high > 1 and bool(np.all(images == np.floor(images))))
    limit = 255 if whole else 1
    if low < 0 or high > limit:
        scale = "0..255" if whole else "[0, 1]"
        raise DataError(f"{name}: images hold values from {low:g} to {high:g}, outside {scale}; undo any normalisation")
    return images.astype(np.uint8 if whole else np.float32, copy=False)


def checked_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """`labels` as (n,) int64, else DataError."""
    if labels.ndim == 2:
        if labels.shape[1] > 1 and not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
            raise DataError(f"{name}: labels of shape {labels.shape} are not one-hot")
        labels = labels.argmax(1) if labels.shape[1] > 1 else labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{name}: labels must be (n,) integers or one-hot rows, not {labels.shape}")
    if labels.dtype.kind not in "biuf" or (labels.dtype.kind == "f" and not (labels == np.floor(labels)).all()):
        raise DataError(f"{name}: labels must be integers, not {labels.dtype}")
    if len(labels) and labels.min() < 0:
        raise DataError(f"{name}: labels hold {labels.min()}; classes are counted from 0")
    return labels.astype(np.int64)
