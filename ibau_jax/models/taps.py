"""What a model computes on the way, for defences that look inside: seen while it is called, without changing it.

Nothing is recorded, and nothing costs anything, outside of `tapped()`. It works under `jax.jit` and `jax.grad` where
both the block and what uses its records are inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from flax import nnx
from jaxtyping import Array


@dataclass
class Taps:
    """What was seen.

    Attributes:
        convolutions: each with the BatchNorm behind it, if any, and the output of both, in the order of their calls.
        maps: the last features (n, h, w, c) of each resolution (h, w), as a chain of layers left them.
    """

    convolutions: list[tuple[nnx.Module, nnx.Module | None, Array]] = field(default_factory=list)
    maps: dict[tuple[int, ...], Array] = field(default_factory=dict)


_CURRENT: ContextVar[Taps | None] = ContextVar("taps", default=None)


@contextmanager
def tapped() -> Iterator[Taps]:
    """Records what models compute inside of the block."""
    taps = Taps()
    token = _CURRENT.set(taps)
    try:
        yield taps
    finally:
        _CURRENT.reset(token)


def tap_convolution(conv: nnx.Module, norm: nnx.Module | None, output: Array) -> Array:
    """Records a convolution, and gives its output."""
    taps = _CURRENT.get()
    if taps is not None:
        taps.convolutions.append((conv, norm, output))
    return output


def tap_map(features: Array) -> Array:
    """Records features of their resolution, and gives them."""
    taps = _CURRENT.get()
    if taps is not None and features.ndim == 4:
        taps.maps.pop(features.shape[1:3], None)  # the order is that of the last ones
        taps.maps[features.shape[1:3]] = features
    return features
