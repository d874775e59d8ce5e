"""What an attacker does to pixels: functions of images, float (n, h, w, c) in [0, 1], with results in [0, 1].

Each is a dataclass whose fields are all there is to know of it, so that it can be written to a file and read again
(`ibau_jax.triggers.files`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ibau_jax.errors import ConfigError
from ibau_jax.perturbations.warp import taken_from
from ibau_jax.triggers.ranges import BRIGHTNESS, LEVELS

Images: TypeAlias = Float[Array | np.ndarray, "n h w c"]
Stamp: TypeAlias = Callable[[Images], Float[Array, "n h w c"]]


@dataclass(frozen=True, eq=False)
class Patch:
    """Sets a rectangle of pixels, `rows` and `columns`, to `value`."""

    rows: slice
    columns: slice
    value: float = 1.0

    def __post_init__(self) -> None:
        BRIGHTNESS.check("value", self.value)

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images with the patch."""
        return jnp.asarray(images).at[:, self.rows, self.columns, :].set(self.value)


@dataclass(frozen=True, eq=False)
class Additive:
    """x + pattern, clipped to [0, 1]; `pattern` is float (h, w, c) and may be negative."""

    pattern: Float[np.ndarray, "h w c"]

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images with the pattern on them."""
        return jnp.clip(images + jnp.asarray(self.pattern)[None], 0, 1)


@dataclass(frozen=True, eq=False)
class Masked:
    """x · (1 − mask) + pattern, clipped to [0, 1]; `pattern` is float (h, w, c), `mask` (h, w, 1 or c) in [0, 1]."""

    pattern: Float[np.ndarray, "h w c"]
    mask: Float[np.ndarray, "h w m"]

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images with the pattern in them."""
        return jnp.clip(images * (1 - jnp.asarray(self.mask)[None]) + jnp.asarray(self.pattern)[None], 0, 1)


@dataclass(frozen=True, eq=False)
class Warp:
    """Each pixel is that of another place, bilinearly (WaNet; Nguyen and Tran, ICLR 2021).

    `grid`, float (h, w, 2), holds the row and the column that each pixel is taken from, inside the image.
    """

    grid: Float[np.ndarray, "h w 2"]

    def __post_init__(self) -> None:
        if self.grid.ndim != 3 or self.grid.shape[2] != 2:
            raise ConfigError(f"a warp's grid has the shape {self.grid.shape}; it must be height x width x 2")

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The warped images."""
        return taken_from(jnp.asarray(images), jnp.asarray(self.grid))

    def decoy(self, key: Array, images: Images) -> Float[Array, "n h w c"]:
        """The paper's noise mode: the warp of each image moved by up to half a pixel at random."""
        noise = jax.random.uniform(key, (len(images), *self.grid.shape), minval=-0.5, maxval=0.5)
        grids = jnp.asarray(self.grid)[None] + noise
        return jax.vmap(lambda image, grid: taken_from(image[None], grid)[0])(jnp.asarray(images), grids)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Fewer levels of brightness (BppAttack; Wang et al., CVPR 2022).

    Attributes:
        levels: values a channel.
        dithered: whether a pixel's error goes on to its neighbours (Floyd and Steinberg, 1976).
    """

    levels: int
    dithered: bool = False

    def __post_init__(self) -> None:
        LEVELS.check("levels", self.levels)

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images with `levels` values a channel."""
        return dithered(images, self._rounded) if self.dithered else self._rounded(jnp.asarray(images))

    def _rounded(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.round(jnp.clip(values, 0, 1) * (self.levels - 1)) / (self.levels - 1)

    def decoy(self, key: Array, images: Images) -> Float[Array, "n h w c"]:
        """The paper's negative samples: each image with the quantisation error of another one."""
        errors = self(images) - images
        return jnp.clip(images + errors[another(key, len(images))], 0, 1)


def another(key: Array, count: int) -> Int[Array, " n"]:
    """For each of `count` images the number of another one, at a random distance that is the same for all."""
    return (jnp.arange(count) - jax.random.randint(key, (), 1, max(2, count))) % count


def dithered(images: Images, rounded: Callable[[Array], Array]) -> Float[Array, "n h w c"]:
    """Each pixel rounded, row by row from the left, its error given to those that follow.

    7/16 of it to the next one, 3/16, 5/16 and 1/16 to those below, from the left one on (Floyd and Steinberg, 1976).
    """
    count, _, width, channels = images.shape
    pixels = jnp.asarray(images).transpose(1, 2, 0, 3)

    def of_row(above: Array, row: Array) -> tuple[Array, Array]:  # `above`: errors of the row before
        before, behind = jnp.pad(above, ((1, 0), (0, 0), (0, 0)))[:-1], jnp.pad(above, ((0, 1), (0, 0), (0, 0)))[1:]
        given = (before + 5 * above + 3 * behind) / 16

        def of_pixel(left: Array, pixel: Array) -> tuple[Array, tuple[Array, Array]]:
            wanted = pixel + 7 / 16 * left
            found = rounded(wanted)
            return wanted - found, (wanted - found, found)

        _, (errors, found) = jax.lax.scan(of_pixel, jnp.zeros((count, channels)), row + given)
        return errors, found

    _, found = jax.lax.scan(of_row, jnp.zeros((width, count, channels)), pixels)
    return found.transpose(2, 0, 1, 3)
