"""Tiny ImageNet as its archive unpacks: `wnids.txt`, training images in class folders, validation images in a list.

The test images have no labels, so that `val` is the default. A label is the place of a class's WordNet number in the
order of text, as torchvision's ImageFolder has it; `--class-order tiny-imagenet-200/wnids.txt` takes the order of that
file instead.
"""

from pathlib import Path

from ibau_jax.data.classes import class_labels, names_by_label
from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import load_folder, read_images
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, roots
from ibau_jax.data.text import image_in, names_in
from ibau_jax.errors import DataError, shortened

PLACES = ("tiny-imagenet-200",)
ANNOTATIONS = "val_annotations.txt"
SPLITS = ("val", "train")


def find(folder: Path) -> list[Path]:
    """The archive's folder: this one, or the one in it."""
    return roots(folder, PLACES, lambda place: (place / "wnids.txt").exists())


def load(folder: Path, split: str, request: ImageRequest) -> Dataset:
    """The images of a split, resized to the model's input. Validation images may have been moved to class folders.

    Raises:
        DataError: a file is missing or damaged, or the classes are not those of the model.
        ConfigError: a file is no regular file.
    """
    if split == "test":
        raise DataError(f"{folder}: the test images of Tiny ImageNet have no labels; name {folder}:val")
    split = chosen_split(split, [name for name in SPLITS if (folder / name).is_dir()], folder)
    listed = split == "val" and (folder / split / ANNOTATIONS).exists() and (folder / split / "images").is_dir()
    if not listed:
        return load_folder(str(folder / split), request, _words(folder))
    return _load_listed(folder, request)


def _load_listed(folder: Path, request: ImageRequest) -> Dataset:
    table, images = folder / "val" / ANNOTATIONS, folder / "val" / "images"
    labels = class_labels(sorted(set(names_in(folder / "wnids.txt"))), request.num_classes, request.class_order)
    files = []
    for line in names_in(table):
        name, number, *_ = [*line.split("\t"), ""]
        if number not in labels:
            raise DataError(
                f"{table} has the class {shortened(number, 40)!r}, which wnids.txt does not list; unpack it anew"
            )
        files.append((image_in(images, name, table), labels[number]))
    names = names_by_label(labels, request.num_classes, _words(folder))
    return read_images(files, request.input_shape, f"{folder}:val", names)


def _words(folder: Path) -> dict[str, str]:
    """The first word for each WordNet number, where `words.txt` is there."""
    file = folder / "words.txt"
    if not file.exists():
        return {}
    pairs = [line.split("\t", 1) for line in names_in(file)]
    return {number: words.split(",")[0] for number, words in (pair for pair in pairs if len(pair) == 2)}


LAYOUTS = (Layout(find, load, has_class_folders=True),)
