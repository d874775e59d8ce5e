"""Trigger files: the published pictures and masks, and our own `triggers.npz`, which holds any stamp with its target.

A `triggers.npz` has, for each of its attacks numbered from 0, `N.kind` (a name in `STAMPS`), `N.name`, `N.target`
(-1 all-to-all) and the stamp's own fields, those of a generator by its arrays' names. It is read without
pickle: nothing in it is executed.
"""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ibau_jax.data.images import read_picture
from ibau_jax.data.npy import open_npz, read_npy
from ibau_jax.errors import ConfigError, DataError, quoted, shortened
from ibau_jax.triggers.attack import Attack, together
from ibau_jax.triggers.generator import arrays_of, generator_of
from ibau_jax.triggers.input_aware import InputAware
from ibau_jax.triggers.ranges import BRIGHTNESS
from ibau_jax.triggers.stamps import Additive, Masked, Patch, Quantised, Warp

Shape = tuple[int, int, int]
TRIGGERS = "triggers.npz"
ALL_TO_ALL = -1
STAMPS = {kind.__name__.lower(): kind for kind in (Patch, Additive, Masked, Warp, Quantised, InputAware)}
KINDS = {"value": "f", "levels": "iu", "dithered": "b", "learnt": "b"}  # dtypes of the fields that are one number
LARGEST = 2**26  # bytes in a file of triggers: a few of 1000x1000 images fit


def find(name: str, folders: Sequence[Path]) -> Path:
    """The first file of that name in the folders; ConfigError if there is none."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(map(str, folders)) or "no folder"
    raise ConfigError(f"the trigger file {name} is in none of: {looked}; name its folder by --trigger-dir")


def read_pattern(file: Path, shape: Shape) -> np.ndarray:
    """A picture as float32 (h, w, c) in [0, 1]; ConfigError if it can't be read or has another size."""
    try:
        return read_picture(file, shape).astype(np.float32) / 255
    except DataError as error:
        raise ConfigError(f"the trigger {file}: {error}") from error


def read_mask(file: Path, shape: Shape) -> np.ndarray:
    """A mask, float32 (h, w, 1 or c) in [0, 1], from a .npy or an image file; ConfigError if it is none."""
    if file.suffix.lower() != ".npy":
        return read_pattern(file, shape)
    mask = read_npy(file, ConfigError)
    if mask.dtype.kind not in "biuf":
        raise ConfigError(f"the mask {file} holds no numbers but {shortened(mask.dtype, 40)}")
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask.transpose(1, 2, 0) if mask.ndim == 3 and mask.shape[1:] == shape[:2] else mask
    if mask.ndim != 3 or mask.shape[:2] != shape[:2] or mask.shape[2] not in (1, shape[2]):
        raise ConfigError(
            f"the mask {file} has the shape {shortened(mask.shape)}, which does not fit images of {shape}"
        )
    if not (np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
        raise ConfigError(f"the mask {file} has values outside [0, 1]")
    return mask.astype(np.float32)


def write_triggers(attacks: Sequence[Attack], path: Path) -> None:
    """Writes the stamps of attacks with their targets, to be read by `read_triggers`."""
    content: dict[str, np.ndarray] = {}
    for index, attack in enumerate(attacks):
        assert attack.stamp is not None
        target = ALL_TO_ALL if attack.all_to_all else attack.target_label
        content |= {f"{index}.name": np.asarray(attack.name), f"{index}.target": np.asarray(target)}
        content |= {f"{index}.kind": np.asarray(type(attack.stamp).__name__.lower())}
        content |= {f"{index}.{name}": value for name, value in _fields_of(attack.stamp).items()}
    np.savez(path, **content)  # type: ignore[arg-type]


def _fields_of(stamp: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in ((field.name, getattr(stamp, field.name)) for field in fields(stamp)):
        if isinstance(value, nnx.Module):
            found |= {f"{name}.{path}": array for path, array in arrays_of(value).items()}
        else:
            found[name] = np.asarray([value.start, value.stop] if isinstance(value, slice) else value)
    return found


def read_triggers(path: Path, shape: Shape) -> Attack:
    """The attacks in a file that `write_triggers` wrote, as one.

    Raises:
        ConfigError: the file is no such file, is damaged, or is for images of another size.
    """
    try:
        with open_npz(path, DataError) as arrays:
            if arrays.nbytes > LARGEST:
                raise DataError(f"it holds {arrays.nbytes} bytes, more than any trigger takes")
            content = {name: arrays.read(name) for name in arrays.names}
            count = len({key.partition(".")[0] for key in content})
            if not count:
                raise DataError("it holds no attack")
            attacks = [_attack(index, content) for index in range(count)]
            for attack in attacks:
                _check(attack, shape)
            return together(attacks)
    except (DataError, ConfigError) as error:
        raise ConfigError(f"{path} is no file of triggers: {error}") from error


def _attack(index: int, content: dict[str, np.ndarray]) -> Attack:
    name = _text(f"{index}.kind", content)
    if name not in STAMPS:
        raise DataError(f"its trigger is of the unknown kind {quoted(name, 40)}; known are {', '.join(STAMPS)}")
    kind = STAMPS[name]
    values = {field.name: _field(f"{index}.{field.name}", content) for field in fields(kind)}
    for field in fields(kind):
        if values[field.name] is None and field.default is MISSING:
            raise DataError(f"it has no {index}.{field.name}")
    stamp: Any = kind(**{name: value for name, value in values.items() if value is not None})
    target = _scalar(f"{index}.target", content, "iu")
    all_to_all = target == ALL_TO_ALL
    return Attack(_text(f"{index}.name", content), stamp, all_to_all, target_label=None if all_to_all else target)


def _text(key: str, content: dict[str, np.ndarray]) -> str:
    return shortened(_scalar(key, content, "U"))


def _scalar(name: str, content: dict[str, np.ndarray], kinds: str) -> Any:
    if name not in content:
        raise DataError(f"it has no {name}, and such a file is written by scripts/poison.py")
    value = content[name]
    if value.ndim or value.dtype.kind not in kinds:
        raise ValueError(f"{name} has {value.ndim} axes and the dtype {shortened(value.dtype, 40)}")
    return value.item()


def _field(key: str, content: dict[str, np.ndarray]) -> Any:
    """A field's value; None where the file, an older one perhaps, does not have it."""
    if key in content:
        return _value(key, content)
    parts = {name.removeprefix(f"{key}."): array for name, array in content.items() if name.startswith(f"{key}.")}
    return generator_of({name: _finite(name, array) for name, array in parts.items()}) if parts else None


def _value(key: str, content: dict[str, np.ndarray]) -> Any:
    name, value = key.partition(".")[2], content[key]
    if name in ("rows", "columns"):
        if value.shape != (2,) or value.dtype.kind not in "iu" or not 0 <= value[0] < value[1]:
            raise ValueError(f"{name} are no first and last line")
        return slice(*map(int, value))
    if value.ndim == 0:
        return _scalar(key, content, KINDS.get(name, ""))
    if value.ndim != 3:
        raise ValueError(f"{name} has {value.ndim} axes instead of 3")
    return _finite(name, value)


def _finite(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32 or not np.isfinite(value).all():
        raise ValueError(f"{name} is no finite float32 array")
    return value


def _check(attack: Attack, shape: Shape) -> None:
    """Tries the stamp on a grey image, and raises DataError: whatever does not fit shows there."""
    stamp: Any = attack.stamp
    unfit = DataError(f"the trigger {attack.name!r} does not fit images of {'x'.join(map(str, shape))}")
    if isinstance(stamp, Patch) and not (stamp.rows.stop <= shape[0] and stamp.columns.stop <= shape[1]):
        raise unfit
    if isinstance(stamp, Masked):
        for value in (stamp.mask.min(), stamp.mask.max()):
            BRIGHTNESS.check("a value of the mask", float(value))
    try:
        stamped = np.asarray(stamp(np.full((1, *shape), 0.5, np.float32)))
    except (TypeError, ValueError, IndexError) as error:
        raise unfit from error
    if stamped.shape != (1, *shape) or not (np.isfinite(stamped).all() and 0 <= stamped.min() <= stamped.max() <= 1):
        raise unfit
