"""The architectures that can be converted. One file per family registers what it defines."""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from flax import nnx

from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.alterations import ALTERATIONS, FAINT, KINDS, replacing

if TYPE_CHECKING:
    import torch

Build = Callable[[int, ImageSize, nnx.Rngs], nnx.Module]


@dataclass(frozen=True)
class Architecture:
    """How to build a model and how to tell it from its state dict.

    Attributes:
        name: what `--model` calls it.
        build: `build(num_classes, image_size, rngs)`, the Flax NNX module, its attribute names mirroring PyTorch's.
        classifier: PyTorch's name of the last layer's weight, whose first dimension is the number of classes; None
            for the last matrix of the state dict.
        image_sizes: sizes of an image that the weights may be made for. Where the weights do not tell, as with adaptive
            pooling, the first is taken and any other can be asked for.
        landmarks: some tensors by PyTorch's names, with their shapes, that tell it from its relatives: recognition
            looks at them before it builds the model and compares every tensor.
        torch_module: `torch_module(num_classes)`, the same network in PyTorch, imported only when called; None where
            only the code that the checkpoint came from has it.
        channels: of an image.
        variant_of: the most common architecture with tensors of the same names and shapes, where that is another one.
            They differ in what leaves no trace in a state dict: strides, pooling, activations, what a shortcut reads.
        unused: what the names of layers begin with that inference does not use, as auxiliary heads. A state dict may
            hold them or not; they are kept as they are.
        is_guessed: whether nobody has published it, so that its order of layers is made up from names and shapes: any
            other architecture that fits is preferred, and nothing may lie beside it.
    """

    name: str
    build: Build
    classifier: str | None
    image_sizes: tuple[ImageSize, ...] = squares(32)
    landmarks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False, compare=False)
    torch_module: "Callable[[int], torch.nn.Module] | None" = None
    channels: int = 3
    variant_of: str | None = None
    unused: tuple[str, ...] = ()
    is_guessed: bool = False


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """Architectures of any size, each made when its name or a state dict asks for it.

    Attributes:
        pattern: what the names of all of them look like, those of variants included.
        example: one of them, for messages.
        make: makes the one whose name matches; None where there is none of these sizes.
        propose: `propose(shapes)`, the names of those that a state dict with these names and shapes may be of, variants
            left out.
        variants: what the names of variants end with.
        relatives: `relatives(base)`, the names of all with the names and shapes of one, which comes first, where these
            do not begin with its name.
        propose_at: `propose_at(shapes, image_size)`, as `propose`, for images of a known size, where names say the
            size.
    """

    pattern: re.Pattern[str]
    example: str
    make: Callable[[re.Match[str]], Architecture | None]
    propose: Callable[[Shapes], Iterator[str]]
    variants: tuple[str, ...] = ()
    relatives: Callable[[str], tuple[str, ...]] = lambda base: (base,)
    propose_at: Callable[[Shapes, ImageSize], Iterator[str]] = lambda shapes, image_size: iter(())


@dataclass(frozen=True)
class Derivation:
    """A way in which people change any architecture, so that its names or shapes become others.

    Attributes:
        pattern: what names look like; the group `base` is the name of the architecture that is changed.
        make: `make(base, match)`, the changed one, the same for the same arguments; None where that can't be.
        variants: what the names of those end with that have the same names and shapes, and compute something else.
    """

    pattern: re.Pattern[str]
    make: Callable[[Architecture, re.Match[str]], Architecture | None]
    variants: tuple[str, ...] = ()


_ARCHITECTURES: dict[str, Architecture] = {}
_FAMILIES: list[Family] = []
_DERIVATIONS: list[Derivation] = []


def register(architecture: Architecture) -> None:
    """Makes an architecture known; its name must be new."""
    if architecture.name in _ARCHITECTURES:
        raise ValueError(f"architecture {architecture.name!r} is registered twice")
    _ARCHITECTURES[architecture.name] = architecture


def register_family(family: Family) -> None:
    """Makes a family known."""
    _FAMILIES.append(family)


def register_derivation(derivation: Derivation) -> None:
    """Makes a derivation known."""
    _DERIVATIONS.append(derivation)


def architectures() -> tuple[Architecture, ...]:
    """All architectures that are registered one by one."""
    return tuple(_ARCHITECTURES.values())


@functools.cache  # so that the same name gives the same architecture
def known(name: str) -> Architecture | None:
    """The architecture of that name, without alterations, registered, derived or of a family; None if there is none."""
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    if derived := _derived(name):
        base, said, derivation = derived
        return derivation.make(base, said)
    made = (family.make(match) for family in _FAMILIES if (match := family.pattern.fullmatch(name)))
    return next((one for one in made if one), None)


def _derived(name: str) -> tuple[Architecture, re.Match[str], Derivation] | None:
    """Which architecture a name says is changed, and how; None where it says that of none."""
    for derivation in _DERIVATIONS:
        match = derivation.pattern.fullmatch(name)
        if match and (base := known(match["base"])):
            return base, match, derivation
    return None


def proposed(shapes: Shapes, image_size: ImageSize | None = None) -> list[Architecture]:
    """The members of families that a state dict with these names and shapes may be of.

    Those of RGB images are among them where the first convolution has one input. Those whose names say the size of
    images come first for `image_size`, where that is known.
    """
    ways = [shapes]
    of_one = [name for name, shape in shapes.items() if len(shape) == 4 and shape[1] == 1]
    for first in dict.fromkeys((of_one[0], min(of_one)) if of_one else ()):  # of the file's order, and of the names'
        ways.append({**shapes, first: (shapes[first][0], 3, *shapes[first][2:])})
    known_size = (family.propose_at(way, image_size) for way in ways for family in _FAMILIES if image_size)
    any_size = (family.propose(way) for way in ways for family in _FAMILIES)
    names = dict.fromkeys(chain.from_iterable((*known_size, *any_size)))
    return [one for one in map(known, names) if one]


def variants(architecture: Architecture) -> tuple[Architecture, ...]:
    """All architectures with the names and shapes of this one, which is among them; the most common comes first."""
    base = architecture.variant_of or architecture.name
    if derived := _derived(base):
        of, _, derivation = derived
        change = base.removeprefix(of.name)
        names = [*(one.name + change for one in variants(of)), *(base + suffix for suffix in derivation.variants)]
        group = tuple(filter(None, map(known, names)))
        return group if architecture in group else (architecture, *group)
    families = [family for family in _FAMILIES if family.pattern.fullmatch(base)]
    of_family = {
        one + suffix: None for family in families for one in family.relatives(base) for suffix in ("", *family.variants)
    }
    relatives = (*_ARCHITECTURES.values(), *filter(None, map(known, of_family)))
    group = tuple(dict.fromkeys(one for one in relatives if base in (one.name, one.variant_of)))
    return group if architecture in group else (architecture, *group)  # altered, or the user's own module


@functools.cache  # so that the same name gives the same architecture
def altered(base: Architecture, *names: str) -> Architecture:
    """The architecture with some of `ALTERATIONS`; building it raises CheckpointError where one changes nothing."""
    if not names:
        return base
    name = "+".join((base.name, *names))

    def build(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        model = base.build(num_classes, image_size, rngs)
        for one in names:
            if not ALTERATIONS[one](model):
                raise CheckpointError(f"there is no model {name!r}: +{one} changes nothing of {base.name}")
        return model

    return replace(base, name=name, build=build, torch_module=None, variant_of=base.variant_of or base.name)


def neighbours(
    architecture: Architecture, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
) -> list[Architecture]:
    """The architecture with one alteration more, less or another instead, of those that clean images may tell."""
    base, chosen = unaltered(architecture)
    model = base.build(num_classes, image_size, rngs)
    possible = {name for name, alter in ALTERATIONS.items() if name not in FAINT and alter(nnx.clone(model))}
    found = [
        replacing(chosen, kind, name) for kind in KINDS for name in (None, *(one for one in kind if one in possible))
    ]
    return [altered(base, *names) for names in dict.fromkeys(found) if names != chosen]


def unaltered(architecture: Architecture) -> tuple[Architecture, tuple[str, ...]]:
    """An architecture's registered base, and its alterations; a user's own has none."""
    name, *chosen = architecture.name.split("+")
    base = known(name)
    return (base, tuple(chosen)) if base else (architecture, ())


def get_architecture(name: str) -> Architecture:
    """The architecture called `name`, or NAME+ALTERATION.

    Raises:
        CheckpointError: there is none; the message names similar ones.
    """
    base, *chosen = name.split("+")
    for one in chosen:
        if one not in ALTERATIONS:
            close = difflib.get_close_matches(one.strip().lower(), ALTERATIONS, n=1)
            meant = f"; did you mean +{close[0]}?" if close else f"; behind a + stands one of {', '.join(ALTERATIONS)}"
            raise CheckpointError(f"there is no model {name!r}{meant}")
    if chosen:
        if any(sum(one in kind for one in chosen) > 1 for kind in KINDS):
            raise CheckpointError(f"there is no model {name!r}: two alterations are of one kind")
        return altered(get_architecture(base), *(one for one in ALTERATIONS if one in chosen))
    found = known(name)
    if found is None:
        similar = ", ".join(
            difflib.get_close_matches(name, [*_ARCHITECTURES, *(one.example for one in _FAMILIES)], n=4, cutoff=0.5)
        )
        raise CheckpointError(
            f"there is no model {name!r}{f'; did you mean {similar}?' if similar else '.'} "
            f"--model takes FILE.py:CLASS, or the name of one in docs/converting.md: {known_kinds()}"
        )
    return found


def known_kinds() -> str:
    """What the architectures' names begin with, up to their sizes."""
    names = [architecture.name for architecture in architectures() if architecture.variant_of is None]
    names += [family.example for family in _FAMILIES]
    kinds = (re.sub(r"(_[a-z])?_?$", "", re.split(r"\d", name)[0]) for name in names)
    return ", ".join(sorted(set(kinds)))


def from_torchvision(name: str, **options: float) -> "Callable[[int], torch.nn.Module]":
    """torchvision's own model of that name, without weights. Needs torchvision when called."""
    return functools.partial(_torchvision_module, name, **options)


def _torchvision_module(name: str, num_classes: int, /, **options: float) -> "torch.nn.Module":
    import torchvision.models

    module: torch.nn.Module = getattr(torchvision.models, name)(num_classes=num_classes, **options)
    return module


def is_torchvision(torch_module: object) -> bool:
    """Whether `from_torchvision` made it."""
    return isinstance(torch_module, functools.partial) and torch_module.func is _torchvision_module
