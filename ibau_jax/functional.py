"""A model as a pure function of its weights and images, and means over images that spare memory."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.batches import count_parts, in_parts
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


def structure(model: nnx.Module) -> Hashable:
    """What two models have in common that the same compiled program computes: their layers, and their arrays' shapes
    and dtypes.
    """
    graph, state = nnx.split(model)
    return graph, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))


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


def sequenced(tree: Any, other: Any) -> Any:
    """Makes `tree` available only when `other` is, so that XLA does not merge what follows with what was before.

    Both are pytrees of arrays. The dependency is one in the numbers, since XLA:CPU drops `optimization_barrier` before
    it orders the program.
    """
    waited_for = 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(other))
    return jax.tree.map(lambda leaf: leaf + waited_for, tree)


def mean_over(
    delta: Any,
    params: Params,
    batch: Any,
    weights: Float[Array, " n"],
    losses: Callable[[Any, Params, Any], Float[Array, " m"]],
    execution: Execution,
) -> Float[Array, ""]:
    """Computes the mean of `losses(delta, params, batch)` over the images with weight 1, in parts if `execution` asks.

    A part's activations are computed again for its gradient, and parts wait for one another, forwards and backwards, so
    that only one part's activations are there at a time.
    """
    shares = weights / jnp.sum(weights)

    def share(variables: tuple[Any, Params], part: Any, shares: Float[Array, " m"]) -> Float[Array, ""]:
        return jnp.sum(losses(*variables, part) * shares)

    parts = count_parts(len(weights), execution.microbatch)
    if parts == 1:
        return share((delta, params), batch, shares)
    split = jax.tree.map(lambda array: in_parts(array, parts), (batch, shares))
    again = jax.checkpoint(share)
    if execution.loop_form == "scan":
        total, _ = jax.lax.scan(lambda total, part: (total + again((delta, params), *part), None), jnp.zeros(()), split)
        return total
    total = jnp.zeros(())
    for index in range(parts):
        part = jax.tree.map(lambda array, index=index: array[index], split)
        total = total + again((sequenced(delta, total), params), *part)
    return total
