"""Arrays in files: NumPy archives and the published GTSRB HDF5 layout."""

import os
from pathlib import Path

from ibau_jax.data.dataset import Dataset, check_forms, make_dataset
from ibau_jax.data.memory import check_memory
from ibau_jax.data.npy import open_npz
from ibau_jax.errors import DataError, shortened

SHOWN = 10  # names in a message


def load_npz(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`x` and `y` of a NumPy archive; nothing pickled is read, and nothing before its size is checked.

    Raises:
        DataError: the file is damaged, lacks `x` or `y`, holds no images and labels, or is too large.
        ConfigError: it is no regular file.
    """
    with open_npz(Path(spec), DataError) as arrays:
        _check_names(arrays.names, ("x", "y"), spec)
        images, labels = arrays.header("x"), arrays.header("y")
        check_forms(images, labels, spec)
        check_memory(images.nbytes + labels.nbytes, spec)
        return make_dataset(arrays.read("x"), arrays.read("y"), spec)


def load_hdf5(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`X_test` and one-hot `Y_test` of an HDF5 file; `FILE.h5:train` for `X_train` and `Y_train`.

    Raises:
        DataError: the file is damaged, lacks the split, names other files, or is too large.
        ConfigError: it is no regular file.
    """
    from ibau_jax.data.hdf5 import open_hdf5

    path, split = (spec, "test") if os.path.exists(spec) else (spec.rpartition(":")[0], spec.rpartition(":")[2])
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
