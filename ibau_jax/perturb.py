"""The inner maximisation: perturbations, shared by all images, that make the model contradict itself.

The published algorithm has one in a round, away from the labels. There may be several, and they may lead to suspected
targets instead (`ibau_jax.aims`); each image of a batch then goes with one of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.aims import Aims
from ibau_jax.batches import Batches, count_parts, in_parts, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Apply, Forward, Params, Weights
from ibau_jax.hypergradient import sequenced
from ibau_jax.optimizers import make_optimizer
from ibau_jax.perturbations import Perturbation, Pixel, apply_each


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
        total = total + again((sequenced(delta, total), params), *part)
    return total


def space_of(config: UnlearnConfig) -> Pixel:
    """The space of the configured δ."""
    return Pixel(config.clip, config.unit)


def of_images(delta: Perturbation, which: Int[Array, " n"] | None, count: int) -> Float[Array, "n h w c"]:
    """The perturbation of each of `count` images."""
    return jnp.broadcast_to(delta, (count, *delta.shape[1:])) if len(delta) == 1 else delta[which]


def inner_loss(
    forward: Forward,
    config: UnlearnConfig,
    delta: Perturbation,
    params: Params,
    batch: Batches,
    aims: Aims | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, ""]:
    """L_in(δ, θ; x, y) = −mean CE(f_θ(clip(x + δ)), y) + 0.001 ‖δ‖², on one batch with its `labels` as y.

    For several perturbations it is the sum of their losses, each mean over its own share of the images; where they aim
    at classes t, mean CE(f_θ(clip(x + δ)), t) stands in place of the first term.
    """

    def losses(delta: Perturbation, params: Params, part: tuple[Batches, Array]) -> Float[Array, " m"]:
        images, which = part
        each = of_images(delta, which, len(images.labels))
        stamped = apply_each(space_of(config), each, to_unit(images.images))
        logits = forward(params, stamped)
        if aims is None:
            return -optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, aims.target[which])

    which = jnp.arange(len(batch.labels)) % len(delta)
    mean = mean_over(delta, params, (batch, which), batch.weights, losses, execution)
    return config.regularization * jnp.sum(delta**2) + len(delta) * mean


class InnerConstants(NamedTuple):
    """What every inner step sees: the model, and what targeted perturbations aim at."""

    weights: Weights
    aims: Aims | None = None


def inner_optimizer(config: UnlearnConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The published optimiser; for targeted perturbations, steps along the gradient that are a share of the radius.

    Its update then takes the `size` of each, its radius. The share falls along a cosine over `steps`.
    """
    if not config.targeted:
        return make_optimizer(config.inner_optim, config.inner_lr)
    ascent = space_of(config).ascent(optax.cosine_decay_schedule(1.0, steps, alpha=0.1))

    def update(gradient: Perturbation, state: Any, delta: Perturbation | None = None, **extra: Any) -> Any:
        return jax.vmap(lambda g, s, size: ascent.update(g, s, size=size))(gradient, state, extra["size"])

    return optax.GradientTransformationExtraArgs(jax.vmap(ascent.init), update)


def inner_step(
    apply: Apply, config: UnlearnConfig, execution: Execution = DEFAULT_EXECUTION, steps: int = 1
) -> Callable[[Any, Batches, InnerConstants], Any]:
    """One optimiser step of δ on one batch, against what the model itself says of the clean images.

    Returns:
        `step((delta, optimizer_state), batch, constants)`, which gives the next `(delta, optimizer_state)` and the
        loss; `steps` of them make a round.
    """
    optimizer = inner_optimizer(config, steps)

    def step(carry: tuple[Perturbation, Any], batch: Batches, constants: InnerConstants) -> Any:
        (delta, state), (weights, aims) = carry, constants
        forward = partial(apply, weights.rest)
        own_labels = jnp.argmax(forward(weights.params, to_unit(batch.images)), axis=-1)
        loss, gradient = jax.value_and_grad(inner_loss, argnums=2)(
            forward, config, delta, weights.params, batch._replace(labels=own_labels), aims, execution
        )
        updates, state = optimizer.update(gradient, state, delta, size=aims.radius if aims else None)
        moved = optax.apply_updates(delta, updates)
        return (jax.vmap(space_of(config).project)(moved, aims.radius) if aims else moved, state), loss

    return step
