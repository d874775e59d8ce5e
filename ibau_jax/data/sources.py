"""Where images come from: one function a source, found by the spec's form.

To add a source, write a function `(spec, ImageRequest) -> Dataset` in a module here and register it in `SOURCES` (for
specs like `name:argument`, of which it gets the argument) or in `SUFFIXES` (for files). For a data set in a folder,
write a module with its `LAYOUTS` and register it in `FOLDERS`.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import load_folder
from ibau_jax.data.layout import ImageRequest, Layout, place_and_split
from ibau_jax.errors import DataError, quoted, refusing, shortened
from ibau_jax.files import check_regular

Source = Callable[[str, ImageRequest], Dataset]

# Module and function, imported when used: h5py, scikit-learn and tensorflow_datasets take long to import.
SOURCES = {"digits": ("digits", "load_digits"), "tfds": ("tfds", "load_tfds")}
SUFFIXES = {
    ".npz": ("arrays", "load_npz"),
    ".h5": ("arrays", "load_hdf5"),
    ".hdf5": ("arrays", "load_hdf5"),
    ".parquet": ("parquet", "load_parquet"),
}
# Modules of folders' layouts: data sets as they are downloaded, and where there is none of them, what they may also be.
FOLDERS = (("cifar", "idx", "gtsrb", "tiny_imagenet", "parquet"), ("split_folders",))
# The published command line's names.
ALIASES = {"cifar10": "tfds:cifar10:test", "gtsrb": "tfds:visual_domain_decathlon/gtsrb:validation"}
EMBEDDED = ("digits",)
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".rar", ".7z")

FORMS = (
    "digits, tfds:NAME[/CONFIG][:SPLIT], a .npz, .h5 or .parquet file, a folder with one sub-folder a class "
    "(CLASS/NAME.png or CLASS/images/NAME.png), or a folder of CIFAR, MNIST, GTSRB, Tiny ImageNet or parquet files as "
    "downloaded"
)


def load_dataset(
    spec: str, input_shape: tuple[int, int, int], *, num_classes: int | None = None, class_order: str | None = None
) -> Dataset:
    """Loads the images that a spec names.

    Args:
        spec: `digits[:train|test]`, `tfds:NAME[/CONFIG][:SPLIT]`, `FILE.npz` or `FILE.h5`, with `:train|test` or the
            arrays' names `:IMAGES,LABELS`, `FILE.parquet`, or a folder: class folders, or a data set as it is
            downloaded, with `[:SPLIT]`.
        input_shape: the model's height, width and channels; images of folders and parquet files are resized to it.
        num_classes: how many classes the model has: class folders, and names of classes, are compared with it.
        class_order: which labels a folder's class folders have: `number`, `text`, or a file with their names in the
            order of labels; by default their numbers where they are numbers, else their places in the order of text.

    Raises:
        DataError: there is no such source, or it can't be read, or its classes are not those of the model.
        ConfigError: a file is no regular file.
    """
    spec = ALIASES.get(spec, spec)
    request = ImageRequest(input_shape, num_classes, class_order)
    if class_order is not None and not has_class_folders(spec):
        raise DataError(f"only a folder of class folders has a class order to choose; {shortened(spec)} is none")
    if (folder := _folder_and_split(spec)) is not None:
        return _load_folder(*folder, request)
    name, _, argument = spec.partition(":")
    if name in SOURCES and not os.path.exists(spec):
        return _source(SOURCES[name])(argument, request)
    file = Path(place_and_split(spec)[0])
    if file.suffix.lower() in SUFFIXES:
        if not os.path.exists(file):
            raise DataError(f"there is no file {shortened(file)}")
        check_regular(file)
        return _source(SUFFIXES[file.suffix.lower()])(spec, request)
    if file.suffix.lower() in ARCHIVES and os.path.exists(file):
        raise DataError(f"{shortened(file)} is an archive; unpack it, and name the folder that comes out")
    raise DataError(f"there is no data set {quoted(spec)}; name one of: {FORMS}")


def has_class_folders(spec: str) -> bool:
    """Whether a spec of `load_dataset` names a folder whose labels come from class folders, so that they have an order.

    Raises:
        DataError: the folder can't be listed, or holds several data sets.
    """
    folder = _folder_and_split(spec)
    found = folder and _downloaded(folder[0])
    return folder is not None and (found is None or found[0].has_class_folders)


def _folder_and_split(spec: str) -> tuple[Path, str] | None:
    """The folder and the split that a spec names, or None; `digits:test` is never a folder called `digits`."""
    place, split = place_and_split(spec)
    is_source = split != "" and place in SOURCES
    return (Path(place), split) if os.path.isdir(place) and not is_source else None


def _load_folder(folder: Path, split: str, request: ImageRequest) -> Dataset:
    found = _downloaded(folder)
    if found is not None:
        return found[0].load(found[1], split, request)
    if split:
        raise DataError(f"{folder} has no split {shortened(split, 40)!r}: it is no data set with splits that is known")
    return load_folder(str(folder), request)


def _downloaded(folder: Path) -> tuple[Layout, Path] | None:
    """The data set in a folder, as its layout and where it lies; None for what else the folder may hold.

    Raises:
        DataError: there are several, or a folder can't be listed.
    """
    for modules in FOLDERS:
        layouts = [layout for module in modules for layout in _module(module).LAYOUTS]
        with refusing(str(folder), DataError):
            found = [(layout, root) for layout in layouts for root in layout.find(folder)]
        if len(found) > 1:
            places = ", ".join(str(root) for _, root in found)
            raise DataError(f"{folder} holds several data sets; name one: {shortened(places)}")
        if found:
            return found[0]
    return None


def _source(place: tuple[str, str]) -> Source:
    module, function = place
    source: Source = getattr(_module(module), function)
    return source


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"ibau_jax.data.{name}")
