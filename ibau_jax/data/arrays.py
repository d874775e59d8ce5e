"""Arrays in files: NumPy archives and the published GTSRB HDF5 layout."""

import zipfile
from pathlib import Path

import numpy as np

from ibau_jax.data.dataset import Dataset, make_dataset
from ibau_jax.errors import DataError


def load_npz(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`x` and `y` of a NumPy archive; nothing pickled is read.

    Raises:
        DataError: the file is damaged, lacks `x` or `y`, or holds no images and labels.
    """
    try:
        with open(spec, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [key for key in ("x", "y") if key not in arrays]
            if missing:
                raise DataError(f"{spec} lacks {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
            images, labels = arrays["x"], arrays["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"can't read {spec}: {str(error)[:200]}") from error
    return make_dataset(images, labels, spec)


def load_hdf5(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`X_test` and one-hot `Y_test` of an HDF5 file; `FILE.h5:train` for `X_train` and `Y_train`.

    Raises:
        DataError: the file is damaged, or lacks the split.
    """
    import h5py

    path, split = (spec, "test") if Path(spec).exists() else (spec.rpartition(":")[0], spec.rpartition(":")[2])
    keys = (f"X_{split}", f"Y_{split}")
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise DataError(f"{path} lacks {' and '.join(missing)}; it holds {', '.join(file) or 'nothing'}")
            images, labels = (np.asarray(file[key]) for key in keys)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"can't read {path}: {str(error)[:200]}") from error
    return make_dataset(images, labels, spec, bytes_as_float=True)
