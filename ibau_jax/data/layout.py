"""Folders of data sets as they are downloaded: what a model asks of them, and which of their splits is meant."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError, shortened

# Other words for a split, by the word that specs have.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
DEFAULT_SPLITS = ("test", "val")  # the first one that is there


@dataclass(frozen=True)
class ImageRequest:
    """What images must be for a model.

    Attributes:
        input_shape: the model's height, width and channels.
        num_classes: how many classes the model has; None where that is not known.
        class_order: which labels class folders have; see `ibau_jax.data.classes.class_labels`.
    """

    input_shape: tuple[int, int, int]
    num_classes: int | None = None
    class_order: str | None = None

    def check_classes(self, names: Sequence[str], where: str) -> None:
        """Raises DataError where a data set has names for another number of classes than the model has."""
        if names and self.num_classes not in (None, len(names)):
            raise DataError(f"{where} has {len(names)} classes, but the model has {self.num_classes}")


@dataclass(frozen=True)
class Layout:
    """How a published data set lies in a folder.

    Attributes:
        find: gives the folders at or below a folder where such a data set lies.
        load: reads a split of what `find` gave; the split is as the spec says it, "" for the default.
        has_class_folders: whether labels come from names of class folders, whose order can be chosen.
    """

    find: Callable[[Path], list[Path]]
    load: Callable[[Path, str, ImageRequest], Dataset]
    has_class_folders: bool


def place_and_split(spec: str) -> tuple[str, str]:
    """The path in a spec `PATH[:SPLIT]`, and the split, "" where none is named."""
    if os.path.exists(spec) or ":" not in spec:
        return spec, ""
    place, _, split = spec.rpartition(":")
    return place, split


def roots(folder: Path, places: Collection[str], is_root: Callable[[Path], bool]) -> list[Path]:
    """`folder` where a data set lies in it, else those of `places` below it where one does."""
    if is_root(folder):
        return [folder]
    return [folder / place for place in places if is_root(folder / place)]


def split_of(word: str) -> str | None:
    """The split that a word stands for, in whatever case; None where it stands for none."""
    return next((split for split, words in SPLITS.items() if word.lower() in words), None)


def chosen_split(asked: str, there: Collection[str], where: str | Path) -> str:
    """The split of `there` that a spec asks for; for "" the first of `DEFAULT_SPLITS` that is there.

    Raises:
        DataError: it is not there.
    """
    wanted = DEFAULT_SPLITS if asked == "" else (asked, split_of(asked))
    found = next((split for split in wanted if split in there), None)
    if found is None:
        missing = "split for tests" if asked == "" else f"split {shortened(asked, 40)!r}"
        shown = ", ".join(f"{where}:{split}" for split in there) or "none"
        raise DataError(f"{where} has no {missing}; there is {shown}")
    return found
