"""Folders of splits, each with class folders: `train/CLASS/NAME.png`, `val/CLASS/NAME.png`."""

from pathlib import Path

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import INNER, class_folders, load_folder
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, split_of
from ibau_jax.errors import DataError


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits in `folder`, by the word that specs have for them.

    A folder with the name of a split is one where it holds folders: a class may be called `train` too.

    Raises:
        DataError: two are of one split, or a folder can't be listed.
    """
    found: dict[str, Path] = {}
    for place in sorted(class_folders(str(folder))):
        split = split_of(place.name)
        if split is None or {inner.name for inner in class_folders(str(place))} <= {INNER}:
            continue
        if split in found:
            raise DataError(f"{found[split]} and {place} are one split; name the one that is meant")
        found[split] = place
    return found


def find(folder: Path) -> list[Path]:
    """The folder itself where it holds folders of splits."""
    return [folder] if split_folders(folder) else []


def load(folder: Path, split: str, request: ImageRequest) -> Dataset:
    """The images of a split; raises as `load_folder`, and DataError where the split is not there."""
    places = split_folders(folder)
    return load_folder(str(places[chosen_split(split, places, folder)]), request)


LAYOUTS = (Layout(find, load, has_class_folders=True),)
