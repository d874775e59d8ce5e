"""A folder of images, one sub-folder a class."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ibau_jax.data.classes import MOST_CLASSES, NO_WORDS, class_labels, names_by_label
from ibau_jax.data.dataset import Dataset
from ibau_jax.data.images import SUFFIXES, read_image
from ibau_jax.data.layout import ImageRequest
from ibau_jax.data.memory import check_memory
from ibau_jax.errors import DataError, refusing

# Sub-folders that systems and archives make.
NO_CLASSES = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
INNER = "images"  # CLASS/images/NAME.png, as Tiny ImageNet has them
FORM = "CLASS/NAME.png or CLASS/images/NAME.png"


def load_folder(spec: str, request: ImageRequest, words: Mapping[str, str] = NO_WORDS) -> Dataset:
    """The images in the class folders of `spec`, resized (bicubic) to the model's input.

    Args:
        spec: the folder; `ibau_jax.data.classes.class_labels` says which label each of its sub-folders has.
        request: what the model takes.
        words: what classes are called, by the names of their folders, where they are called otherwise.

    Raises:
        DataError: there are no class folders or no images, or one can't be read, or the folders don't fit the model.
        ConfigError: one of the images is no regular file.
    """
    folders = {folder.name: folder for folder in class_folders(spec)}
    try:
        labels = class_labels(list(folders), request.num_classes, request.class_order)
    except DataError as error:
        raise DataError(f"{spec}: {error}{_left_out(spec)}") from error
    by_label = sorted(folders, key=lambda name: labels[name])
    files = [(file, labels[name]) for name in by_label for file in _image_files(folders[name])]
    if not files:
        raise DataError(f"{spec} has no images in class folders; it needs {FORM} (see docs/unlearning.md for others)")
    return read_images(files, request.input_shape, spec, names_by_label(labels, request.num_classes, words))


def load_triggered(folder: str, input_shape: tuple[int, int, int], without: Collection[int] = ()) -> Dataset:
    """Images that already carry a trigger, `FOLDER/TRUE_CLASS/INDEX.png`, as BackdoorBench stores them.

    Args:
        folder: its sub-folders are numbers, the images' true classes.
        input_shape: the model's height, width and channels.
        without: indices to leave out; INDEX is the position of the clean image in its data set.

    Raises:
        DataError: there is no such folder or image, or a sub-folder is no number, or an image can't be read.
        ConfigError: one of the images is no regular file.
    """
    form = f"{folder}/TRUE_CLASS/INDEX.png"
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder} of triggered images")
    labels = {}
    for entry in class_folders(folder):
        if not (entry.name.isascii() and entry.name.isdecimal() and int(entry.name) < MOST_CLASSES):
            raise DataError(f"{entry} is no class; triggered images lie in {form}")
        labels[entry] = int(entry.name)
    files = [
        (file, labels[entry])
        for entry in sorted(labels, key=lambda entry: (labels[entry], entry.name))
        for file in _image_files(entry)
        if not (file.stem.isdecimal() and int(file.stem) in without)
    ]
    if not files:
        raise DataError(f"{folder} has no triggered images to evaluate on; it needs {form}")
    return read_images(files, input_shape, folder)


def class_folders(spec: str) -> list[Path]:
    """The sub-folders that are classes, empty ones too, in no order.

    Hidden ones, those that systems make, and those that hold hidden files only are no classes.

    Raises:
        DataError: the folder can't be listed, or one of its entries leads nowhere.
    """
    return [folder for folder in _sub_folders(spec) if _is_class(folder)]


def _sub_folders(spec: str) -> list[Path]:
    with refusing(spec, DataError):
        entries = list(Path(spec).iterdir())
        for entry in entries:
            if entry.is_symlink() and not entry.exists():
                raise DataError(f"{entry} is a link that leads nowhere; remove it or mend it")
        return [entry for entry in entries if entry.is_dir()]


def _is_class(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in NO_CLASSES:
        return False
    with refusing(str(folder), DataError):
        names = os.listdir(folder)
    return not names or any(not name.startswith(".") for name in names)


def _left_out(spec: str) -> str:
    names = [folder.name for folder in _sub_folders(spec) if not _is_class(folder)]
    return f" (not counted: {', '.join(sorted(names)[:4])})" if names else ""


def _image_files(folder: Path) -> list[Path]:
    """The images of a class, in the order of their names.

    Raises:
        DataError: there are files but no images, or images lie deeper than `FORM` has them.
    """
    with refusing(str(folder), DataError):
        visible = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        inner = folder / INNER
        if inner.is_dir():
            visible += [entry for entry in sorted(inner.iterdir()) if not entry.name.startswith(".")]
        for entry in visible:
            if entry.is_dir() and entry != inner and any(_is_image(name) for name in os.listdir(entry)):
                raise DataError(f"{entry} holds images; they are read from {FORM} only: name the folder of the classes")
    files = [entry for entry in visible if _is_image(entry.name)]
    if visible and not files and visible != [inner]:
        raise DataError(
            f"{folder} holds no images ({', '.join(SUFFIXES)}) but {visible[0].name}; if it is no class, move it"
        )
    return files


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_images(
    files: Sequence[tuple[Path, int]],
    input_shape: tuple[int, int, int],
    name: str,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Image files and their labels, resized to the model's input; raises as `ibau_jax.data.images.read_image`."""
    check_memory(len(files) * int(np.prod(input_shape)), name)
    images = np.empty((len(files), *input_shape), np.uint8)
    for image, (file, _) in zip(images, files, strict=True):
        image[...] = read_image(file, input_shape)
    return Dataset(images, np.asarray([label for _, label in files], np.int64), name, class_names)
