"""A folder of images, one sub-folder a class."""

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
    folders = [folder for folder in Path(spec).iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    numbered = all(folder.name.isdecimal() for folder in folders)
    folders.sort(key=lambda folder: (int(folder.name), folder.name) if numbered else (0, folder.name))
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(f"{spec} has no images in sub-folders; it needs one sub-folder a class")
    images = np.stack([read_image(file, input_shape) for file, _ in files])
    return Dataset(images, np.asarray([label for _, label in files], np.int64), spec)


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
