"""Compares the statistics that BatchNorm recorded in training with those of its inputs on given images."""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from ibau_jax.compilation import compiler_options
from ibau_jax.functional import training_copy
from ibau_jax.models.convolution import Conv, convolve
from ibau_jax.models.layers import Activation, AvgPool, MaxPool

Moments = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]  # the mean and the variance of each channel
Statistics = dict[tuple[Any, ...], Moments]  # of each BatchNorm's input, by its path

EPSILON = 1e-5  # PyTorch's default


class DiscrepancyExceeded(Exception):
    """A network's discrepancy exceeds the limit given to `discrepancies`."""


def discrepancies(
    model: nnx.Module, images: Float[Array, "n h w c"], limit: float = math.inf
) -> tuple[Float[np.ndarray, " layers"], Statistics]:
    """How far the statistics of each BatchNorm's input on `images` are from the recorded ones, in [0, 1].

    The squared Hellinger distance of two normal distributions, one with the recorded mean and variance of a channel,
    one with those of the images, averaged over channels. The model runs in training mode, as it did when it recorded
    them.

    Args:
        model: maps images, float32 in [0, 1], to logits.
        images: clean ones.
        limit: the model stops running as soon as the mean over all layers is certain to exceed this. Each of its
            BatchNorms must then be called once at most.

    Returns:
        A number for each layer that the network uses in training mode, and the statistics of its input.

    Raises:
        DiscrepancyExceeded: the mean over the layers that the network uses exceeds `limit`.
    """
    copy = training_copy(model)
    norms = {path: module for path, module in nnx.iter_graph(copy) if isinstance(module, nnx.BatchNorm)}
    if not norms:
        return np.zeros(0), {}
    recorded = {path: _moments(norm) for path, norm in norms.items()}
    paths = {id(norm): path for path, norm in norms.items()}
    distance: dict[tuple[Any, ...], float] = {}

    def report(norm: nnx.BatchNorm) -> None:
        if id(norm) not in paths:  # a traced copy, in a transformation of the model's own
            return
        path = paths[id(norm)]
        distance[path] = _distance(recorded[path], _moments(norm))
        if sum(distance.values()) > limit * len(norms):
            raise DiscrepancyExceeded

    for norm in norms.values():
        norm.momentum = 0.0  # so that it holds the statistics of these images alone
    _compile_layers(copy)
    token = _REPORT.set(report)
    try:
        copy(images)
    except TraceContextError:  # within a map of the model's own nothing can be recorded
        return np.zeros(0), {}
    finally:
        _REPORT.reset(token)
    measured = {path: _moments(norm) for path, norm in norms.items()}
    used = {path: moments for path, moments in measured.items() if not np.array_equal(moments[0], recorded[path][0])}
    layers = distances(recorded, used)
    if used and layers.mean() > limit:  # `report` counts the layers that the network does not use
        raise DiscrepancyExceeded
    return layers, used


def _compile_layers(model: nnx.Module) -> None:
    """Compiles each layer on its own; each BatchNorm reports its statistics when called.

    Operations between layers run one by one. JAX keeps programs by function and shape, so that networks with the same
    layers share them; a program of a whole network would be compiled for each network.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.__class__ = _reporting(type(module))
        elif type(module) is Conv:
            module.__class__ = _CompiledConv
        elif isinstance(module, Activation | MaxPool | AvgPool):
            module.__class__ = _compiled(type(module))


# No attribute of the layer, which would be part of its compiled program's key.
_REPORT: ContextVar[Callable[[nnx.BatchNorm], None]] = ContextVar("report")


@functools.cache
def _reporting(norm: type[nnx.BatchNorm]) -> Any:
    compiled = nnx.jit(norm.__call__)

    def call(self: nnx.BatchNorm, x: Array, *args: Any, **kwargs: Any) -> Array:
        # A flag decides what is computed, so it can't be traced.
        output: Array = norm.__call__(self, x, *args, **kwargs) if args or kwargs else compiled(self, x)
        _REPORT.get()(self)
        return output

    return type(norm.__name__, (norm,), {"__call__": call})


@functools.cache
def _compiled(layer: type[nnx.Module]) -> Any:
    return type(layer.__name__, (layer,), {"__call__": nnx.jit(layer.__call__)})


class _CompiledConv(Conv):
    def applied(
        self, x: Float[Array, "n h w i"], kernel: Float[Array, "h w i o"], bias: Float[Array, " o"] | None
    ) -> Float[Array, "n oh ow o"]:
        if isinstance(x, jax.core.Tracer):  # in a transformation of the model's own, which is compiled as a whole
            return super().applied(x, kernel, bias)
        return _convolve()(x, kernel, bias, self.strides, self.padding, self.feature_group_count)


@functools.cache
def _convolve() -> Any:
    return jax.jit(convolve, static_argnums=(3, 4, 5), compiler_options=compiler_options())


def _moments(norm: nnx.BatchNorm) -> Moments:
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
    """Computes the distance of normal distributions whose variances are enlarged by `EPSILON`, whatever the layer's."""
    first, second = variance + EPSILON, other_variance + EPSILON
    total = first + second
    with np.errstate(invalid="ignore", over="ignore"):
        return 1 - np.sqrt(2 * np.sqrt(first * second) / total) * np.exp(-((mean - other_mean) ** 2) / (4 * total))
