"""MNIST and its relatives (FashionMNIST, KMNIST) as they are downloaded: idx files, gzipped or not, of grey images."""

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.images import fitted
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, roots
from ibau_jax.data.memory import check_memory, check_size
from ibau_jax.errors import DataError, refusing
from ibau_jax.files import check_regular

PREFIXES = {"test": "t10k", "train": "train"}
PLACES = ("raw", *(f"{name}/raw" for name in ("MNIST", "FashionMNIST", "KMNIST")), "MNIST")
UNSIGNED_BYTES = 8  # idx's number for the type


def find(folder: Path) -> list[Path]:
    """The folders of idx files: this one, `raw` in it, or those that torchvision makes below its root."""
    return roots(folder, PLACES, lambda place: any(_file(place, split, "images", 3) for split in PREFIXES))


def load(folder: Path, split: str, request: ImageRequest) -> Dataset:
    """The images of a split, resized to the model's input; grey ones in three channels where the model takes colours.

    Raises:
        DataError: a file is missing or damaged. ConfigError: it is no regular file.
    """
    split = chosen_split(split, [name for name in PREFIXES if _file(folder, name, "images", 3)], folder)
    images, labels = _file(folder, split, "images", 3), _file(folder, split, "labels", 1)
    if images is None or labels is None:
        raise DataError(f"{folder} has no {PREFIXES[split]}-labels-idx1-ubyte[.gz] beside the images; download it too")
    name = f"{folder}:{split}"
    pixels = read_idx(images, 3)[..., None]
    return Dataset(fitted(pixels, request.input_shape, name), read_idx(labels, 1).astype(np.int64), name)


def _file(folder: Path, split: str, content: str, axes: int) -> Path | None:
    """The file of a split's images or labels, unpacked before gzipped; None where there is none."""
    stems = [f"{PREFIXES[split]}-{content}{sign}idx{axes}-ubyte" for sign in "-."]
    files = [folder / f"{stem}{suffix}" for suffix in ("", ".gz") for stem in stems]
    return next((file for file in files if file.exists() and not file.is_dir()), None)


def read_idx(file: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """The array of bytes in an idx file.

    Raises:
        DataError: it is damaged, or has other axes, or takes more memory than there is.
        ConfigError: it is no regular file.
    """
    check_regular(file)
    opened = gzip.open if file.suffix == ".gz" else open
    with refusing(str(file), DataError), opened(file, "rb") as stream:
        head = stream.read(4 + 4 * axes)
        if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, UNSIGNED_BYTES, axes]):
            raise DataError(f"{file} is no idx file of bytes with {axes} axes; download it anew")
        shape = struct.unpack(f">{axes}I", head[4:])
        if 0 in shape[1:]:
            raise DataError(f"{file} declares images without pixels; it is damaged")
        size = math.prod(shape)
        check_size(size, os.path.getsize(file), str(file))
        check_memory(size, str(file))
        content = stream.read(size + 1)
        if len(content) != size:
            raise DataError(f"{file} holds {len(content)} bytes or more, not {size} as it declares; download it anew")
    return np.frombuffer(content, np.uint8).reshape(shape)


LAYOUTS = (Layout(find, load, has_class_folders=False),)
