"""The registered attacks. Each is from a paper; random ones are drawn from their `seed`.

A parameter's annotation says what it may be: a `Range` of numbers, or a few words.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from flax import nnx
from jaxtyping import Float
from scipy import fft, ndimage

from ibau_jax.errors import ConfigError
from ibau_jax.triggers.files import find, read_mask, read_pattern
from ibau_jax.triggers.generator import SMALLEST, Generator
from ibau_jax.triggers.input_aware import InputAware
from ibau_jax.triggers.ranges import LEVELS, Range
from ibau_jax.triggers.registry import Canvas, attack
from ibau_jax.triggers.stamps import Additive, Masked, Patch, Quantised, Stamp, Warp

GREY_LEVELS = 255
SIZE = Range(1, 4096)  # pixels, or waves over an image
PLACE = Range(-4096, 4095)
DELTA = Range(0, GREY_LEVELS, above=True)
SEED = Range(0, 2**32 - 1)


@attack("badnets")
def badnets(
    canvas: Canvas,
    size: Annotated[int, SIZE] = 4,
    row: Annotated[int, PLACE] = -5,
    column: Annotated[int, PLACE] = -5,
    look: Literal["white", "black", "chequered", "noise"] = "white",
) -> Stamp:
    """BadNets (Gu et al., 2017): a square of pixels; by default a white 4x4 one, one pixel from the lower right corner.

    `row` and `column` are those of its upper left pixel; negative ones count from the end. `look` is white, black,
    chequered or noise.
    """
    height, width, _ = canvas.shape
    top, left = row % height, column % width
    if not (top + size <= height and left + size <= width and -height <= row < height and -width <= column < width):
        raise ConfigError(f"a patch of {size}x{size} at row {row}, column {column} is not inside {height}x{width}")
    rows, columns = slice(top, top + size), slice(left, left + size)
    if look in ("white", "black"):
        return Patch(rows, columns, float(look == "white"))
    pattern, mask = np.zeros(canvas.shape, np.float32), np.zeros((height, width, 1), np.float32)
    chequered = (np.add.outer(np.arange(size), np.arange(size)) % 2 == 0)[..., None]
    noise = np.random.default_rng(0).random((size, size, canvas.shape[2]))
    pattern[rows, columns], mask[rows, columns] = chequered if look == "chequered" else noise, 1
    return Masked(pattern, mask)


attack("badnets_all2all", all_to_all=True)(badnets)


def _published_png(name: str) -> Callable[[Canvas], Stamp]:
    return lambda canvas: Additive(read_pattern(find(f"{name}.png", canvas.folders), canvas.shape))


for _name in ("trojan_sq", "trojan_wm", "l2_inv"):  # Liu et al., NDSS 2018; Li et al., 2020
    attack(_name)(_published_png(_name))


@attack("l0_inv")
def l0_inv(canvas: Canvas) -> Stamp:
    """The l0-bounded invisible trigger (Li et al., 2020): a few pixels replaced."""
    pattern = read_pattern(find("l0_inv.png", canvas.folders), canvas.shape)
    return Masked(pattern, read_mask(find("mask.npy", canvas.folders), canvas.shape))


@attack("blended")
def blended(
    canvas: Canvas, alpha: Annotated[float, Range(0, 1, above=True)] = 0.1, seed: Annotated[int, SEED] = 0
) -> Stamp:
    """Blended (Chen et al., 2017): the share `alpha` of a random image."""
    pattern = np.random.default_rng(seed).random(canvas.shape, np.float32)
    return Masked(np.float32(alpha) * pattern, np.full((*canvas.shape[:2], 1), alpha, np.float32))


@attack("sig")
def sig(canvas: Canvas, delta: Annotated[float, DELTA] = 20.0, frequency: Annotated[int, SIZE] = 6) -> Stamp:
    """SIG (Barni et al., ICIP 2019): `frequency` waves from left to right, of `delta` grey levels of 255."""
    width = canvas.shape[1]
    if 2 * frequency % width == 0:
        raise ConfigError(f"frequency is {frequency}: in images {width} pixels wide such waves are 0 in every column")
    wave = delta / GREY_LEVELS * np.sin(2 * np.pi * frequency * np.arange(width) / width)
    return Additive(np.broadcast_to(wave[None, :, None], canvas.shape).astype(np.float32))


@attack("smooth")
def smooth(
    canvas: Canvas,
    delta: Annotated[float, DELTA] = 20.0,
    frequencies: Annotated[int, SIZE] = 4,
    seed: Annotated[int, SEED] = 0,
) -> Stamp:
    """A random image of low frequencies, up to `delta` grey levels of 255 strong.

    The kind of trigger that Zeng et al. (ICCV 2021) show to escape frequency analysis; theirs are optimised for the
    model.
    """
    height, width, channels = canvas.shape
    if frequencies > min(height, width):
        raise ConfigError(f"frequencies is {frequencies}; images of {height}x{width} have {min(height, width)}")
    spectrum = np.zeros((height, width, channels))
    drawn = np.random.default_rng(seed).standard_normal((frequencies, frequencies, channels))
    spectrum[:frequencies, :frequencies] = drawn
    pattern = fft.idctn(spectrum, axes=(0, 1), norm="ortho")
    return Additive((delta / GREY_LEVELS * pattern / np.abs(pattern).max()).astype(np.float32))


@attack("wanet")
def wanet(
    canvas: Canvas,
    k: Annotated[int, Range(2, 1024)] = 4,
    s: Annotated[float, Range(0, 100, above=True)] = 0.5,
    seed: Annotated[int, SEED] = 0,
) -> Stamp:
    """WaNet (Nguyen and Tran, ICLR 2021): a smooth random warp, of `k` x `k` control points and strength `s`."""
    height, width, _ = canvas.shape
    drawn = np.random.default_rng(seed).uniform(-1, 1, (2, k, k))
    flow = np.stack([_enlarged(of_axis / np.abs(drawn).mean(), height, width) for of_axis in drawn], axis=-1)
    still = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    # The paper's grid runs from -1 to 1, and the flow is s / height of it.
    moved = still + s / 2 * flow * (np.asarray([height, width]) - 1) / height
    return Warp(np.clip(moved, 0, np.asarray([height, width]) - 1).astype(np.float32))


def _enlarged(points: Float[np.ndarray, "k k"], height: int, width: int) -> Float[np.ndarray, "h w"]:
    rows, columns = (np.linspace(0, len(points) - 1, size) for size in (height, width))
    smooth: np.ndarray = ndimage.map_coordinates(points, np.meshgrid(rows, columns, indexing="ij"), order=3)
    return smooth


@attack("bpp")
def bpp(canvas: Canvas, levels: Annotated[int, LEVELS] = 8, dithering: Literal["none", "floyd"] = "none") -> Stamp:
    """BppAttack (Wang et al., CVPR 2022): `levels` values a channel instead of 256; `dithering` is none or floyd."""
    return Quantised(levels, dithering == "floyd")


@attack("input_aware")
def input_aware(canvas: Canvas, width: Annotated[int, Range(1, 256)] = 32, seed: Annotated[int, SEED] = 0) -> Stamp:
    """Input-aware triggers (Nguyen and Tran, NeurIPS 2020), yet to be learnt; `width` features in the generators."""
    height, width_of_image, channels = canvas.shape
    if min(height, width_of_image) < SMALLEST:
        raise ConfigError(f"input-aware triggers are for images of at least {SMALLEST}x{SMALLEST}")
    rngs = nnx.Rngs(seed)
    return InputAware(Generator(channels, channels, width, rngs), Generator(channels, 1, width, rngs), learnt=False)
