"""A smooth flow moves the pixels of all images, as WaNet's triggers do."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ibau_jax.perturbations.ascent import STRIDE, along_gradient, into_ball, scaled
from ibau_jax.perturbations.space import Images, Shape

SHARPNESS = -0.75  # of Keys's cubic kernel: PyTorch's, which WaNet enlarges its flows with
SQUARES = 8  # along the shorter side of the board that a flow is drawn on


@dataclass(frozen=True)
class Warp:
    """Takes each pixel from another place (WaNet; Nguyen and Tran, ICLR 2021, section 3.2).

    φ is a flow, float (points, points, 2): how many rows and columns away the pixels at control points come from, in
    pixels; between them it is interpolated by cubic convolution. Its size is the root mean square of the points' way.
    """

    points: int = 4
    name: str = "warp"
    unit: str = "pixels"

    def init(self, key: Array, shape: Shape) -> Float[Array, "k k 2"]:
        """Draws a flow of a hundredth of a pixel."""
        return 1e-2 * jax.random.normal(key, (self.points, self.points, 2))

    def apply(self, delta: Float[Array, "k k 2"], images: Images) -> Images:
        """Takes pixels from where the flow says, bilinearly; from the border where that is outside."""
        height, width = images.shape[1:3]
        rows, columns = jnp.asarray(_enlarging(self.points, height)), jnp.asarray(_enlarging(self.points, width))
        flow = jnp.einsum("hk,klt,wl->hwt", rows, delta, columns)
        still = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
        return taken_from(images, still + flow)

    def size(self, delta: Float[Array, "k k 2"]) -> Float[Array, ""]:
        """Measures the root mean square of the control points' way, in pixels."""
        return jnp.linalg.norm(delta) / self.points

    def project(self, delta: Float[Array, "k k 2"], size: Float[Array, ""] | float) -> Float[Array, "k k 2"]:
        """Scales the flow."""
        return into_ball(delta, self.size(delta), size)

    def enlarge(self, delta: Float[Array, "k k 2"], factor: Float[Array, ""] | float) -> Float[Array, "k k 2"]:
        """Multiplies the flow."""
        return factor * delta

    def max_size(self, shape: Shape) -> float:
        """Computes an eighth of the shorter side, many times what WaNet moves pixels by."""
        return min(shape[:2]) / 8  # with a quarter classes stand out that are no targets (benchmarks/NOTEBOOK.md)

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Steps along the gradient, a share of the size long."""
        return along_gradient(self.size, scaled(schedule, STRIDE), in_sizes=True)

    def to_image(self, delta: Float[np.ndarray, "k k 2"], shape: Shape) -> Float[np.ndarray, "h w 1"]:
        """Draws a chessboard with the flow applied."""
        square = max(1, min(shape[:2]) // SQUARES)
        board = np.sum(np.indices(shape[:2]) // square, axis=0, keepdims=True) % 2
        return np.asarray(self.apply(jnp.asarray(delta), jnp.asarray(board[..., None], jnp.float32))[0])


@functools.cache
def _enlarging(points: int, length: int) -> Float[np.ndarray, "length points"]:
    """Computes the matrix that interpolates between control points, of which the outer ones lie on the outer pixels.

    Cubic convolution (Keys, 1981) with values repeated beyond the ends, as PyTorch's bicubic `interpolate` has it.
    """
    places = np.linspace(0, points - 1, length)
    matrix = np.zeros((length, points))
    for neighbour in range(-1, 3):
        near = np.floor(places).astype(int) + neighbour
        np.add.at(matrix, (np.arange(length), np.clip(near, 0, points - 1)), _keys(np.abs(places - near)))
    return matrix.astype(np.float32)


def _keys(distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Evaluates Keys's kernel at distances of up to 2."""
    near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
    far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def taken_from(images: Images, grid: Float[Array, "h w 2"]) -> Images:
    """Takes each pixel from the row and the column that the grid holds for it, bilinearly.

    Args:
        images: float (n, h, w, c).
        grid: float (h, w, 2), the same for all images; places outside are moved to the border.
    """
    tops, weights = [], []
    for axis in (0, 1):
        place = jnp.clip(grid[..., axis], 0, images.shape[1 + axis] - 1)
        top = jnp.clip(jnp.floor(jax.lax.stop_gradient(place)), 0, max(images.shape[1 + axis] - 2, 0)).astype(jnp.int32)
        tops.append(top)
        weights.append((place - top)[None, ..., None])
    (row, column), (down, right) = tops, weights
    below, beside = (jnp.minimum(top + 1, size - 1) for top, size in zip(tops, images.shape[1:3], strict=True))
    upper = images[:, row, column] * (1 - right) + images[:, row, beside] * right
    lower = images[:, below, column] * (1 - right) + images[:, below, beside] * right
    return upper * (1 - down) + lower * down
