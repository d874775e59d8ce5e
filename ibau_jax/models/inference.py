"""What a model, taken as a function of images, is."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

NO_CLASS = -1


def count_classes(model: nnx.Module, input_shape: tuple[int, ...]) -> int:
    """The number of logits that `model` gives an image of `input_shape`, without computing them."""
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    logits = jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, image)
    return int(logits.shape[-1])


def classes_of(logits: Float[Array, "n classes"]) -> Int[Array, " n"]:
    """The class of each image; `NO_CLASS` where a logit is NaN or infinite, which argmax would take for a class."""
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), NO_CLASS)
