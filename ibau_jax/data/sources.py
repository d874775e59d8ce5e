"""Where images come from: one function a source, found by the spec's form.

To add a source, write a function `(argument, input_shape) -> Dataset` in a module here and register it in `SOURCES`
(for specs like `name:argument`) or in `SUFFIXES` (for files).
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import is_folder, load_folder
from ibau_jax.errors import DataError, quoted, shortened
from ibau_jax.files import check_regular

Source = Callable[[str, tuple[int, int, int]], Dataset]

# Module and function, imported when used: h5py, scikit-learn and tensorflow_datasets take long to import.
SOURCES = {"digits": ("digits", "load_digits"), "tfds": ("tfds", "load_tfds")}
SUFFIXES = {".npz": ("arrays", "load_npz"), ".h5": ("arrays", "load_hdf5"), ".hdf5": ("arrays", "load_hdf5")}
# The published command line's names.
ALIASES = {"cifar10": "tfds:cifar10:test", "gtsrb": "tfds:visual_domain_decathlon/gtsrb:validation"}
EMBEDDED = ("digits",)

FORMS = (
    "digits, tfds:NAME[/CONFIG][:SPLIT], a .npz or .h5 file, or a folder with one sub-folder a class "
    "(CLASS/NAME.png or CLASS/images/NAME.png)"
)


def load_dataset(
    spec: str, input_shape: tuple[int, int, int], *, num_classes: int | None = None, class_order: str | None = None
) -> Dataset:
    """Loads the images that a spec names.

    Args:
        spec: `digits[:train|test]`, `tfds:NAME[/CONFIG][:SPLIT]`, `FILE.npz`, `FILE.h5[:train|test]`, or a folder.
        input_shape: the model's height, width and channels; images of varying size are resized to it.
        num_classes: how many classes the model has: a folder's class folders are compared with it.
        class_order: which labels a folder's class folders have: `number`, `text`, or a file with their names in the
            order of labels; by default their numbers where they are numbers, else their places in the order of text.

    Raises:
        DataError: there is no such source, or it can't be read, or its classes are not those of the model.
        ConfigError: a file is no regular file.
    """
    spec = ALIASES.get(spec, spec)
    if is_folder(spec):
        return load_folder(spec, input_shape, num_classes, class_order)
    if class_order is not None:
        raise DataError(f"only a folder of class folders has a class order to choose; {shortened(spec)} is none")
    name, _, argument = spec.partition(":")
    if name in SOURCES and not os.path.exists(spec):
        return _source(SOURCES[name])(argument, input_shape)
    file = Path(spec if os.path.exists(spec) else spec.rpartition(":")[0] or spec)
    if file.suffix.lower() in SUFFIXES:
        if not os.path.exists(file):
            raise DataError(f"there is no file {shortened(file)}")
        check_regular(file)
        return _source(SUFFIXES[file.suffix.lower()])(spec, input_shape)
    raise DataError(f"there is no data set {quoted(spec)}; name one of: {FORMS}")


def _source(place: tuple[str, str]) -> Source:
    module, function = place
    source: Source = getattr(importlib.import_module(f"ibau_jax.data.{module}"), function)
    return source
