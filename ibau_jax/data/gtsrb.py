"""GTSRB as it is downloaded: the official archives, torchvision's and BackdoorBench's folders of them, and Kaggle's.

Training images lie in class folders, test images in one folder with a table of their classes beside it. The tables'
regions of interest are not cut out; neither torchvision nor BackdoorBench does that.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from ibau_jax.data.classes import MOST_CLASSES, class_labels
from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import load_folder, read_images
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, roots
from ibau_jax.data.text import image_in, read_text
from ibau_jax.errors import DataError, refusing

PLACES = ("GTSRB", "gtsrb", "gtsrb/GTSRB")
TRAINING = ("Final_Training/Images", "Training", "Train")
TEST = ("Final_Test/Images", "Test")
TABLES = {"GT-final_test.csv": 5, "Test.csv": 0}  # and with how many digits class folders are named there
OFFICIAL = ("Final_Training", "Final_Test")


def find(folder: Path) -> list[Path]:
    """The folders with GTSRB's images: this one, or one below it."""
    return roots(folder, PLACES, _is_root)


def _is_root(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in OFFICIAL) or (_first(folder, TEST) and _table(folder)) is not None


def _first(folder: Path, places: Sequence[str]) -> Path | None:
    """The first of some places in a folder where there is a folder."""
    return next((folder / place for place in places if (folder / place).is_dir()), None)


def _table(folder: Path) -> Path | None:
    """The table of the test images' classes: beside them, or above."""
    test = _first(folder, TEST) or folder
    places = [place / name for place in (test, test.parent, folder, folder.parent) for name in TABLES]
    return next((place for place in places if place.exists()), None)


def load(folder: Path, split: str, request: ImageRequest) -> Dataset:
    """The images of a split, resized to the model's input.

    Raises:
        DataError: a folder or the table is missing, or they don't fit the model.
        ConfigError: a file is no regular file.
    """
    there = {"test": _first(folder, TEST), "train": _first(folder, TRAINING)}
    split = chosen_split(split, [name for name, place in there.items() if place], folder)
    images = there[split]
    assert images is not None
    if split == "train":
        return load_folder(str(images), request)
    table = _table(folder)
    if table is None:
        raise DataError(
            f"{images} has no GT-final_test.csv beside it, which holds the classes of the test images; unpack "
            f"GTSRB_Final_Test_GT.zip there, or name {folder}:train"
        )
    return _load_listed(images, table, request)


def _load_listed(images: Path, table: Path, request: ImageRequest) -> Dataset:
    """The images that a table lists, with the labels that their class folders would have."""
    rows = [(image_in(images, name, table), number) for name, number in _rows(table)]
    width = TABLES[table.name]
    names = [f"{number:0{width}d}" for number in sorted({number for _, number in rows})]
    labels = class_labels(names, request.num_classes, request.class_order)
    files = [(file, labels[f"{number:0{width}d}"]) for file, number in rows]
    return read_images(files, request.input_shape, f"{images}")


def _rows(table: Path) -> list[tuple[str, int]]:
    """Names of images and their classes."""
    lines = read_text(table).splitlines()
    separator = ";" if lines and ";" in lines[0] else ","
    with refusing(str(table), DataError):
        rows = list(csv.DictReader(lines, delimiter=separator))
    found = [(row.get("Filename") or row.get("Path"), row.get("ClassId")) for row in rows]
    listed = [(name, int(text)) for name, text in found if name and text and _is_class(text)]
    if not listed or len(listed) < len(rows):
        raise DataError(f"{table} is no table with a Filename or Path and a ClassId in each row; download it anew")
    return listed


def _is_class(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < MOST_CLASSES


LAYOUTS = (Layout(find, load, has_class_folders=True),)
