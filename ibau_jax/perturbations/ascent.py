"""What spaces share whose perturbations scale: steps whose length does not depend on the gradient's, and the ball."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

STRIDE = 0.3  # of the first step, in sizes
TINY = 1e-12  # instead of a norm that is 0


def along_gradient(
    norm: Callable[[Any], Float[Array, ""]], schedule: optax.Schedule, *, in_sizes: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Steps against the gradient whose `norm` is the schedule's value, or that share of the size allowed now.

    However small the gradient is, the step is as long, so a perturbation that has succeeded still grows to its size.
    """

    def update(gradient: Any, steps: Array, params: Any = None, *, size: Array, **_: Any) -> tuple[Any, Array]:
        length = schedule(steps) * (size if in_sizes else 1.0)
        factor = length / jnp.maximum(norm(gradient), TINY)
        return jax.tree.map(lambda g: -factor * g, gradient), steps + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def into_ball(
    delta: Float[Array, "..."], norm: Float[Array, ""], largest: Float[Array, ""] | float
) -> Float[Array, "..."]:
    """Scales δ, which has this norm, so that its norm is at most `largest`."""
    return delta * jnp.minimum(1, largest / jnp.maximum(norm, TINY))


def scaled(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    """The schedule times a factor."""
    return lambda steps: factor * schedule(steps)
