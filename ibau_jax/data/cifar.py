"""CIFAR-10 and CIFAR-100 as their archives unpack: the Python version, which is pickles, and the binary one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt8

from ibau_jax.data.dataset import Dataset, checked_labels
from ibau_jax.data.images import fitted
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, roots
from ibau_jax.data.memory import check_memory
from ibau_jax.data.pickled import read_pickled_dict, text_of
from ibau_jax.data.text import names_in
from ibau_jax.errors import DataError, refusing
from ibau_jax.files import check_regular

PIXELS = 32 * 32 * 3  # bytes of an image: a plane of red, one of green, one of blue
Rows = tuple[UInt8[np.ndarray, "n 3072"], Int[np.ndarray, " n"]]


class Form(Protocol):
    """How a file holds images, and where the names of classes are."""

    def read(self, file: Path) -> Rows: ...

    def names(self, folder: Path) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Pickled:
    """A dict of `data` and a list of labels; another one holds the classes' names."""

    labels: str
    names_file: str
    names_key: str

    def read(self, file: Path) -> Rows:
        content = read_pickled_dict(file)
        images, labels = content.get("data"), content.get(self.labels)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
            raise DataError(f"{file}: 'data' is no array of (n, {PIXELS}) bytes; unpack the data set's archive anew")
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise DataError(f"{file}: {self.labels!r} is no list of integers; unpack the data set's archive anew")
        return images, checked_labels(np.asarray(labels), str(file)) if labels else np.zeros(0, np.int64)

    def names(self, folder: Path) -> tuple[str, ...]:
        file = folder / self.names_file
        names = read_pickled_dict(file).get(self.names_key) if file.exists() else []
        if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
            raise DataError(f"{file}: {self.names_key!r} is no list of names; unpack the data set's archive anew")
        return tuple(map(text_of, names))


@dataclass(frozen=True)
class Binary:
    """Rows of bytes: so many labels, of which the last is meant, then the pixels; a text lists the classes' names."""

    labels: int
    names_file: str

    def read(self, file: Path) -> Rows:
        check_regular(file)
        with refusing(str(file), DataError):
            content = np.fromfile(file, np.uint8)
        if len(content) % (self.labels + PIXELS):
            raise DataError(f"{file} ends within an image; unpack the data set's archive anew")
        rows = content.reshape(-1, self.labels + PIXELS)
        return rows[:, self.labels :], rows[:, self.labels - 1].astype(np.int64)

    def names(self, folder: Path) -> tuple[str, ...]:
        file = folder / self.names_file
        return tuple(names_in(file)) if file.exists() else ()


@dataclass(frozen=True)
class Release:
    """An archive.

    Attributes:
        folder: what it unpacks to.
        marks: files that tell the folder where it is called otherwise.
        splits: the files of each split.
        form: how these hold images.
    """

    folder: str
    marks: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    form: Form

    def is_root(self, folder: Path) -> bool:
        """Whether the folder is this archive's."""
        named = folder.name == self.folder and folder.is_dir()
        return named or all((folder / mark).exists() and not (folder / mark).is_dir() for mark in self.marks)

    def find(self, folder: Path) -> list[Path]:
        """The archive's folder: this one, or the one in it."""
        return roots(folder, (self.folder,), self.is_root)

    def load(self, folder: Path, split: str, request: ImageRequest) -> Dataset:
        """The images of a split, resized to the model's input.

        Raises:
            DataError: a file is missing or damaged, or the names are not as many as the model's classes.
            ConfigError: a file is no regular file.
        """
        split = chosen_split(split, self.splits, folder)
        files, name = [folder / file for file in self.splits[split]], f"{folder}:{split}"
        class_names = self.form.names(folder)
        request.check_classes(class_names, name)
        with refusing(name, DataError):
            check_memory(2 * sum(file.stat().st_size for file in files), name)
            parts = [self.form.read(file) for file in files]
            for file, (pixels, labels) in zip(files, parts, strict=True):
                if len(pixels) != len(labels):
                    raise DataError(f"{file} has {len(pixels)} images but {len(labels)} labels; unpack it anew")
            pixels = np.concatenate([pixels for pixels, _ in parts])
            images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = np.concatenate([labels for _, labels in parts])
            return Dataset(fitted(images, request.input_shape, name), labels, name, class_names)


RELEASES = (
    Release(
        "cifar-10-batches-py",
        ("test_batch",),
        {"test": ("test_batch",), "train": tuple(f"data_batch_{number}" for number in range(1, 6))},
        Pickled("labels", "batches.meta", "label_names"),
    ),
    Release(
        "cifar-100-python",
        ("test", "meta"),
        {"test": ("test",), "train": ("train",)},
        Pickled("fine_labels", "meta", "fine_label_names"),
    ),
    Release(
        "cifar-10-batches-bin",
        ("test_batch.bin",),
        {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6))},
        Binary(1, "batches.meta.txt"),
    ),
    Release(
        "cifar-100-binary",
        ("test.bin",),
        {"test": ("test.bin",), "train": ("train.bin",)},
        Binary(2, "fine_label_names.txt"),
    ),
)
LAYOUTS = tuple(Layout(release.find, release.load, has_class_folders=False) for release in RELEASES)
