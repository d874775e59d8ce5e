"""What an attacker stamps on an image, in pixel space.

To add an attack, write a function `(folders, input_shape) -> Stamp` and decorate it with `@attack("name")`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from ibau_jax.data.dataset import Dataset
from ibau_jax.data.folder import load_triggered
from ibau_jax.errors import ConfigError

Images: TypeAlias = Float[Array | np.ndarray, "n h w c"]
Stamp: TypeAlias = Callable[[Images], Float[Array, "n h w c"]]
Shape = tuple[int, int, int]
FOLDER = "folder:"


@dataclass(frozen=True, eq=False)
class Attack:
    """A trigger and what it makes a backdoored model say.

    Attributes:
        name: what results call it.
        stamp: puts the trigger on images, float (n, h, w, c) in [0, 1]; so are the results. None where only the
            triggered images themselves are known.
        all_to_all: whether class y becomes y + 1 (modulo the number of classes), not one target label.
        triggered: images that carry the trigger already, with their true classes.
    """

    name: str
    stamp: Stamp | None
    all_to_all: bool = False
    triggered: Dataset | None = None

    def victims(self, dataset: Dataset) -> Dataset:
        """The images to measure the attack on, before `stamp`: those that carry the trigger, else `dataset`."""
        return dataset if self.triggered is None else self.triggered

    def targets(self, labels: np.ndarray, num_classes: int, target_label: int | None) -> np.ndarray:
        """The class that the attacker wants for images of these true classes, (n,)."""
        if self.all_to_all:
            return (labels + 1) % num_classes
        return np.full_like(labels, target_label)


_ATTACKS: dict[str, Callable[[Sequence[Path], Shape], Attack]] = {}


def attack(name: str) -> Callable[[Callable[[Sequence[Path], Shape], Stamp]], Callable[[Sequence[Path], Shape], Stamp]]:
    """Registers a function `(folders, input_shape) -> stamp` as a single-target attack."""

    def register(make: Callable[[Sequence[Path], Shape], Stamp]) -> Callable[[Sequence[Path], Shape], Stamp]:
        _ATTACKS[name] = lambda folders, shape: Attack(name, make(folders, shape))
        return make

    return register


def attack_names() -> tuple[str, ...]:
    """The registered attacks."""
    return tuple(_ATTACKS)


def load_attack(
    spec: str,
    input_shape: Shape,
    folders: Sequence[Path] = (),
    mask: Path | None = None,
    without: Collection[int] = (),
) -> Attack:
    """The attack that a spec names.

    Args:
        spec: a registered name, a PNG file to add to the image, or `folder:PATH` of triggered images.
        input_shape: height, width and channels of the images.
        folders: where to look for the published trigger files.
        mask: for a PNG file: where it replaces the image instead, a .npy (1 x h x w, 3 x h x w or h x w) or image file.
        without: indices of triggered images to leave out (see `ibau_jax.data.folder.load_triggered`).

    Raises:
        DataError: the folder of triggered images is not there or can't be read.
        ConfigError: there is no such attack, or its files are missing or of another size.
    """
    if spec.startswith(FOLDER) and mask is None:
        return Attack(spec, None, triggered=load_triggered(spec.removeprefix(FOLDER), input_shape, without))
    if spec in _ATTACKS and mask is None:
        return _ATTACKS[spec](folders, input_shape)
    if not Path(spec).is_file():
        what = "takes no mask" if spec in _ATTACKS or spec.startswith(FOLDER) else "is no attack and no PNG file"
        forms = f"one of {', '.join(_ATTACKS)}, a PNG file, or {FOLDER}PATH"
        raise ConfigError(f"{spec!r} {what}; --attack takes {forms}")
    pattern = _read_pattern(Path(spec), input_shape)
    return Attack(spec, additive(pattern) if mask is None else masked(pattern, _read_mask(mask, input_shape)))


def patch(rows: slice, columns: slice, value: float = 1.0) -> Stamp:
    """Sets a rectangle of pixels to `value`."""
    return lambda images: jnp.asarray(images).at[:, rows, columns, :].set(value)


def additive(pattern: np.ndarray) -> Stamp:
    """x + pattern, clipped to [0, 1]; `pattern` is float (h, w, c)."""
    return lambda images: jnp.clip(images + jnp.asarray(pattern)[None], 0, 1)


def masked(pattern: np.ndarray, mask: np.ndarray) -> Stamp:
    """x · (1 − mask) + pattern, clipped to [0, 1]; both are float (h, w, c)."""
    return lambda images: jnp.clip(images * (1 - jnp.asarray(mask)[None]) + jnp.asarray(pattern)[None], 0, 1)


@attack("badnets")
def badnets(folders: Sequence[Path], shape: Shape) -> Stamp:
    """BadNets (Gu et al., 2017): a white 4x4 square one pixel from the bottom-right corner."""
    height, width, _ = shape
    return patch(slice(height - 5, height - 1), slice(width - 5, width - 1))


_ATTACKS["badnets_all2all"] = lambda folders, shape: Attack("badnets_all2all", badnets(folders, shape), all_to_all=True)


def _published_png(name: str) -> Callable[[Sequence[Path], Shape], Stamp]:
    return lambda folders, shape: additive(_read_pattern(_find(f"{name}.png", folders), shape))


for _name in ("trojan_sq", "trojan_wm", "l2_inv"):
    attack(_name)(_published_png(_name))


@attack("l0_inv")
def l0_inv(folders: Sequence[Path], shape: Shape) -> Stamp:
    """The l0-bounded invisible trigger (Li et al., 2020): a few pixels replaced."""
    pattern = _read_pattern(_find("l0_inv.png", folders), shape)
    return masked(pattern, _read_mask(_find("mask.npy", folders), shape))


def _find(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(map(str, folders)) or "no folder"
    raise ConfigError(f"the trigger file {name} is in none of: {looked}; name its folder by --trigger-dir")


def _read_pattern(file: Path, shape: Shape) -> np.ndarray:
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB" if shape[2] == 3 else "L"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the trigger {file}: {str(error)[:200]}") from error
    pixels = pixels.reshape(*pixels.shape[:2], shape[2])
    if pixels.shape != shape:
        raise ConfigError(
            f"the trigger {file} is {pixels.shape[0]}x{pixels.shape[1]}, the images {shape[0]}x{shape[1]}"
        )
    return pixels.astype(np.float32) / 255


def _read_mask(file: Path, shape: Shape) -> np.ndarray:
    if file.suffix != ".npy":
        return _read_pattern(file, shape)
    try:
        mask = np.load(file, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the mask {file}: {str(error)[:200]}") from error
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask.transpose(1, 2, 0) if mask.ndim == 3 and mask.shape[1:] == shape[:2] else mask
    if mask.ndim != 3 or mask.shape[:2] != shape[:2] or mask.shape[2] not in (1, shape[2]):
        raise ConfigError(f"the mask {file} has the shape {mask.shape}, which does not fit images of {shape}")
    if not (np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
        raise ConfigError(f"the mask {file} has values outside [0, 1]")
    return mask
