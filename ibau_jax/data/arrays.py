"""Arrays in files: NumPy archives and HDF5 files, whatever the arrays are called."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from ibau_jax.data.dataset import NUMBERS, Dataset, Form, check_forms, make_dataset
from ibau_jax.data.layout import ImageRequest, place_and_split
from ibau_jax.data.memory import check_memory
from ibau_jax.data.npy import open_npz
from ibau_jax.errors import DataError, shortened

SHOWN = 10  # names in a message
# What images and labels are called, in whatever case, {} being the split: Keras, the published GTSRB file, MedMNIST.
PAIRS = (
    ("x", "y"),
    ("x_{}", "y_{}"),
    ("{}_x", "{}_y"),
    ("{}_images", "{}_labels"),
    ("{}_data", "{}_labels"),
    ("images", "labels"),
    ("data", "labels"),
)


class Declared(Form, Protocol):
    """What is known of an array before it is read, and how many bytes it takes."""

    @property
    def nbytes(self) -> int: ...


class NamedArrays(Protocol):
    """The arrays of an open file."""

    @property
    def names(self) -> list[str]: ...

    def form(self, name: str) -> Form | None: ...

    def header(self, name: str) -> Declared: ...

    def read(self, name: str) -> np.ndarray: ...


def load_npz(spec: str, request: ImageRequest) -> Dataset:
    """Images and labels of a NumPy archive: those that the spec names, `FILE.npz:IMAGES,LABELS`; or by the names in
    `PAIRS`, of the split `test` or that of `FILE.npz:SPLIT`; or the only arrays that can be images and as many labels.

    Nothing pickled is read, and nothing before its size is checked.

    Raises:
        DataError: the file is damaged, lacks them, holds no images and labels, or is too large.
        ConfigError: it is no regular file.
    """
    path, asked = place_and_split(spec)
    return _load(open_npz(Path(path), DataError), path, asked, spec)


def load_hdf5(spec: str, request: ImageRequest) -> Dataset:
    """The same of an HDF5 file's root group; floats may be integers in 0..255, as the published GTSRB file has them.

    Raises:
        DataError: the file is damaged, lacks them, names other files, or is too large. ConfigError: it is no regular
            file.
    """
    from ibau_jax.data.hdf5 import open_hdf5

    path, asked = place_and_split(spec)
    return _load(open_hdf5(Path(path)), path, asked, spec, bytes_as_float=True)


def _load(
    opened: AbstractContextManager[NamedArrays], path: str, asked: str, spec: str, *, bytes_as_float: bool = False
) -> Dataset:
    with opened as arrays:
        keys = _keys(arrays, asked)
        _check_names(arrays.names, keys, path)
        images, labels = map(arrays.header, keys)
        check_forms(images, labels, spec)
        check_memory(images.nbytes + labels.nbytes, spec)
        return make_dataset(arrays.read(keys[0]), arrays.read(keys[1]), spec, bytes_as_float=bytes_as_float)


def _keys(arrays: NamedArrays, asked: str) -> tuple[str, str]:
    """The names of images and labels, some of which may be missing."""
    if "," in asked:
        images, _, labels = asked.partition(",")
        return images, labels
    named = _named(arrays.names, asked or "test") or (_by_shape(arrays) if asked == "" else None)
    return named or ((f"x_{asked}", f"y_{asked}") if asked else ("x", "y"))


def _named(names: list[str], split: str) -> tuple[str, str] | None:
    """The names of images and labels, where they are called as `PAIRS` has them."""
    lower = {name.lower(): name for name in names}
    pairs = [(one.format(split).lower(), other.format(split).lower()) for one, other in PAIRS]
    return next(((lower[one], lower[other]) for one, other in pairs if one in lower and other in lower), None)


def _by_shape(arrays: NamedArrays) -> tuple[str, str] | None:
    """The names of the only arrays that can be images and as many labels."""
    if len(arrays.names) > SHOWN:
        return None
    forms = {name: form for name in arrays.names if (form := arrays.form(name)) and form.dtype.kind in NUMBERS}
    images = [name for name, form in forms.items() if len(form.shape) in (3, 4)]
    labels = [name for name, form in forms.items() if len(form.shape) in (1, 2)]
    pairs = [(one, other) for one in images for other in labels if forms[one].shape[0] == forms[other].shape[0]]
    return pairs[0] if len(pairs) == 1 else None


def _check_names(names: list[str], wanted: tuple[str, ...], file: str) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        shown = ", ".join(shortened(name, 40) for name in names[:SHOWN]) or "nothing"
        raise DataError(
            f"{file} lacks {shortened(' and '.join(missing), 80)}; it holds {shown}; name images and labels by "
            f"{file}:IMAGES,LABELS"
        )
