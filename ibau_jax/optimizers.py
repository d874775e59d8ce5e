"""Optimisers by their names, as configurations have them."""

import optax

from ibau_jax.errors import ConfigError


def make_optimizer(name: str, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """The optax optimiser called `name` (in any case: `Adam` is `adam`).

    Raises:
        ConfigError: optax has no optimiser of that name that takes just a learning rate.
    """
    make = getattr(optax, name.lower(), None)
    try:
        optimizer = make(learning_rate) if callable(make) and not name.startswith("_") else None
    except (TypeError, ValueError, AttributeError):
        optimizer = None
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(f"optax has no optimiser {name!r}; try adam, sgd, adamw, rmsprop or lion")
    return optax.with_extra_args_support(optimizer)
