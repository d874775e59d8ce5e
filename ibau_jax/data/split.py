"""Which images unlearn and which evaluate: never the same."""

from dataclasses import dataclass

import numpy as np

from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError

DEFAULT_N_CLEAN = 5000


@dataclass(frozen=True)
class Split:
    """The clean set that unlearns, and the images that evaluate.

    Attributes:
        clean_set: images to unlearn with.
        evaluation: images to evaluate on, none of them in `clean_set`.
        duplicates: images left out of `evaluation` because `clean_set` holds the very same pixels.
        used: positions of the clean set's images in the data set that was split.
    """

    clean_set: Dataset
    evaluation: Dataset
    duplicates: int = 0
    used: frozenset[int] = frozenset()


def split_dataset(dataset: Dataset, n_clean: int | None, seed: int) -> Split:
    """The first `n_clean` of a seeded permutation unlearn, the rest evaluates.

    Args:
        dataset: the images.
        n_clean: how many; by default 5000, or half of them where there are fewer than 10,000.
        seed: of the permutation.

    Raises:
        DataError: no image would be left for one of the two.
    """
    count = min(DEFAULT_N_CLEAN, len(dataset) // 2) if n_clean is None else n_clean
    if not 0 < count < len(dataset):
        raise DataError(
            f"a clean set of {count} of the {len(dataset)} images in {dataset.name} leaves none "
            f"to {'unlearn with' if count <= 0 else 'evaluate on'}; choose another --n-clean"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    used = frozenset(order[:count].tolist())
    return Split(dataset.take(order[:count]), dataset.take(order[count:]), used=used)


def separate_clean_set(clean_set: Dataset, dataset: Dataset, n_clean: int | None, seed: int) -> Split:
    """A clean set from elsewhere unlearns (`n_clean` random images of it, by default all); `dataset` evaluates.

    Images of `dataset` that are also in the clean set, pixel by pixel, do not evaluate.

    Raises:
        DataError: the clean set has fewer than `n_clean` images, or no image is left to evaluate on.
    """
    if n_clean is not None:
        if not 0 < n_clean <= len(clean_set):
            raise DataError(
                f"--n-clean {n_clean} of a clean set of {len(clean_set)} images; choose 1 to {len(clean_set)}"
            )
        clean_set = clean_set.take(np.random.default_rng(seed).permutation(len(clean_set))[:n_clean])
    used = {_pixels(image) for image in clean_set.images}
    fresh = np.asarray([_pixels(image) not in used for image in dataset.images], bool)
    if not fresh.any():
        raise DataError(f"every image of {dataset.name} is in the clean set; none is left to evaluate on")
    return Split(clean_set, dataset.take(np.flatnonzero(fresh)), int((~fresh).sum()))


def _pixels(image: np.ndarray) -> bytes:
    scale = 255 if image.dtype != np.uint8 else 1
    return np.round(image * scale).astype(np.uint8).tobytes()
