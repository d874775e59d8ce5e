"""The inner maximisation: untargeted perturbations, shared by all images, that lead away from the labels.

The published algorithm has one in a round. With several, each has its own share of the images.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

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
    """L_in(δ, θ; x, y) = −mean CE(f_θ(T(x; δ)), y) + ρ ‖δ‖², on one batch with its `labels` as y.

    T adds δ, and clips where `clip` says so; ρ is `regularization`. Of k perturbations each has every k-th image, and
    the mean is multiplied by k, so that it is the sum of their own losses (where k divides the number of images).
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
        updates, state = optimizer.update(gradient, state, delta, value=loss)
        return (optax.apply_updates(delta, updates), state), loss

    return step


class Sizing(NamedTuple):
    """How large untargeted perturbations have to be: bisections of the logarithms of their norms.

    Attributes:
        direction: of each δ, with norm 1.
        low: the logarithm of the largest norm that is known to be too small.
        high: that of the smallest one that is known to be enough, or of the largest that is tried.
    """

    direction: Float[Array, "k h w c"]
    low: Float[Array, " k"]
    high: Float[Array, " k"]

    @property
    def delta(self) -> Float[Array, "k h w c"]:
        """Each δ as large as it needs to be."""
        return jnp.exp(self.high)[:, None, None, None] * self.direction


def begin_sizing(config: UnlearnConfig, delta: Float[Array, "k h w c"]) -> Sizing:
    """Begins with norms over ten octaves, up to the configuration's or else the space's largest."""
    norms = jnp.sqrt(jnp.sum(delta**2, axis=(1, 2, 3), keepdims=True))
    height, width, channels = delta.shape[1:]
    largest = config.norm_bound or space_of(config).max_size((height, width, channels))
    high = jnp.full(len(delta), math.log(largest), delta.dtype)
    return Sizing(delta / jnp.maximum(norms, jnp.finfo(delta.dtype).tiny), high - math.log(2**10), high)


def sizing_step(apply: Apply, config: UnlearnConfig, success: float) -> Callable[[Sizing, Batches, Weights], Any]:
    """Makes one bisection: is half of the way enough, so that of the images of other classes a share `success` follow?

    Which class they follow to does not matter, so that a size means the same as a player's.

    Returns:
        `step(sizing, batch, weights)`, which gives the next `Sizing` and the mean of its `high`.
    """
    space = space_of(config)

    def step(sizing: Sizing, batch: Batches, weights: Weights) -> Any:
        images, middle = to_unit(batch.images), (sizing.low + sizing.high) / 2

        def share(delta: Float[Array, "h w c"]) -> Float[Array, ""]:
            logits = apply(weights.rest, weights.params, space.apply(delta, images))
            classes = jnp.arange(logits.shape[-1])[None]
            others = batch.weights[:, None] * (batch.labels[:, None] != classes)
            follow = jnp.sum(others * (classes_of(logits)[:, None] == classes), axis=0)
            return jnp.max(follow / jnp.maximum(jnp.sum(others, axis=0), 1))

        enough = jax.vmap(share)(sizing._replace(high=middle).delta) >= success
        low, high = jnp.where(enough, sizing.low, middle), jnp.where(enough, middle, sizing.high)
        return Sizing(sizing.direction, low, high), jnp.mean(high)

    return step
