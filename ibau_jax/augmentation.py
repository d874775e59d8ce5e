"""Images as they might also have been taken: moved a little, mirrored; and mixed with one another."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from ibau_jax.batches import AnyArray
from ibau_jax.config import Mirror
from ibau_jax.data.dataset import Dataset
from ibau_jax.metrics import predict

TOLERANCE = 0.03  # of accuracy; mirrored traffic signs and digits cost half of it, mirrored photographs a hundredth


@functools.partial(jax.jit, static_argnums=(2, 3))
def augmented(key: Array, images: Shaped[Array, "n h w c"], crop: int, flip: bool) -> Shaped[Array, "n h w c"]:
    """Each image moved by up to `crop` pixels, its border repeated, and mirrored half of the time if `flip`."""
    move_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)), mode="edge")
    corners = jax.random.randint(move_key, (len(images), 2), 0, 2 * crop + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    moved = cut(padded, corners)
    mirrored = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (len(images),))
    return jnp.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)


class Mixture(NamedTuple):
    """What is mixed into images.

    Attributes:
        labels: of the others.
        shares: how much of them there is, in [0, 0.5].
    """

    labels: Int[AnyArray, "*b n"]
    shares: Float[AnyArray, "*b n"]


@functools.partial(jax.jit, static_argnums=3)
def mixed(
    key: Array, images: Shaped[Array, "n h w c"], labels: Int[Array, " n"], share: float
) -> tuple[Shaped[Array, "n h w c"], Mixture]:
    """Into each image something of another, up to `share` of it (mixup, Zhang et al., 2018)."""
    order_key, share_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(images))
    shares = jax.random.uniform(share_key, (len(images),), maxval=share)
    whole, others = images.astype(jnp.float32), shares[:, None, None, None]
    mixture = (1 - others) * whole + others * whole[order]
    mixture = (jnp.round(mixture) if images.dtype == jnp.uint8 else mixture).astype(images.dtype)
    return mixture, Mixture(labels[order], shares)


def may_mirror(mirror: Mirror, model: nnx.Module, images: Dataset) -> bool:
    """Whether images may be mirrored: as `mirror` says, or where the model classifies mirrored ones as well."""
    if mirror != "tolerated":
        return mirror == "always"
    mirrored = Dataset(np.ascontiguousarray(images.images[:, :, ::-1]), images.labels)
    right, still = (np.mean(predict(model, some) == images.labels) for some in (images, mirrored))
    return bool(still >= right - TOLERANCE)
