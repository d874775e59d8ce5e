"""Convolutions as the backends like them, and the BatchNorm behind them folded in.

In inference mode BatchNorm is an affine map of each channel. Behind a convolution it goes into the kernel and the bias:
one array of activations less to write, to read again and to keep, and one reduction over it instead of three
for the gradients of scale, shift and bias.
"""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.taps import tap_convolution

LAYOUT = ("NHWC", "HWIO", "NHWC")
Size = int | tuple[int, int]  # along rows and columns; one number for both


class Conv(nnx.Conv):
    """`torch.nn.Conv2d` of NHWC images with the same padding on opposite sides."""

    def __call__(self, x: Float[Array, "n h w i"], out_sharding: None = None) -> Float[Array, "n oh ow o"]:
        bias = self.bias[...] if self.bias is not None else None
        return tap_convolution(self, None, self.applied(x, self.kernel[...], bias))

    def applied(
        self, x: Float[Array, "n h w i"], kernel: Float[Array, "h w i o"], bias: Float[Array, " o"] | None
    ) -> Float[Array, "n oh ow o"]:
        """The convolution with other weights."""
        return convolve(x, kernel, bias, cast(int, self.strides), cast(Size, self.padding), self.feature_group_count)


def convolve(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "h w i o"],
    bias: Float[Array, " o"] | None,
    stride: int,
    padding: Size,
    groups: int,
) -> Float[Array, "n oh ow o"]:
    """A convolution with the same stride along rows and columns."""
    rows, columns = both(padding)
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((rows, rows), (columns, columns)),
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
    )
    return y if bias is None else y + per_channel(bias, y)


def both(size: Size) -> tuple[int, int]:
    """The size along rows and along columns."""
    return (size, size) if isinstance(size, int) else size


def per_channel(values: Float[Array, " c"], like: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """One value a channel at every place of `like`.

    A product with ones, which XLA makes a broadcast; its transpose, the sum over all places, is a matrix product then,
    and on CPU up to seven times as fast as the reduction that a broadcast transposes into.
    """
    ones = jnp.ones((*like.shape[:3], 1), like.dtype)
    return ones @ values[None]


def conv_norm(conv: nnx.Module, norm: nnx.Module, x: Float[Array, "n h w i"]) -> Float[Array, "n oh ow o"]:
    """`norm(conv(x))`, as one convolution where `conv` is a `Conv` and `norm` BatchNorm in inference mode."""
    if not (isinstance(conv, Conv) and isinstance(norm, nnx.BatchNorm)):
        return norm(conv(x))
    if not norm.use_running_average:
        bias = conv.bias[...] if conv.bias is not None else None
        return tap_convolution(conv, norm, norm(conv.applied(x, conv.kernel[...], bias)))
    assert norm.scale is not None
    assert norm.bias is not None
    factor = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    shift = norm.bias[...] + ((conv.bias[...] if conv.bias is not None else 0.0) - norm.mean[...]) * factor
    return tap_convolution(conv, norm, conv.applied(x, conv.kernel[...] * factor[None, None, None], shift))
