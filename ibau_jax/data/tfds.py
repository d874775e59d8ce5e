"""TensorFlow Datasets, read without TensorFlow: through `as_data_source` from array_record files."""

import importlib.util
import math
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ibau_jax.data.classes import names_by_label
from ibau_jax.data.dataset import Dataset, checked_images, checked_labels
from ibau_jax.data.images import resized
from ibau_jax.data.layout import ImageRequest
from ibau_jax.data.memory import check_memory
from ibau_jax.errors import DataError, refusing, shortened

FORMAT = "array_record"


def load_tfds(spec: str, request: ImageRequest) -> Dataset:
    """`NAME[/CONFIG][:SPLIT]` of TensorFlow Datasets, SPLIT being `test` by default.

    Images whose size varies within the data set are resized (bicubic) to the model's input. Data that are not prepared
    yet are prepared where TensorFlow is installed.

    Raises:
        DataError: there is no such data set or split, it is not prepared, or its elements have no image and label.
    """
    name, _, split = spec.partition(":")
    split = split or "test"
    builder = _builder(name)
    if not builder.info.splits:
        _prepare(builder, name)
    with refusing(f"tfds:{name}", DataError):  # what lies there may be damaged
        if split not in builder.info.splits:
            raise DataError(f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        features = builder.info.features
        if features is None or "image" not in features or "label" not in features:
            raise DataError(f"tfds:{name} has no 'image' and 'label' to classify")
        input_shape = request.input_shape
        count, shape = builder.info.splits[split].num_examples, features["image"].shape
        check_memory(count * math.prod(input_shape if None in shape else shape), f"tfds:{name}:{split}")
        dataset = _read(builder.as_data_source(split), shape, input_shape, f"tfds:{name}:{split}")
        return replace(dataset, class_names=_class_names(features["label"]))


def _class_names(label: Any) -> tuple[str, ...]:
    """The names of a ClassLabel, which are numbers where the data set has none: then none."""
    labels = {name: place for place, name in enumerate(getattr(label, "names", None) or ())}
    return names_by_label(labels, None)


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format=FORMAT)
    except Exception as error:  # tfds has no common error for a name it can't make sense of
        prepared = _prepared_format(name)
        if prepared is None:
            raise DataError(f"TensorFlow Datasets can't build {name!r}: {_first_line(error)}") from error
        raise DataError(
            f"tfds:{name} is prepared as {prepared}, which only TensorFlow reads; where TensorFlow is installed, "
            f"prepare it as {FORMAT} in another folder (tfds.builder({name!r}, file_format={FORMAT!r}, "
            "data_dir=FOLDER).download_and_prepare()), and set TFDS_DATA_DIR to that folder"
        ) from error


def _prepared_format(name: str) -> str | None:
    """The format that a data set is prepared in, where that is another than `FORMAT`; None where that can't be told."""
    import tensorflow_datasets as tfds

    try:
        found = tfds.builder(name).info.file_format
    except Exception:  # the first attempt's error says more
        return None
    return None if found is None or found.value == FORMAT else str(found.value)


def _prepare(builder: Any, name: str) -> None:
    missing = [module for module in ("tensorflow", "importlib_resources") if importlib.util.find_spec(module) is None]
    if missing:
        raise DataError(
            f"tfds:{name} is not prepared in {builder.data_dir}; preparing it once needs {' and '.join(missing)}: "
            "pip install -e '.[tfds]', or set TFDS_DATA_DIR to where it is prepared as array_record"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # network, disk, checksums: tfds has no common error
        raise DataError(f"preparing tfds:{name} failed: {_first_line(error)}") from error


def _read(source: Any, shape: tuple[int | None, ...], input_shape: tuple[int, int, int], name: str) -> Dataset:
    varying = None in shape[:2]
    images, labels = [], []
    for element in source:
        image = element["image"]
        images.append(resized(Image.fromarray(_colours(image, input_shape[2])), input_shape) if varying else image)
        labels.append(element["label"])
    stacked = np.stack(images) if images else np.zeros((0, *input_shape), np.uint8)
    return Dataset(checked_images(stacked, name), checked_labels(np.asarray(labels, np.int64), name), name)


def _colours(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == 1:
        image = image[:, :, 0]
    return np.stack([image] * 3, axis=2) if channels == 3 and image.ndim == 2 else image


def _first_line(error: Exception) -> str:
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
