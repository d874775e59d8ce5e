"""Optimisers by their names, as configurations have them."""

import inspect
from typing import Any

import optax

from ibau_jax.errors import ConfigError

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
        raise ConfigError(f"optax has no optimiser {name!r}; try adam, sgd, adamw, rmsprop or lion")
    return optax.with_extra_args_support(optimizer)


def _has_second_moment(name: str, make: Any) -> bool:
    return name.lower() not in NO_SECOND_MOMENT and "b2" in inspect.signature(make).parameters
