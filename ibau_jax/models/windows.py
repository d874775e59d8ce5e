"""How tokens lie in windows, and the buffers in which PyTorch's modules save it.

Such a buffer holds no weights, only what the network computes itself; a file may have it or not.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

Shape = tuple[int, ...]
Tokens = TypeVar("Tokens", np.ndarray, jax.Array)
LARGEST_WINDOW, MOST_WINDOWS = 64, 2**12  # whatever a file says: larger ones take long to compute
MASKED = -100.0  # added to the logits of tokens that are no neighbours


def table_size(window: int) -> int:
    """How many positions two tokens of a window can have to each other."""
    return (2 * window - 1) ** 2


def window_side(positions: int) -> int | None:
    """The side of the window in which two tokens can have so many positions to each other; None if there is none."""
    side = (math.isqrt(positions) + 1) // 2
    return side if 0 < side <= LARGEST_WINDOW and table_size(side) == positions else None


def in_windows(tokens: Tokens, window: int) -> Tokens:
    """Tokens (n, rows, columns, c) window after window, in row order: (n, windows, tokens of a window, c)."""
    count, rows, columns, features = tokens.shape
    split = tokens.reshape(count, rows // window, window, columns // window, window, features)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, window**2, features)


def in_place(windows: Tokens, grid: Shape, window: int) -> Tokens:
    """Tokens in their rows and columns, which `grid` gives: the inverse of `in_windows`."""
    count, features, (rows, columns) = windows.shape[0], windows.shape[3], grid
    split = windows.reshape(count, rows // window, columns // window, window, window, features)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows, columns, features)


def relative_position_index(window: int) -> Int[np.ndarray, "tokens tokens"]:
    """For two tokens of a window, in row order, which row of a table says how the first lies to the second."""
    rows, columns = np.divmod(np.arange(window**2), window)
    down, right = (places[:, None] - places[None] + window - 1 for places in (rows, columns))
    return down * (2 * window - 1) + right


def shifted_mask(grid: Shape, window: int, shift: Shape) -> Float[np.ndarray, "windows tokens tokens"]:
    """What is added to the logits of each window's tokens, where the grid was shifted cyclically.

    Args:
        grid: its rows and columns, multiples of the window.
        window: the side of a window.
        shift: by how much it was shifted, up and to the left. What came from the other side is no neighbour.
    """
    # Along each axis, 0 before the last window, 1 in it, and 2 in what came from the other side.
    rows, columns = (
        (np.arange(extent) >= extent - window).astype(int) + (np.arange(extent) >= extent - moved)
        for extent, moved in zip(grid, shift, strict=True)
    )
    region = in_windows((3 * rows[:, None] + columns)[None, ..., None], window)[0, ..., 0]
    return np.where(region[:, :, None] == region[:, None], 0.0, MASKED).astype(np.float32)


def _index_buffer(positions: int, shape: Shape) -> np.ndarray | None:
    """The index for a table of so many rows, flat as torchvision has it or square as others have it."""
    window = window_side(positions)
    index = relative_position_index(window) if window else None
    return index.ravel() if index is not None and len(shape) == 1 else index


def _mask_buffer(positions: int, shape: Shape) -> np.ndarray | None:
    """The mask that a shifted block has for a square grid of as many windows as `shape` says."""
    window = window_side(positions)
    if window is None or len(shape) != 3 or shape[0] > MOST_WINDOWS:
        return None
    side = math.isqrt(shape[0]) * window
    return shifted_mask((side, side), window, (window // 2,) * 2)


# The last part of a buffer's name, where the table lies beside it, and what the buffer holds for one of so many rows
# where its shape is the given one.
BUFFERS: Mapping[str, tuple[str, Callable[[int, Shape], np.ndarray | None]]] = {
    "relative_position_index": ("relative_position_bias_table", _index_buffer),
    "attn_mask": ("attn.relative_position_bias_table", _mask_buffer),
}
