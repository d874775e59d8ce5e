"""Attacks by name, with parameters: `NAME` or `NAME:KEY=VALUE,KEY=VALUE`.

To add an attack, write a function `(canvas, **parameters) -> Stamp` in `ibau_jax.triggers.known`, each parameter with a
default and its `Range`, or a few words, as annotation, and decorate it with `@attack("name")`.
"""

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ibau_jax.data.folder import load_triggered
from ibau_jax.errors import ConfigError, quoted
from ibau_jax.triggers.attack import Attack
from ibau_jax.triggers.files import TRIGGERS, Shape, read_mask, read_pattern, read_triggers
from ibau_jax.triggers.input_aware import InputAware
from ibau_jax.triggers.stamps import Additive, Masked, Stamp

FOLDER = "folder:"


@dataclass(frozen=True)
class Canvas:
    """What a trigger is made for.

    Attributes:
        shape: height, width and channels of the images.
        folders: where the published trigger files may lie.
    """

    shape: Shape
    folders: Sequence[Path] = ()


@dataclass(frozen=True)
class _Known:
    make: Callable[..., Stamp]
    all_to_all: bool

    @property
    def defaults(self) -> dict[str, Any]:
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    @property
    def kinds(self) -> dict[str, Any]:
        """The parameters' annotations: `Annotated[int, Range]`, `Annotated[float, Range]` or `Literal`."""
        return get_type_hints(self.make, include_extras=True)


_KNOWN: dict[str, _Known] = {}


def attack(name: str, *, all_to_all: bool = False) -> Callable[[Callable[..., Stamp]], Callable[..., Stamp]]:
    """Registers a function `(canvas, **parameters) -> stamp` as an attack."""

    def register(make: Callable[..., Stamp]) -> Callable[..., Stamp]:
        _KNOWN[name] = _Known(make, all_to_all)
        return make

    return register


def attack_names() -> tuple[str, ...]:
    """The registered attacks."""
    return tuple(_KNOWN)


def load_attack(
    spec: str,
    input_shape: Shape,
    folders: Sequence[Path] = (),
    mask: Path | None = None,
    without: Collection[int] = (),
) -> Attack:
    """The attack that a spec names.

    Args:
        spec: a registered name, with parameters if need be (`badnets:size=3,row=1,column=1`), a file `triggers.npz`
            that scripts/poison.py wrote, a PNG file to add to the image, or `folder:PATH` of triggered images.
        input_shape: height, width and channels of the images.
        folders: where to look for the published trigger files.
        mask: for a PNG file: where it replaces the image instead, a .npy (1 x h x w, 3 x h x w or h x w) or image file.
        without: indices of triggered images to leave out (see `ibau_jax.data.folder.load_triggered`).

    Raises:
        DataError: the folder of triggered images is not there or can't be read.
        ConfigError: there is no such attack or parameter, or its files are missing or of another size; or its trigger
            is learnt with the model, and this is not the file that it was written to.
    """
    found = _load(spec, input_shape, folders, mask, without)
    if isinstance(found.stamp, InputAware) and not found.stamp.learnt:
        raise ConfigError(f"{spec}'s trigger is learnt with its model; name the {TRIGGERS} written beside it")
    return found


def _load(
    spec: str, input_shape: Shape, folders: Sequence[Path], mask: Path | None = None, without: Collection[int] = ()
) -> Attack:
    name, _, parameters = spec.partition(":")
    if mask is None:
        if spec.startswith(FOLDER):
            return Attack(spec, None, triggered=load_triggered(spec.removeprefix(FOLDER), input_shape, without))
        if name in _KNOWN:
            return _registered(spec, name, parameters, Canvas(input_shape, folders))
        if Path(spec).suffix == ".npz" and os.path.isfile(spec):
            return read_triggers(Path(spec), input_shape)
    if not os.path.isfile(spec):
        takes_none = name in _KNOWN or spec.startswith(FOLDER)
        what = "takes no mask" if takes_none else "is no attack and no file"
        forms = f"one of {', '.join(_KNOWN)}, a PNG file, a triggers.npz, or {FOLDER}PATH"
        raise ConfigError(f"{quoted(spec)} {what}; --attack takes {forms}")
    pattern = read_pattern(Path(spec), input_shape)
    return Attack(spec, Additive(pattern) if mask is None else Masked(pattern, read_mask(mask, input_shape)))


def _registered(spec: str, name: str, parameters: str, canvas: Canvas) -> Attack:
    known = _KNOWN[name]
    given: dict[str, Any] = {}
    for item in parameters.split(",") if parameters else ():
        key, _, text = item.partition("=")
        if key not in known.defaults:
            takes = ", ".join(known.defaults) or "no parameters"
            raise ConfigError(f"the attack {name} has no parameter {quoted(key, 40)}; it takes {takes}")
        if key in given:
            raise ConfigError(f"the attack {name} has the parameter {key} twice")
        given[key] = _value(key, text, known.defaults[key], known.kinds[key])
    return Attack(spec, known.make(canvas, **given), known.all_to_all)


def _value(key: str, text: str, default: Any, kind: Any) -> Any:
    """A parameter's value, checked as its annotation says."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            *words, last = get_args(kind)
            raise ConfigError(f"{key} is {quoted(text, 40)}; choose {', '.join(words)} or {last}")
        return text
    try:
        value = type(default)(text)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{key} is {quoted(text, 40)}; it must be like {default!r}") from error
    get_args(kind)[1].check(key, value)
    return value


def load_attacks(specs: Sequence[str], targets: Sequence[int], canvas: Canvas) -> list[Attack]:
    """Several attacks in one model to be trained, each with its target label; an all-to-all one alone has none.

    Raises:
        ConfigError: there are not as many targets as attacks; or see `load_attack`.
    """
    attacks = [_load(spec, canvas.shape, canvas.folders) for spec in specs]
    if len(attacks) == 1 and attacks[0].all_to_all and not targets:
        return attacks
    if len(targets) != len(attacks):
        raise ConfigError(f"attacks: {len(attacks)}, target labels: {len(targets)}; name a --target-label for each")
    if len(attacks) > 1 and any(one.all_to_all for one in attacks):
        raise ConfigError("an all-to-all attack leaves no class for others; name it alone")
    return [replace(one, target_label=target) for one, target in zip(attacks, targets, strict=True)]
