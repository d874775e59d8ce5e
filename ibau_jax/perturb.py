"""The inner maximisation: one perturbation, shared by all images, that makes the model contradict itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.batches import Batches, count_parts, in_parts, to_unit
from ibau_jax.config import UnlearnConfig, make_optimizer
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Apply, Forward, Params, Weights
from ibau_jax.hypergradient import Perturbation, behind


def mean_over(
    delta: Perturbation,
    params: Params,
    batch: Any,
    weights: Float[Array, " n"],
    losses: Callable[[Perturbation, Params, Any], Float[Array, " m"]],
    execution: Execution,
) -> Float[Array, ""]:
    """Mean of `losses(delta, params, batch)` over the images with weight 1, in parts where the execution says so.

    A part's activations are computed again for its gradient, and parts wait for one another, forwards and backwards, so
    that only one part's activations are there at a time.
    """
    shares = weights / jnp.sum(weights)

    def share(variables: tuple[Perturbation, Params], part: Any, shares: Float[Array, " m"]) -> Float[Array, ""]:
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
        total = total + again((behind(delta, total), params), *part)
    return total


def cross_entropies(logits: Float[Array, "n classes"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The cross-entropy of each image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def perturbed(images: Float[Array, "n h w c"], delta: Float[Array, "m h w c"], clip: bool) -> Float[Array, "n h w c"]:
    """x + δ, clipped to [0, 1] where the configuration says so.

    The derivative is 1 on the closed interval, as PyTorch's clamp has it, so that black and white pixels can move;
    jnp.clip halves it at 0 and 1.
    """
    moved = images + delta
    return jnp.where((moved >= 0) & (moved <= 1), moved, jnp.clip(moved, 0, 1)) if clip else moved


def inner_loss(
    forward: Forward,
    config: UnlearnConfig,
    delta: Perturbation,
    params: Params,
    batch: Batches,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, ""]:
    """L_in(δ, θ; x, y) = −mean CE(f_θ(clip(x + δ)), y) + 0.001 ‖δ‖², on one batch with its `labels` as y."""

    def losses(delta: Perturbation, params: Params, part: Batches) -> Float[Array, " m"]:
        logits = forward(params, perturbed(to_unit(part.images), delta, config.clip))
        return cross_entropies(logits, part.labels)

    mean = mean_over(delta, params, batch, batch.weights, losses, execution)
    return config.regularization * jnp.sum(delta**2) - mean


def inner_step(
    apply: Apply, config: UnlearnConfig, execution: Execution = DEFAULT_EXECUTION
) -> Callable[[Any, Batches, Weights], Any]:
    """One optimiser step of δ on one batch, towards what the model itself says of the clean images.

    Returns:
        `step((delta, optimizer_state), batch, weights)`, which gives the next `(delta, optimizer_state)` and the loss.
    """
    optimizer = make_optimizer(config.inner_optim, config.inner_lr)

    def step(carry: tuple[Perturbation, Any], batch: Batches, weights: Weights) -> Any:
        delta, state = carry
        forward = partial(apply, weights.rest)
        own_labels = jnp.argmax(forward(weights.params, to_unit(batch.images)), axis=-1)
        loss, gradient = jax.value_and_grad(inner_loss, argnums=2)(
            forward, config, delta, weights.params, batch._replace(labels=own_labels), execution
        )
        updates, state = optimizer.update(gradient, state, delta)
        return (optax.apply_updates(delta, updates), state), loss

    return step


def project(delta: Perturbation, norm_bound: float | Float[Array, ""] | None) -> Perturbation:
    """The nearest point to δ in the ℓ2 ball of radius C, where there is one."""
    if norm_bound is None:
        return delta
    return delta * jnp.minimum(1, norm_bound / jnp.maximum(jnp.linalg.norm(delta), 1e-12))
