"""A model as a pure function of its weights and images."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.execution import Execution

Params: TypeAlias = Any  # a pytree of float arrays
Rest: TypeAlias = Any  # a pytree of arrays
Forward = Callable[[Params, Float[Array, "n h w c"]], Float[Array, "n classes"]]
Apply = Callable[[Rest, Params, Float[Array, "n h w c"]], Float[Array, "n classes"]]


class Weights(NamedTuple):
    """θ, and what else the model holds, such as BatchNorm's statistics."""

    params: Params
    rest: Rest


def split_weights(model: nnx.Module) -> Weights:
    """The arrays of a model."""
    _, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return Weights(params, rest)


def make_apply(model: nnx.Module, execution: Execution) -> Apply:
    """The model as a function of what else it holds, its parameters and images."""
    graph, _, _ = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def apply(rest: Any, params: Any, images: jax.Array) -> jax.Array:
        rest, params, images = execution.compute_type((rest, params, images))
        return nnx.merge(graph, params, rest)(images).astype(jnp.float32)

    return apply
