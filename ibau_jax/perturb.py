"""The inner maximisation: one perturbation, shared by all images, that makes the model contradict itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.batches import Batches, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.hypergradient import Params, Perturbation

Forward = Callable[[Params, Float[Array, "n h w c"]], Float[Array, "n classes"]]


def cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"], weights: Float[Array, " n"]
) -> Float[Array, ""]:
    """Mean cross-entropy over the images with weight 1."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def perturbed(images: Float[Array, "n h w c"], delta: Float[Array, "m h w c"], clip: bool) -> Float[Array, "n h w c"]:
    """x + δ, clipped to [0, 1] where the configuration says so.

    The derivative is 1 on the closed interval, as PyTorch's clamp has it, so that black and white pixels can move;
    jnp.clip halves it at 0 and 1.
    """
    moved = images + delta
    return jnp.where((moved >= 0) & (moved <= 1), moved, jnp.clip(moved, 0, 1)) if clip else moved


def inner_loss(
    forward: Forward, config: UnlearnConfig, delta: Perturbation, params: Params, batch: Batches
) -> Float[Array, ""]:
    """L_in(δ, θ; x, y) = −mean CE(f_θ(clip(x + δ)), y) + 0.001 ‖δ‖², on one batch with its `labels` as y."""
    logits = forward(params, perturbed(to_unit(batch.images), delta, config.clip))
    return config.regularization * jnp.sum(delta**2) - cross_entropy(logits, batch.labels, batch.weights)


def inner_step(
    forward: Forward, config: UnlearnConfig, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[Any, Batches, Params], Any]:
    """One optimiser step of δ on one batch, towards what the model itself says of the clean images.

    Returns:
        `step((delta, optimizer_state), batch, params)`, which gives the next `(delta, optimizer_state)` and the loss.
    """

    def step(carry: tuple[Perturbation, Any], batch: Batches, params: Params) -> Any:
        delta, state = carry
        own_labels = jnp.argmax(forward(params, to_unit(batch.images)), axis=-1)
        loss, gradient = jax.value_and_grad(inner_loss, argnums=2)(
            forward, config, delta, params, batch._replace(labels=own_labels)
        )
        updates, state = optimizer.update(gradient, state, delta)
        return (optax.apply_updates(delta, updates), state), loss

    return step


def project(delta: Perturbation, norm_bound: float | None) -> Perturbation:
    """The nearest point to δ in the ℓ2 ball of radius C, where there is one."""
    if norm_bound is None:
        return delta
    return delta * jnp.minimum(1, norm_bound / jnp.maximum(jnp.linalg.norm(delta), 1e-12))
