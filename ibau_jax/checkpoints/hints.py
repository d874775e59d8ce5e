"""What a checkpoint says of itself beside the weights, so that the command line need not.

Three kinds of file do: ours, in an entry `ibau_jax`, BackdoorBench's `attack_result.pt` and `defense_result.pt`, and
what lies beside the weights in a folder of transformers'.
A file may be hostile, so what it says is data of known kinds: only embedded data and registered attacks can be named,
no hint is a path, and the weights decide where they contradict a hint.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibau_jax.data.sources import EMBEDDED
from ibau_jax.errors import ConfigError
from ibau_jax.image_size import MAX_IMAGE_SIZE, ImageSize
from ibau_jax.models.normalized import NORMALIZATIONS, Normalization
from ibau_jax.triggers import attack_names

KEY = "ibau_jax"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # beside the weights in a folder of transformers'
# BackdoorBench normalises each data set in its own way (utils/aggregate_block/dataset_and_transform_generate.py).
BACKDOORBENCH_NORMALIZATIONS: dict[str, Normalization | None] = {
    "cifar10": NORMALIZATIONS["cifar10"],
    "cifar100": NORMALIZATIONS["cifar100"],
    "imagenet": NORMALIZATIONS["imagenet"],
    "tiny": Normalization((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": None,
    "celeba": None,
}
MAX_CLASSES = 10**6  # a damaged file may name any number
MAX_TEXT = 100  # characters of a name


@dataclass(frozen=True)
class Hints:
    """Defaults for the command line; None where the checkpoint does not say.

    Attributes:
        source: who wrote the file, if it is of a known kind.
        model: an architecture's name, in the file's spelling.
        num_classes: of the classifier.
        image_size: height and width of the images.
        data_name: what the file calls its data set.
        normalization: of the images, or None.
        dataset: embedded data to evaluate on.
        attack: a registered attack.
        target_label: the class that the attack aims at.
        triggered_folder: whether triggered test images were stored in a folder beside the file.
        triggers: whether the attack's triggers were stored in a file beside it.
        class_names: in the order of the classes.
    """

    source: str | None = None
    model: str | None = None
    num_classes: int | None = None
    image_size: ImageSize | None = None
    data_name: str | None = None
    normalization: Normalization | None = None
    dataset: str | None = None
    attack: str | None = None
    target_label: int | None = None
    triggered_folder: bool = False
    triggers: bool = False
    class_names: tuple[str, ...] | None = None


def read_hints(metadata: Mapping[str, Any]) -> Hints:
    """The hints in a checkpoint's metadata; what is no valid hint is left out."""
    entry = metadata.get(KEY)
    if isinstance(entry, dict):
        return _own_hints(entry)
    if _text(metadata.get("model_name")) and "num_classes" in metadata:
        return _backdoorbench_hints(metadata)
    if isinstance(config := metadata.get(CONFIG), dict):
        return _transformers_hints(config, metadata.get(PREPROCESSOR))
    return Hints()


def _own_hints(entry: Mapping[Any, Any]) -> Hints:
    dataset, attack, normalize = (_text(entry.get(name)) for name in ("dataset", "attack", "normalize"))
    return Hints(
        source="ibau_jax",
        model=_text(entry.get("model")),
        image_size=_image_size(entry.get("image_size")),
        normalization=NORMALIZATIONS.get(normalize) if normalize else None,
        dataset=dataset if dataset and dataset.partition(":")[0] in EMBEDDED else None,
        attack=attack if attack in attack_names() else None,
        target_label=_integer(entry.get("target_label"), 0, MAX_CLASSES - 1),
        triggers=entry.get("triggers") is True,
    )


def _backdoorbench_hints(metadata: Mapping[str, Any]) -> Hints:
    """Of `save_attack_result` and `save_defense_result`: the latter has no data."""
    data = _text(metadata.get("clean_data"))
    return Hints(
        source="BackdoorBench",
        model=_text(metadata["model_name"]),
        num_classes=_integer(metadata["num_classes"], 1, MAX_CLASSES),
        image_size=_image_size(metadata.get("img_size")),
        data_name=data,
        normalization=BACKDOORBENCH_NORMALIZATIONS.get(data) if data else None,
        target_label=_single_target(metadata.get("bd_test")),
        triggered_folder="bd_test" in metadata,
    )


def _transformers_hints(config: Mapping[Any, Any], preprocessor: Any) -> Hints:
    """Of a model's and its image processor's settings."""
    labels = config.get("id2label")
    said: Mapping[Any, Any] = preprocessor if isinstance(preprocessor, dict) else {}
    sizes = (config.get("image_size"), said.get("crop_size"), said.get("size"))
    return Hints(
        source="transformers",
        num_classes=len(labels) if isinstance(labels, dict) and labels else None,
        image_size=next(filter(None, map(_image_size, sizes)), None),
        normalization=_processed(said),
        class_names=_names_of(labels),
    )


def _image_size(said: Any) -> ImageSize | None:
    """An image's size, of a number, of height and width in a row, or of a dict with them, or with the shortest edge."""
    if isinstance(said, dict):
        said = [said[key] for key in ("height", "width") if key in said] or said.get("shortest_edge")
    sides = said[:2] if isinstance(said, (list, tuple)) else (said,)
    whole = [side for side in (_integer(side, 1, MAX_IMAGE_SIZE) for side in sides) if side]
    return ImageSize(whole[0], whole[-1]) if whole and len(whole) == len(sides) else None


def _processed(said: Mapping[Any, Any]) -> Normalization | None:
    """What an image processor normalises with, of images in [0, 1]."""
    if said.get("do_normalize") is False or said.get("do_rescale") is False:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, ConfigError):
        return Normalization(tuple(map(float, said["image_mean"])), tuple(map(float, said["image_std"])))
    return None


def _names_of(labels: Any) -> tuple[str, ...] | None:
    """The classes' names in the order of their numbers, where all are there and are short texts."""
    if not isinstance(labels, dict) or not labels:
        return None
    names = [_text(labels.get(str(number))) for number in range(len(labels))]
    return tuple(name for name in names if name) if all(names) else None


def _single_target(state: Any) -> int | None:
    """The one class that all triggered test images are labelled with, as `bd_test` lists them."""
    container = state.get("bd_data_container") if isinstance(state, dict) else None
    images = container.get("data_dict") if isinstance(container, dict) else None
    if not isinstance(images, dict):
        return None
    infos = [image.get("other_info") for image in images.values() if isinstance(image, dict)]
    labels = {_integer(info[0], 0, MAX_CLASSES - 1) for info in infos if isinstance(info, (list, tuple)) and info}
    return labels.pop() if len(labels) == 1 else None


def _integer(value: Any, lowest: int, highest: int) -> int | None:
    """A whole number in that range as plain int; NumPy's and arrays of one count, True and False do not."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        return None
    return int(value) if lowest <= int(value) <= highest else None


def _text(value: Any) -> str | None:
    """A name as plain text, of at most MAX_TEXT characters; NumPy's counts."""
    return str(value) if isinstance(value, str) and 0 < len(value) <= MAX_TEXT else None
