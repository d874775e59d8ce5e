"""What BatchNorm recorded of the images that a network was trained on, beside what it would record of others."""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.functional import training_copy
from ibau_jax.models.layers import Activation, AvgPool, MaxPool

Moments = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]  # the mean and the variance of each channel
Statistics = dict[tuple[Any, ...], Moments]  # of each BatchNorm's input, by its path

EPSILON = 1e-5  # PyTorch's default


class TooFar(Exception):
    """The statistics of a network's layers are further from those that it holds than was asked for."""


def discrepancies(
    model: nnx.Module, images: Float[Array, "n h w c"], most: float = math.inf
) -> tuple[Float[np.ndarray, " layers"], Statistics]:
    """How far the statistics of each BatchNorm's input on `images` are from those that it holds, in [0, 1].

    The squared Hellinger distance of two normal distributions, one with the held mean and variance of a channel, one
    with those of the images, averaged over channels. The model runs in training mode, as it did when it recorded them.

    Args:
        model: maps images, float32 in [0, 1], to logits.
        images: clean ones.
        most: the mean over layers from which on the rest of the network needs no running.

    Returns:
        A number for each layer that the network uses, and the statistics of its input.

    Raises:
        TooFar: the mean is more than `most`.
    """
    copy = training_copy(model)
    norms = {path: module for path, module in nnx.iter_graph(copy) if isinstance(module, nnx.BatchNorm)}
    held = {id(norm): _statistics(norm) for norm in norms.values()}
    far: dict[int, float] = {}

    def hear(norm: nnx.BatchNorm) -> None:
        far[id(norm)] = _distance(held[id(norm)], _statistics(norm))
        if sum(far.values()) > most * len(norms):
            raise TooFar

    for norm in norms.values():
        norm.momentum = 0.0  # what it holds afterwards is of these images alone
    _compile_layers(copy)
    token = _HEAR.set(hear)
    try:
        if norms:
            copy(images)
    finally:
        _HEAR.reset(token)
    used = {path: norm for path, norm in norms.items() if id(norm) in far}
    layers = np.asarray([far[id(norm)] for norm in used.values()])
    return layers, {path: _statistics(norm) for path, norm in used.items()}


def _compile_layers(model: nnx.Module) -> None:
    """Makes layers compiled programs of their own; those of BatchNorm say what they heard.

    Convolutions and what is between layers run operation by operation. Networks with the same names and shapes share
    nearly all of that, and it is compiled once; each network as a whole would be compiled anew.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.__class__ = _Listening
        elif isinstance(module, Activation | MaxPool | AvgPool):
            module.__class__ = _compiled(type(module))


@functools.cache
def _compiled(layer: type[nnx.Module]) -> Any:
    return type(layer.__name__, (layer,), {"__call__": nnx.jit(layer.__call__)})


_HEAR: ContextVar[Callable[[nnx.BatchNorm], None]] = ContextVar("hear")


class _Listening(nnx.BatchNorm):
    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        output = _normalize(self, x, *args, **kwargs)
        _HEAR.get()(self)
        return output


_normalize = nnx.jit(nnx.BatchNorm.__call__)


def _statistics(norm: nnx.BatchNorm) -> Moments:
    return np.asarray(norm.mean[...], np.float64), np.asarray(norm.var[...], np.float64)


def distances(one: Statistics, other: Statistics) -> Float[np.ndarray, " layers"]:
    """How far two networks' statistics are apart in each layer that both have, in [0, 1]; see `discrepancies`."""
    return np.asarray([_distance(one[path], other[path]) for path in one if path in other])


def _distance(one: Moments, other: Moments) -> float:
    channels = _squared_hellinger(*one, *other)
    return float(np.nan_to_num(channels, nan=1.0).mean())  # what is not finite is far away


def _squared_hellinger(
    mean: Float[np.ndarray, " c"],
    variance: Float[np.ndarray, " c"],
    other_mean: Float[np.ndarray, " c"],
    other_variance: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " c"]:
    """Of normal distributions, their variances enlarged as BatchNorm enlarges them."""
    first, second = variance + EPSILON, other_variance + EPSILON
    total = first + second
    with np.errstate(invalid="ignore", over="ignore"):
        return 1 - np.sqrt(2 * np.sqrt(first * second) / total) * np.exp(-((mean - other_mean) ** 2) / (4 * total))
