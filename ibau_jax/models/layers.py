"""Blocks shared by the model families.

A model's attribute names mirror the PyTorch module tree, so that `features.0.weight` is `features[0].kernel`
(see `ibau_jax.checkpoints.conversion`). Layers without parameters keep their place in a `Sequential`, because
their index counts in PyTorch's names. Images are NHWC.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Sequential(nnx.List):
    """Layers applied in order; its parameters are found under the layer's index, as in `torch.nn.Sequential`."""

    def __call__(self, x: Array) -> Array:
        for layer in self:
            x = layer(x)
        return x


class ELU(nnx.Module):
    """`torch.nn.ELU`."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.elu(x)


class MaxPool(nnx.Module):
    """`torch.nn.MaxPool2d(size, stride=size)`: disjoint windows, a remainder at the border is dropped.

    Where a window has its maximum twice, the derivative goes to the first in row order, as PyTorch's does; images
    clipped to black or white have such windows. Written out over the places of a window: with
    `lax.reduce_window` an outer step takes a tenth longer on CPU.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ph pw c"]:
        rows, columns = (extent // self.size * self.size for extent in x.shape[1:3])
        places = [(row, column) for row in range(self.size) for column in range(self.size)]
        first, *others = (x[:, row : rows : self.size, column : columns : self.size] for row, column in places)
        for other in others:
            first = jnp.where(other > first, other, first)
        return first


class Dropout(nnx.Module):
    """`torch.nn.Dropout` in inference, where it is the identity: models here only ever run in inference mode."""

    def __call__(self, x: Array) -> Array:
        return x


class Flatten(nnx.Module):
    """Flattens to the order that PyTorch's NCHW flattening has, which the following linear layer's weights expect."""

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n chw"]:
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def conv3x3(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Conv:
    """`torch.nn.Conv2d(in_features, out_features, 3, padding=1)`."""
    return nnx.Conv(in_features, out_features, (3, 3), padding=1, rngs=rngs)


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """`torch.nn.BatchNorm2d(features)` with its running statistics."""
    return nnx.BatchNorm(features, use_running_average=True, epsilon=1e-5, rngs=rngs)


class Normalized(nnx.Module):
    """`model((x - mean) / std)`: puts a normalisation inside the model, so that δ and triggers live in pixel space."""

    def __init__(self, model: nnx.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model = model
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        mean, std = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        return self.model((x - mean) / std)
