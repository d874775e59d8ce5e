"""Ascents that several spaces share, as optax transformations: the step's length does not depend on the gradient's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

TINY = 1e-12  # instead of a gradient's norm that is 0


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


def scaled(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    """The schedule times a factor."""
    return lambda steps: factor * schedule(steps)
