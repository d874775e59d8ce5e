"""Optimisers by their names, as configurations have them."""

import inspect
from typing import Any

import jax.numpy as jnp
import optax

from ibau_jax.errors import ConfigError

SUGGESTED = "adam, sgd, adamw, rmsprop or lion"
NO_SECOND_MOMENT = ("lion", "adan")  # whose b2 is the decay of something else


def make_optimizer(name: str, learning_rate: float, b2: float | None = None) -> optax.GradientTransformationExtraArgs:
    """The optax optimiser called `name` (in any case: `Adam` is `adam`).

    `b2` is the decay of the second moment; optimisers without one ignore it, and none is for their own.

    Raises:
        ConfigError: optax has no optimiser of that name that takes just a learning rate.
    """
    make = getattr(optax, name.lower(), None)
    try:
        decay = {} if b2 is None or not _has_second_moment(name, make) else {"b2": b2}
        optimizer = make(learning_rate, **decay) if callable(make) and not name.startswith("_") else None
    except (TypeError, ValueError, AttributeError):
        optimizer = None
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(f"optax has no optimiser {name!r}; try {SUGGESTED}")
    return optax.with_extra_args_support(optimizer)


def check_optimizer(name: str) -> None:
    """Raises ConfigError unless optax has an optimiser of that name that goes downhill on a gradient alone.

    Optax's parts of optimisers, such as `scale` and `scale_by_adam`, leave out the sign, and go uphill.
    """
    optimizer, weights = make_optimizer(name, 0.1), jnp.ones((2, 2))
    state, change = optimizer.init(weights), jnp.zeros_like(weights)
    try:
        for _ in range(2):  # rprop compares a gradient with the one before
            updates, state = optimizer.update(weights, state, weights, value=jnp.float32(1))
            change += updates
    except TypeError as error:
        raise ConfigError(f"optax's {name!r} takes more than a gradient; try {SUGGESTED}") from error
    if not (change < 0).all():
        raise ConfigError(f"optax's {name!r} does not go downhill by itself; try {SUGGESTED}")


def _has_second_moment(name: str, make: Any) -> bool:
    return name.lower() not in NO_SECOND_MOMENT and "b2" in inspect.signature(make).parameters
