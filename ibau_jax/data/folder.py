"""A folder of images, one sub-folder a class."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def load_folder(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """The images in the sub-folders of `spec`, resized (bicubic) to the model's input.

    Classes are counted from 0 in the order of the sub-folders' names: by number where all names are numbers, else
    alphabetically, as torchvision's ImageFolder does.

    Raises:
        DataError: there are no sub-folders or no images, or one can't be read.
    """
    folders = _sub_folders(Path(spec))
    numbered = all(folder.name.isdecimal() for folder in folders)
    folders.sort(key=lambda folder: (int(folder.name), folder.name) if numbered else (0, folder.name))
    files = [(file, label) for label, folder in enumerate(folders) for file in _image_files(folder)]
    if not files:
        raise DataError(f"{spec} has no images in sub-folders; it needs one sub-folder a class")
    return _read(files, input_shape, spec)


def load_triggered(folder: str, input_shape: tuple[int, int, int], without: Collection[int] = ()) -> Dataset:
    """Images that already carry a trigger, `FOLDER/TRUE_CLASS/INDEX.png`, as BackdoorBench stores them.

    Args:
        folder: its sub-folders are numbers, the images' true classes.
        input_shape: the model's height, width and channels.
        without: indices to leave out; INDEX is the position of the clean image in its data set.

    Raises:
        DataError: there is no such folder or image, or a sub-folder is no number, or an image can't be read.
    """
    if not Path(folder).is_dir():
        raise DataError(f"there is no folder {folder} of triggered images")
    classes = sorted(_sub_folders(Path(folder)))
    unnumbered = [entry.name for entry in classes if not entry.name.isdecimal()]
    if unnumbered:
        raise DataError(f"{folder}/{unnumbered[0]} is no class; triggered images lie in {folder}/TRUE_CLASS/INDEX.png")
    files = [
        (file, int(entry.name))
        for entry in sorted(classes, key=lambda entry: int(entry.name))
        for file in _image_files(entry)
        if not (file.stem.isdecimal() and int(file.stem) in without)
    ]
    if not files:
        raise DataError(f"{folder} has no triggered images to evaluate on; it needs {folder}/TRUE_CLASS/INDEX.png")
    return _read(files, input_shape, folder)


def _sub_folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]


def _read(files: Sequence[tuple[Path, int]], input_shape: tuple[int, int, int], name: str) -> Dataset:
    images = np.stack([read_image(file, input_shape) for file, _ in files])
    return Dataset(images, np.asarray([label for _, label in files], np.int64), name)


def read_image(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file as uint8 of `shape`, converted to RGB or grey and resized where it differs.

    Raises:
        DataError: it can't be read.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB" if shape[2] == 3 else "L")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"can't read the image {file}: {str(error)[:200]}") from error
    return resized(image, shape)


def resized(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """A PIL image as uint8 of `shape`, bicubic where the size differs."""
    if image.size != (shape[1], shape[0]):
        image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)
