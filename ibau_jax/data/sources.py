"""Where images come from: one function a source, found by the spec's form.

To add a source, write a function `(argument, input_shape) -> Dataset` in a module here and register it in `SOURCES`
(for specs like `name:argument`) or in `SUFFIXES` (for files).
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError

Source = Callable[[str, tuple[int, int, int]], Dataset]

# Module and function, imported when used: h5py, scikit-learn and tensorflow_datasets take long to import.
SOURCES = {"digits": ("digits", "load_digits"), "tfds": ("tfds", "load_tfds")}
SUFFIXES = {".npz": ("arrays", "load_npz"), ".h5": ("arrays", "load_hdf5"), ".hdf5": ("arrays", "load_hdf5")}
FOLDER = ("folder", "load_folder")
# The published command line's names.
ALIASES = {"cifar10": "tfds:cifar10:test", "gtsrb": "tfds:visual_domain_decathlon/gtsrb:validation"}
EMBEDDED = ("digits",)

FORMS = "digits, tfds:NAME[/CONFIG][:SPLIT], a .npz or .h5 file, or a folder with one sub-folder a class"


def load_dataset(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """Loads the images that a spec names.

    Args:
        spec: `digits[:train|test]`, `tfds:NAME[/CONFIG][:SPLIT]`, `FILE.npz`, `FILE.h5[:train|test]`, or a folder.
        input_shape: the model's height, width and channels; images of varying size are resized to it.

    Raises:
        DataError: there is no such source, or it can't be read.
    """
    spec = ALIASES.get(spec, spec)
    name, _, argument = spec.partition(":")
    if name in SOURCES and not Path(spec).exists():
        return _source(SOURCES[name])(argument, input_shape)
    file = Path(spec if Path(spec).exists() else spec.rpartition(":")[0] or spec)
    if file.suffix.lower() in SUFFIXES:
        if not file.is_file():
            raise DataError(f"there is no file {file}")
        return _source(SUFFIXES[file.suffix.lower()])(spec, input_shape)
    if Path(spec).is_dir():
        return _source(FOLDER)(spec, input_shape)
    raise DataError(f"there is no data set {spec!r}; name one of: {FORMS}")


def _source(place: tuple[str, str]) -> Source:
    module, function = place
    source: Source = getattr(importlib.import_module(f"ibau_jax.data.{module}"), function)
    return source
