"""The inner maximisation: untargeted perturbations, shared by all images, that lead away from the labels.

The published algorithm has one in a round. With several, each has its own share of the images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ibau_jax.batches import Batches, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Apply, Forward, Params, Weights, mean_over
from ibau_jax.models.inference import classes_of
from ibau_jax.optimizers import make_optimizer
from ibau_jax.perturbations import Pixel, apply_each


def space_of(config: UnlearnConfig) -> Pixel:
    """Makes the space of untargeted perturbations."""
    return Pixel(config.clip, config.unit)


def of_images(delta: Float[Array, "k h w c"], which: Int[Array, " n"] | None, count: int) -> Float[Array, "n h w c"]:
    """Picks the perturbation of each of `count` images."""
    return jnp.broadcast_to(delta, (count, *delta.shape[1:])) if len(delta) == 1 else delta[which]


def inner_loss(
    forward: Forward,
    config: UnlearnConfig,
    delta: Float[Array, "k h w c"],
    params: Params,
    batch: Batches,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, ""]:
    """L_in(δ, θ; x, y) = −mean CE(f_θ(clip(x + δ)), y) + 0.001 ‖δ‖², on one batch with its `labels` as y.

    For several perturbations it is the sum of their losses, each mean over its own share of the images.
    """

    def losses(delta: Float[Array, "k h w c"], params: Params, part: tuple[Batches, Array]) -> Float[Array, " m"]:
        images, which = part
        each = of_images(delta, which, len(images.labels))
        logits = forward(params, apply_each(space_of(config), each, to_unit(images.images)))
        return -optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)

    which = jnp.arange(len(batch.labels)) % len(delta)
    mean = mean_over(delta, params, (batch, which), batch.weights, losses, execution)
    return config.regularization * jnp.sum(delta**2) + len(delta) * mean


def inner_step(
    apply: Apply, config: UnlearnConfig, execution: Execution = DEFAULT_EXECUTION
) -> Callable[[Any, Batches, Weights], Any]:
    """Makes one optimiser step of δ on one batch, against what the model itself says of the clean images.

    Returns:
        `step((delta, optimizer_state), batch, weights)`, which gives the next `(delta, optimizer_state)` and the loss.
    """
    optimizer = make_optimizer(config.inner_optim, config.inner_lr)

    def step(carry: tuple[Float[Array, "k h w c"], Any], batch: Batches, weights: Weights) -> Any:
        delta, state = carry
        forward = partial(apply, weights.rest)
        own_labels = jnp.argmax(forward(weights.params, to_unit(batch.images)), axis=-1)
        loss, gradient = jax.value_and_grad(inner_loss, argnums=2)(
            forward, config, delta, weights.params, batch._replace(labels=own_labels), execution
        )
        updates, state = optimizer.update(gradient, state, delta)
        return (optax.apply_updates(delta, updates), state), loss

    return step


def leading_step(
    apply: Apply, config: UnlearnConfig, success: float
) -> Callable[[Float[Array, "k h w c"], Batches, Weights], Bool[Array, " k"]]:
    """Makes a function that tells which of several δ lead to one class, whichever it is.

    `leads(delta, batch, weights)`: whether of the images of other classes a share `success` follow a δ to one class.
    """
    space = space_of(config)

    def leads(delta: Float[Array, "k h w c"], batch: Batches, weights: Weights) -> Bool[Array, " k"]:
        images = to_unit(batch.images)

        def share(delta: Float[Array, "h w c"]) -> Float[Array, ""]:
            logits = apply(weights.rest, weights.params, space.apply(delta, images))
            classes = jnp.arange(logits.shape[-1])[None]
            others = batch.weights[:, None] * (batch.labels[:, None] != classes)
            follow = jnp.sum(others * (classes_of(logits)[:, None] == classes), axis=0)
            return jnp.max(follow / jnp.maximum(jnp.sum(others, axis=0), 1))

        return jax.vmap(share)(delta) >= success

    return leads
