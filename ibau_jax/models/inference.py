"""What a model, taken as a function of images, is."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ibau_jax.errors import DataError, shortened

NO_CLASS = -1


def count_classes(model: nnx.Module, input_shape: tuple[int, ...]) -> int:
    """The number of logits that `model` gives an image of `input_shape`, without computing them.

    Raises:
        DataError: it takes no such images.
    """
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    try:
        logits = jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, image)
    except (TypeError, ValueError) as error:
        size = "x".join(map(str, input_shape))
        raise DataError(f"the model does not take images of {size}: {shortened(error)}") from error
    return int(logits.shape[-1])


def classes_of(logits: Float[Array, "n classes"]) -> Int[Array, " n"]:
    """The class of each image; `NO_CLASS` where a logit is NaN or infinite, which argmax would take for a class."""
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), NO_CLASS)
