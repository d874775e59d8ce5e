"""Arrays in files: NumPy archives and the published GTSRB HDF5 layout."""

import os
from pathlib import Path

from ibau_jax.data.dataset import NUMBERS, Dataset, check_forms, make_dataset
from ibau_jax.data.memory import check_memory
from ibau_jax.data.npy import Arrays, open_npz
from ibau_jax.errors import DataError, shortened

SHOWN = 10  # names in a message


def load_npz(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """Images and labels of a NumPy archive: `x` and `y`; or `x_test` and `y_test`, as Keras has them, and `x_train` and
    `y_train` for `FILE.npz:train`; or the only arrays that can be images and as many labels.

    Nothing pickled is read, and nothing before its size is checked.

    Raises:
        DataError: the file is damaged, lacks them, holds no images and labels, or is too large.
        ConfigError: it is no regular file.
    """
    path, split = _split(spec)
    with open_npz(Path(path), DataError) as arrays:
        keys = _named(arrays.names, split) or _by_shape(arrays) or ("x", "y")
        _check_names(arrays.names, keys, path)
        images, labels = map(arrays.header, keys)
        check_forms(images, labels, spec)
        check_memory(images.nbytes + labels.nbytes, spec)
        return make_dataset(arrays.read(keys[0]), arrays.read(keys[1]), spec)


def _split(spec: str) -> tuple[str, str]:
    """A file's path, and which of its splits is meant."""
    return (spec, "test") if os.path.exists(spec) else (spec.rpartition(":")[0], spec.rpartition(":")[2])


def _named(names: list[str], split: str) -> tuple[str, str] | None:
    """The names of images and labels, where they are called so."""
    lower = {name.lower(): name for name in names}
    pairs = (("x", "y"), (f"x_{split}", f"y_{split}"))
    return next(((lower[one], lower[other]) for one, other in pairs if one in lower and other in lower), None)


def _by_shape(arrays: Arrays) -> tuple[str, str] | None:
    """The names of the only arrays that can be images and as many labels."""
    if len(arrays.names) > SHOWN:
        return None
    headers = {name: arrays.header(name) for name in arrays.names}
    images = [name for name, header in headers.items() if len(header.shape) in (3, 4) and header.dtype.kind in NUMBERS]
    labels = [name for name, header in headers.items() if len(header.shape) in (1, 2) and header.dtype.kind in NUMBERS]
    pairs = [(one, other) for one in images for other in labels if headers[one].shape[0] == headers[other].shape[0]]
    return pairs[0] if len(pairs) == 1 else None


def load_hdf5(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`X_test` and one-hot `Y_test` of an HDF5 file; `FILE.h5:train` for `X_train` and `Y_train`.

    Raises:
        DataError: the file is damaged, lacks the split, names other files, or is too large.
        ConfigError: it is no regular file.
    """
    from ibau_jax.data.hdf5 import open_hdf5

    path, split = _split(spec)
    keys = (f"X_{split}", f"Y_{split}")
    with open_hdf5(Path(path)) as arrays:
        _check_names(arrays.names, keys, path)
        images, labels = (arrays.array(key) for key in keys)
        check_forms(images, labels, spec)
        check_memory(images.nbytes + labels.nbytes, spec)
        return make_dataset(arrays.read(keys[0]), arrays.read(keys[1]), spec, bytes_as_float=True)


def _check_names(names: list[str], wanted: tuple[str, ...], file: str) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        shown = ", ".join(shortened(name, 40) for name in names[:SHOWN]) or "nothing"
        raise DataError(f"{file} lacks {shortened(' and '.join(missing), 80)}; it holds {shown}")
