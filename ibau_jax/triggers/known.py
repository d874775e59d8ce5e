"""The registered attacks. Each is from a paper; random ones are drawn from their `seed`."""

from collections.abc import Callable

import numpy as np
from flax import nnx
from jaxtyping import Float
from scipy import fft, ndimage

from ibau_jax.errors import ConfigError
from ibau_jax.triggers.files import find, read_mask, read_pattern
from ibau_jax.triggers.generator import SMALLEST, Generator
from ibau_jax.triggers.input_aware import InputAware
from ibau_jax.triggers.registry import Canvas, attack
from ibau_jax.triggers.stamps import Additive, Masked, Patch, Quantised, Stamp, Warp

GREY_LEVELS = 255


@attack("badnets")
def badnets(canvas: Canvas, size: int = 4, row: int = -5, column: int = -5, look: str = "white") -> Stamp:
    """BadNets (Gu et al., 2017): a square of pixels; by default a white 4x4 one, one pixel from the lower right corner.

    `row` and `column` are those of its upper left pixel; negative ones count from the end. `look` is white, black,
    chequered or noise.
    """
    height, width, _ = canvas.shape
    top, left = row % height, column % width
    if not (size > 0 and top + size <= height and left + size <= width and -height <= row and -width <= column):
        raise ConfigError(f"a patch of {size}x{size} at row {row}, column {column} is not inside {height}x{width}")
    rows, columns = slice(top, top + size), slice(left, left + size)
    if look in ("white", "black"):
        return Patch(rows, columns, float(look == "white"))
    if look not in ("chequered", "noise"):
        raise ConfigError(f"look is {look!r}; choose white, black, chequered or noise")
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
def blended(canvas: Canvas, alpha: float = 0.1, seed: int = 0) -> Stamp:
    """Blended (Chen et al., 2017): the share `alpha` of a random image."""
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; it must be in (0, 1]")
    pattern = np.random.default_rng(seed).random(canvas.shape, np.float32)
    return Masked(np.float32(alpha) * pattern, np.full((*canvas.shape[:2], 1), alpha, np.float32))


@attack("sig")
def sig(canvas: Canvas, delta: float = 20.0, frequency: int = 6) -> Stamp:
    """SIG (Barni et al., ICIP 2019): `frequency` waves from left to right, of `delta` grey levels of 255."""
    width = canvas.shape[1]
    if 2 * frequency % width == 0:
        raise ConfigError(f"frequency is {frequency}: in images {width} pixels wide such waves are 0 in every column")
    wave = delta / GREY_LEVELS * np.sin(2 * np.pi * frequency * np.arange(width) / width)
    return Additive(np.broadcast_to(wave[None, :, None], canvas.shape).astype(np.float32))


@attack("smooth")
def smooth(canvas: Canvas, delta: float = 20.0, frequencies: int = 4, seed: int = 0) -> Stamp:
    """A random image of low frequencies, up to `delta` grey levels of 255 strong.

    The kind of trigger that Zeng et al. (ICCV 2021) show to escape frequency analysis; theirs are optimised for the
    model.
    """
    height, width, channels = canvas.shape
    spectrum = np.zeros((height, width, channels))
    drawn = np.random.default_rng(seed).standard_normal((frequencies, frequencies, channels))
    spectrum[:frequencies, :frequencies] = drawn
    pattern = fft.idctn(spectrum, axes=(0, 1), norm="ortho")
    return Additive((delta / GREY_LEVELS * pattern / np.abs(pattern).max()).astype(np.float32))


@attack("wanet")
def wanet(canvas: Canvas, k: int = 4, s: float = 0.5, seed: int = 0) -> Stamp:
    """WaNet (Nguyen and Tran, ICLR 2021): a smooth random warp, of `k` x `k` control points and strength `s`."""
    if k < 2:
        raise ConfigError(f"k is {k}; a warp has at least 2x2 control points")
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
def bpp(canvas: Canvas, levels: int = 8, dithering: str = "none") -> Stamp:
    """BppAttack (Wang et al., CVPR 2022): `levels` values a channel instead of 256; `dithering` is none or floyd."""
    if dithering not in ("none", "floyd"):
        raise ConfigError(f"dithering is {dithering!r}; choose none or floyd")
    if not 2 <= levels <= GREY_LEVELS:
        raise ConfigError(f"levels is {levels}; choose 2 to {GREY_LEVELS}")
    return Quantised(levels, dithering == "floyd")


@attack("input_aware")
def input_aware(canvas: Canvas, width: int = 32, seed: int = 0) -> Stamp:
    """Input-aware triggers (Nguyen and Tran, NeurIPS 2020), yet to be learnt; `width` features in the generators."""
    height, width_of_image, channels = canvas.shape
    if width < 1:
        raise ConfigError(f"width is {width}; it must be at least 1")
    if min(height, width_of_image) < SMALLEST:
        raise ConfigError(f"input-aware triggers are for images of at least {SMALLEST}x{SMALLEST}")
    rngs = nnx.Rngs(seed)
    return InputAware(Generator(channels, channels, width, rngs), Generator(channels, 1, width, rngs), learnt=False)
