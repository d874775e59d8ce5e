"""A model as a pure function of its weights and images."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.execution import Execution

Params: TypeAlias = Any  # a pytree of float arrays
Rest: TypeAlias = Any  # a pytree of arrays
Model = TypeVar("Model", bound=nnx.Module)
Forward = Callable[[Params, Float[Array, "n h w c"]], Float[Array, "n classes"]]
Apply = Callable[[Rest, Params, Float[Array, "n h w c"]], Float[Array, "n classes"]]
Run = Callable[[Params, Rest, Float[Array, "n h w c"]], tuple[Float[Array, "n classes"], Rest]]


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


def make_run(model: nnx.Module) -> Run:
    """The model as a function of its weights and images that gives logits and what else it then holds."""
    graph = nnx.split(model)[0]

    def run(params: Params, rest: Rest, images: Float[Array, "n h w c"]) -> tuple[Float[Array, "n classes"], Rest]:
        merged = nnx.merge(graph, params, rest, copy=True)
        logits = merged(images)
        return logits, split_weights(merged).rest

    return run


def with_weights(model: Model, weights: Weights) -> Model:
    """A model with other weights, in inference mode."""
    merged: Model = nnx.merge(nnx.split(model)[0], *weights)
    set_training(merged, False)
    return merged


def training_copy(model: nnx.Module) -> nnx.Module:
    """The same model with BatchNorm in training mode."""
    copy: nnx.Module = nnx.clone(model)
    set_training(copy, True)
    return copy


def set_training(model: nnx.Module, training: bool) -> None:
    """BatchNorm with the batch's statistics, which update the running ones; or with the running ones."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = not training
