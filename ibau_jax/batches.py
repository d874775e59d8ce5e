"""Clean images as equally large batches, so that a step compiles once."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ibau_jax.data.dataset import Dataset

AnyArray: TypeAlias = Any  # jax.Array on the device or np.ndarray on the host


class Batches(NamedTuple):
    """Stacked batches, or one of them without the leading axis b. The last one may be filled up with empty images.

    Attributes:
        images: uint8 in 0..255 or float32 in [0, 1].
        labels: true classes.
        weights: 1 for an image, 0 for filling.
    """

    images: Shaped[AnyArray, "b n h w c"]
    labels: Int[AnyArray, "b n"]
    weights: Float[AnyArray, "b n"]


def make_batches(dataset: Dataset, batch_size: int, *, filled: int | None = None) -> Batches:
    """Batches in the data set's order; a data set smaller than a batch makes one batch of its own size.

    Args:
        dataset: the images.
        batch_size: real images in a batch.
        filled: length to fill every batch up to, by default, and at least, the smaller of `batch_size` and the
            data set's.
    """
    size = min(batch_size, len(dataset))
    count = -(-len(dataset) // size)

    def stack(array: np.ndarray) -> np.ndarray:
        missing = np.zeros((count * size - len(array), *array.shape[1:]), array.dtype)
        batches = np.concatenate([array, missing]).reshape(count, size, *array.shape[1:])
        filling = np.zeros((count, (filled or size) - size, *array.shape[1:]), array.dtype)
        return np.concatenate([batches, filling], axis=1)

    weights = np.ones(len(dataset), np.float32)
    return Batches(stack(dataset.images), stack(dataset.labels.astype(np.int32)), stack(weights))


def count_parts(size: int, microbatch: int | None) -> int:
    """How many parts of at most `microbatch` images a batch of `size` goes through the model in."""
    return 1 if microbatch is None else -(-size // microbatch)


def filled_size(size: int, microbatch: int | None, multiple: int) -> int:
    """The length that a batch is filled up to, so that its parts are equal and each a multiple of `multiple`."""
    parts = count_parts(size, microbatch)
    return parts * multiple * -(-size // (parts * multiple))


def in_parts(array: Shaped[Array, " n *rest"], parts: int) -> Shaped[Array, "parts m *rest"]:
    """Every `parts`-th image makes a part, so that one spread over devices is made of something of each."""
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)


def to_unit(images: Shaped[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Images in [0, 1], float32; uint8 is divided by 255."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def assigned_images(
    key: jax.Array, weights: Float[AnyArray, "b n"], portion: float, perturbations: int
) -> Int[np.ndarray, "b n"]:
    """The selection m_b of the outer loss: which of the perturbations each image gets; -1 for none.

    Those that get one are max(1, ⌊portion·n_b⌋) random images of each batch b, n_b of which are images. They get the
    perturbations in turn, which begins with another one in each batch, so that all are used where images are few.
    """
    sizes = np.sum(weights, axis=1)
    counts = np.maximum(1, np.floor(portion * sizes + 1e-9))
    order = np.where(np.asarray(weights) > 0, jax.random.uniform(key, weights.shape), np.inf)
    ranks = np.argsort(np.argsort(order, axis=1), axis=1)
    first = np.asarray(jax.random.randint(jax.random.fold_in(key, 0), (len(sizes), 1), 0, perturbations))
    return np.where(ranks < counts[:, None], (first + ranks) % perturbations, -1)


def patched_images(key: jax.Array, weights: Float[AnyArray, "b n"], portion: float) -> Float[np.ndarray, "b n"]:
    """The selection m_b as a mask, where there is one perturbation: 1 where an image is chosen."""
    return (assigned_images(key, weights, portion, 1) >= 0).astype(np.float32)
