"""The embedded data: scikit-learn's handwritten digits (1797 real 8x8 scans), brought to 32x32 RGB."""

import numpy as np
from PIL import Image

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.layout import ImageRequest
from ibau_jax.errors import DataError

TRAIN_SIZE = 997
SPLIT_SEED = 20220131


def load_digits(split: str, request: ImageRequest) -> Dataset:
    """The split `train` (997 images, for training examples) or `test` (the other 800; the default).

    Images are uint8 (n, 32, 32, 3), enlarged bilinearly and grey.

    Raises:
        DataError: there is no such split.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    splits = {"train": order[:TRAIN_SIZE], "test": order[TRAIN_SIZE:], "": order[TRAIN_SIZE:]}
    if split not in splits:
        raise DataError(f"digits has no split {split!r}; use digits:train or digits:test")
    chosen = splits[split]
    images = np.stack([_enlarged(image) for image in digits.images[chosen]])
    return Dataset(images, digits.target[chosen].astype(np.int64), f"digits:{split or 'test'}")


def _enlarged(image: np.ndarray) -> np.ndarray:
    grey = np.round(image * (255 / 16)).astype(np.uint8)  # the scans have 17 grey levels
    large = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
    return np.repeat(large[:, :, None], 3, axis=2)
