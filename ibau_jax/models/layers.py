"""Layers shared by the model families, each with the meaning and the derivatives that PyTorch gives it.

A model's attribute names mirror the PyTorch module tree, so that `features.0.weight` is `features[0].kernel`
(see `ibau_jax.checkpoints.conversion`). Layers without parameters keep their place in a `Sequential`, because
their index counts in PyTorch's names. Images are NHWC. Models only ever run in inference mode.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.convolution import Conv, Size, both, conv_norm
from ibau_jax.models.taps import tap_map

Function = Callable[[Array], Array]


class Abstract:
    """Stands for `nnx.Rngs` where only the parameters' shapes are wanted, not their values.

    Models built with it hold `jax.ShapeDtypeStruct`s; `nnx.eval_shape` gives the same, but for deep models it takes
    seconds, and recognising an architecture builds several.
    """

    def params(self) -> None:
        """The key of nothing."""
        return None


ABSTRACT = cast(nnx.Rngs, Abstract())


def _initializer(initializer: nnx.Initializer) -> nnx.Initializer:
    def initialize(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else initializer(key, shape, dtype)

    return initialize


_KERNEL = _initializer(nnx.initializers.he_normal())
_ZEROS, _ONES = _initializer(nnx.initializers.zeros_init()), _initializer(nnx.initializers.ones_init())


class Sequential(nnx.List):
    """Layers applied in order; its parameters are found under the layer's index, as in `torch.nn.Sequential`."""

    def __call__(self, x: Array) -> Array:
        return apply_in_order(list(self), x)


class NamedSequential(nnx.Module):
    """Layers applied in order and found under their names: `torch.nn.Sequential(OrderedDict(...))`."""

    def __init__(self, layers: Mapping[str, nnx.Module]) -> None:
        self.names = tuple(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x: Array) -> Array:
        return apply_in_order([getattr(self, name) for name in self.names], x)


def apply_in_order(layers: list[nnx.Module], x: Array) -> Array:
    """Applies layer after layer; a convolution and the BatchNorm behind it are one step."""
    while layers:
        if len(layers) > 1 and isinstance(layers[0], Conv) and isinstance(layers[1], nnx.BatchNorm):
            after, layers = conv_norm(layers[0], layers[1], x), layers[2:]
        else:
            after, layers = layers[0](x), layers[1:]
        if after.shape[1:-1] != x.shape[1:-1]:
            tap_map(x)  # the last of its resolution
        x = after
    return tap_map(x)


class Activation(nnx.Module):
    """A function at its place in a `Sequential`."""

    def __init__(self, function: Function) -> None:
        self.activation = function

    def __call__(self, x: Array) -> Array:
        return self.activation(x)


relu: Function = jax.nn.relu
silu: Function = jax.nn.silu
gelu: Function = functools.partial(jax.nn.gelu, approximate=False)


def leaky_relu(x: Array, slope: float = 0.1) -> Array:
    """`torch.nn.LeakyReLU(slope)`; unlike `jax.nn.leaky_relu`, its derivative at 0 is the slope, as PyTorch has it."""
    return jnp.where(x > 0, x, slope * x)


@jax.custom_jvp
def elu(x: Array) -> Array:
    """`torch.nn.ELU`, its derivatives taken from its value: the exponential is computed once, not for every product."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.where(x > 0, 0.0, x)))


@elu.defjvp
def _elu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = elu(*primals)
    return value, jnp.where(value > 0, 1.0, value + 1) * tangents[0]


def relu6(x: Array) -> Array:
    """`torch.nn.ReLU6`; unlike `jax.nn.relu6`, its derivative at 0 and 6 is 0, as PyTorch has it."""
    return jnp.where(x <= 0, 0.0, jnp.where(x < 6, x, 6.0))


def hardsigmoid(x: Array) -> Array:
    """`torch.nn.Hardsigmoid`, derivative 0 at ±3."""
    return jnp.where(x <= -3, 0.0, jnp.where(x < 3, (x + 3) / 6, 1.0))


def hardswish(x: Array) -> Array:
    """`torch.nn.Hardswish`, derivative 0 at -3 and 1 at 3."""
    return jnp.where(x <= -3, 0.0, jnp.where(x < 3, x * (x + 3) / 6, x))


class Identity(nnx.Module):
    """What dropout and stochastic depth are in inference."""

    def __call__(self, x: Array) -> Array:
        return x


class Permute(nnx.Module):
    """`torchvision.ops.Permute(dims)` from NCHW to NHWC or back, which is nothing where all images are NHWC."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims

    def __call__(self, x: Array) -> Array:
        return x


class MaxPool(nnx.Module):
    """`torch.nn.MaxPool2d(size, stride, padding, ceil_mode=ceil)`; a remainder at the border is dropped, unless `ceil`.

    Where a window has its maximum twice, the derivative goes to the first in row order, as PyTorch's does; images
    clipped to black or white have such windows. Written out over the places of a window: with
    `lax.reduce_window` an outer step takes a tenth longer on CPU.
    """

    def __init__(self, size: int, stride: int | None = None, padding: int = 0, *, ceil: bool = False) -> None:
        self.size, self.stride, self.padding, self.ceil = size, stride or size, padding, ceil

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ph pw c"]:
        x, _ = _padded(self, x, -jnp.inf)
        return _max_pool(self.size, self.stride, x)


def _padded(pool: "MaxPool | AvgPool", x: Float[Array, "n h w c"], value: float) -> tuple[Array, list[int]]:
    """What a pooling takes its windows from, and how many rows and columns of it `ceil` added behind."""
    added = [_lacking(pool, extent) if pool.ceil else 0 for extent in x.shape[1:3]]
    rows, columns = ((pool.padding, pool.padding + more) for more in added)
    if not any((*rows, *columns)):
        return x, added
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=value), added


def _lacking(pool: "MaxPool | AvgPool", extent: int) -> int:
    """What a last window lacks at the border, where there is one; none begins behind the image."""
    over = (extent + 2 * pool.padding - pool.size) % pool.stride
    begins = extent + 2 * pool.padding - pool.size - over + pool.stride
    return pool.stride - over if over and begins < extent + pool.padding else 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _max_pool(size: int, stride: int, x: Float[Array, "n h w c"]) -> Float[Array, "n ph pw c"]:
    return _chosen_places(size, stride, x)[0]


@_max_pool.defjvp
def _max_pool_jvp(size: int, stride: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The derivative selects by a place's number, a byte a window: all that second derivatives need to keep."""
    value, chosen = _chosen_places(size, stride, *primals)
    places = _window_places(tangents[0], size, stride)
    derivative = jnp.zeros_like(value)
    for number, place in enumerate(places):
        derivative = jnp.where(chosen == number, place, derivative)
    return value, derivative


def _chosen_places(size: int, stride: int, x: Float[Array, "n h w c"]) -> tuple[Array, Array]:
    """Each window's maximum and the number of its first place, in row order."""
    value, *others = _window_places(x, size, stride)
    chosen = jnp.zeros(value.shape, jnp.int8)
    for number, other in enumerate(others, start=1):
        chosen = jnp.where(other > value, jnp.int8(number), chosen)
        value = jnp.where(other > value, other, value)
    return value, chosen


class AvgPool(nnx.Module):
    """`torch.nn.AvgPool2d(size, stride, padding, ceil_mode=ceil)`: zeros of the padding count.

    A remainder at the border is dropped, or with `ceil` a window of its own, averaged over what it holds.
    """

    def __init__(self, size: int, stride: int | None = None, padding: int = 0, *, ceil: bool = False) -> None:
        self.size, self.stride, self.padding, self.ceil = size, stride or size, padding, ceil

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ph pw c"]:
        x, added = _padded(self, x, 0.0)
        total, *others = _window_places(x, self.size, self.stride)
        for other in others:
            total = total + other
        if not any(added):
            return total / self.size**2
        held = [np.full(extent, self.size) for extent in total.shape[1:3]]
        for places, more in zip(held, added, strict=True):
            places[-1] -= more
        return total / jnp.asarray(np.outer(*held)[None, :, :, None], total.dtype)


class BlurPool(nnx.Module):
    """Halves the maps behind a binomial blur of 3x3 (Zhang, 2019), for which their borders are mirrored."""

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ph pw c"]:
        for axis in (1, 2):
            sides = [(int(one == axis), int(one == axis)) for one in range(x.ndim)]
            padded, length = jnp.pad(x, sides, mode="reflect"), x.shape[axis]
            before, middle, behind = (
                jax.lax.slice_in_dim(padded, start, start + length, stride=2, axis=axis) for start in range(3)
            )
            x = (before + 2 * middle + behind) / 4
        return x


def _window_places(x: Float[Array, "n h w c"], size: int, stride: int) -> list[Float[Array, "n ph pw c"]]:
    """For each place of a window in row order, what all windows have there."""
    rows, columns = ((extent - size) // stride + 1 for extent in x.shape[1:3])
    if min(rows, columns) < 1:
        raise ValueError(f"an image shrunk to {x.shape[1]}x{x.shape[2]} can't be pooled by {size}: it is too small")
    places = [divmod(place, size) for place in range(size**2)]
    if stride == size:  # disjoint windows are axes of their own, whose slices transpose into cheap padding
        count, channels = x.shape[0], x.shape[3]
        windows = x[:, : rows * size, : columns * size].reshape(count, rows, size, columns, size, channels)
        return [windows[:, :, row, :, column] for row, column in places]
    return [
        x[:, row : row + (rows - 1) * stride + 1 : stride, column : column + (columns - 1) * stride + 1 : stride]
        for row, column in places
    ]


class AdaptiveAvgPool(nnx.Module):
    """`torch.nn.AdaptiveAvgPool2d(size)`: the mean over each of size x size bins, which may overlap or repeat."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n rows columns c"]:
        rows, columns = map(self._bins, both(self.size), x.shape[1:3])
        return jnp.einsum("ah,bw,nhwc->nabc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)

    def _bins(self, size: int, extent: int) -> Float[np.ndarray, "size extent"]:
        weights = np.zeros((size, extent), np.float32)
        for index in range(size):
            start, end = index * extent // size, -(-(index + 1) * extent // size)
            weights[index, start:end] = 1 / (end - start)
        return weights


class Flatten(nnx.Module):
    """Flattens to the order that PyTorch's NCHW flattening has, which the following linear layer's weights expect."""

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n chw"]:
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class Resize(nnx.Module):
    """`torchvision.transforms.Resize((size, size))` of a tensor: bilinear, antialiased where it shrinks."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n size size c"]:
        shape = (x.shape[0], self.size, self.size, x.shape[3])
        return jax.image.resize(x, shape, "bilinear", antialias=True, precision=jax.lax.Precision.HIGHEST)


def global_average(x: Float[Array, "n h w c"], kernel: int = 0) -> Float[Array, "n c"]:
    """`AdaptiveAvgPool2d(1)` and flattening.

    Args:
        x: the last maps.
        kernel: of the `avg_pool2d` that the public code has in this place, if it does.

    Raises:
        ValueError: see `check_averaged_whole`.
    """
    check_averaged_whole(x, kernel)
    return x.mean((1, 2))


def check_averaged_whole(x: Float[Array, "n h w c"], kernel: int) -> None:
    """Checks that nothing but the mean over all places can make one place of maps.

    Of 4x5 places `avg_pool2d(4)` makes one too, and leaves a column out. Neither it nor a mean over all leaves a trace
    in a state dict. Where it would make several places, or none, the code that trained the weights has none.

    Raises:
        ValueError: the two differ.
    """
    extents = x.shape[1:3]
    if kernel and extents != (kernel, kernel) and all(extent // kernel == 1 for extent in extents):
        raise ValueError(
            f"it averages maps of {extents[0]}x{extents[1]}; whether all of them or, as in public code, only "
            f"{kernel}x{kernel} leaves no trace"
        )


def conv(
    in_features: int,
    out_features: int,
    kernel: Size,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    padding: Size | None = None,
    groups: int = 1,
    bias: bool = False,
) -> Conv:
    """`torch.nn.Conv2d`; by default without bias and padded so that stride 1 keeps the size."""
    rows, columns = both(kernel)
    keeping: Size = rows // 2 if rows == columns else (rows // 2, columns // 2)
    return Conv(
        in_features,
        out_features,
        (rows, columns),
        strides=stride,
        padding=keeping if padding is None else padding,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=_KERNEL,
        bias_init=_ZEROS,
        rngs=rngs,
    )


def linear(in_features: int, out_features: int, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """`torch.nn.Linear`."""
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=_KERNEL, bias_init=_ZEROS, rngs=rngs)


def batch_norm(features: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.BatchNorm:
    """`torch.nn.BatchNorm2d(features, eps)` with its running statistics."""
    abstract = rngs is ABSTRACT
    norm = nnx.BatchNorm(
        1 if abstract else features,
        use_running_average=True,
        momentum=0.9,
        epsilon=epsilon,
        scale_init=_ONES,
        bias_init=_ZEROS,
        rngs=rngs,
    )
    if abstract:
        # Flax makes arrays of the statistics even then, and compiles a program for each of their sizes: so it makes
        # them of one feature, and all four leaves get their shape here.
        norm.num_features = features
        shape: Any = jax.ShapeDtypeStruct((features,), jnp.float32)
        norm.mean, norm.var = nnx.BatchStat(shape), nnx.BatchStat(shape)
        norm.scale, norm.bias = nnx.Param(shape), nnx.Param(shape)
    return norm


def layer_norm(features: int, rngs: nnx.Rngs, epsilon: float = 1e-6) -> nnx.LayerNorm:
    """`torch.nn.LayerNorm(features, eps)`, over the last axis; its own default, 1e-5, is few networks'."""
    return nnx.LayerNorm(
        features, epsilon=epsilon, use_fast_variance=False, scale_init=_ONES, bias_init=_ZEROS, rngs=rngs
    )


def parameter(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    """A bare `torch.nn.Parameter`, zero until a checkpoint fills it."""
    return nnx.Param(_ZEROS(rngs.params(), shape, jnp.float32))
