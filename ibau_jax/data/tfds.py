"""TensorFlow Datasets, read without TensorFlow: through `as_data_source` from array_record files."""

import importlib.util
from typing import Any

import numpy as np
from PIL import Image

from ibau_jax.data.dataset import Dataset, checked_images, checked_labels
from ibau_jax.data.folder import resized
from ibau_jax.errors import DataError


def load_tfds(spec: str, input_shape: tuple[int, int, int]) -> Dataset:
    """`NAME[/CONFIG][:SPLIT]` of TensorFlow Datasets, SPLIT being `test` by default.

    Images whose size varies within the data set are resized (bicubic) to `input_shape`. Data that are not prepared
    yet are prepared where TensorFlow is installed.

    Raises:
        DataError: there is no such data set or split, it is not prepared, or its elements have no image and label.
    """
    import tensorflow_datasets as tfds

    name, _, split = spec.partition(":")
    split = split or "test"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # tfds has no common error for a name it can't make sense of
        raise DataError(f"TensorFlow Datasets can't build {name!r}: {_first_line(error)}") from error
    if not builder.info.splits:
        _prepare(builder, name)
    if split not in builder.info.splits:
        raise DataError(f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    features = builder.info.features
    if features is None or "image" not in features or "label" not in features:
        raise DataError(f"tfds:{name} has no 'image' and 'label' to classify")
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise DataError(f"tfds:{name} is prepared in a format other than array_record; prepare it anew") from error
    return _read(source, features["image"].shape, input_shape, f"tfds:{name}:{split}")


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
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
