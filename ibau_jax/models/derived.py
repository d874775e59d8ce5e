"""Architectures as people change them: `NAME_grey` for images of one channel, `NAME_head0x256_3` with a larger head.

The first convolution of a grey one has one input. A head of several linear layers stands in a `torch.nn.Sequential` in
the place of the last layer: `0x256_3` is one of 256 features at place 0, and the last one at place 3. Between two that
are not next to one another stands ReLU, or something else that leaves no trace either (`_tanh`, `_gelu`, `_linear`).
"""

import functools
import re
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models.layers import Activation, Function, Identity, Sequential, gelu, linear, relu
from ibau_jax.models.registry import Architecture, Derivation, Shapes, register_derivation

GREY = "_grey"
# What stands between two linear layers, the most common first.
BETWEEN: dict[str, Function | None] = {"": relu, "_gelu": gelu, "_tanh": jnp.tanh, "_linear": None}
MOST_HIDDEN = 4
HEAD = (
    rf"_head(?P<hidden>(?:\d{{1,2}}x\d{{1,5}}_){{1,{MOST_HIDDEN}}})(?P<last>\d{{1,2}})"
    rf"(?P<between>{'|'.join(filter(None, BETWEEN))})?"
)

Hidden = tuple[tuple[int, int], ...]  # place and features of each linear layer but the last


@functools.cache  # so that the same architecture gives the same
def grey(architecture: Architecture) -> Architecture:
    """An architecture of RGB images for grey ones: its first convolution has one input."""

    def build(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        model = architecture.build(num_classes, image_size, rngs)
        layers = (layer for _, layer in nnx.iter_graph(model) if isinstance(layer, nnx.Conv))
        first = next(layer for layer in layers if layer.in_features == 3)
        kernel = first.kernel.get_value()
        shape = (*kernel.shape[:2], 1, kernel.shape[3])
        is_abstract = isinstance(kernel, jax.ShapeDtypeStruct)
        first.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, kernel.dtype) if is_abstract else kernel[:, :, :1])
        first.in_features = 1
        return model

    def of_one(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 1, *shape[2:]) if len(shape) == 4 and shape[1] == 3 else shape

    return replace(
        _named(architecture, GREY),
        build=build,
        landmarks={name: of_one(shape) for name, shape in architecture.landmarks.items()},
        channels=1,
    )


@functools.cache  # so that the same architecture gives the same
def with_head(architecture: Architecture, hidden: Hidden, last: int, between: str) -> Architecture:
    """An architecture with several linear layers in the place of the last one; building it raises CheckpointError where
    that is not linear.

    Args:
        architecture: whose.
        hidden: place and features of each linear layer but the last.
        last: the place of that.
        between: one of `BETWEEN`.
    """
    change = "_head" + "".join(f"{place}x{width}_" for place, width in hidden) + str(last)
    named = _named(architecture, change)
    path = (architecture.classifier or "").removesuffix(".weight").split(".")

    def build(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        model = architecture.build(num_classes, image_size, rngs)
        parent = functools.reduce(_part, path[:-1], model)
        replaced = _part(parent, path[-1])
        if not isinstance(replaced, nnx.Linear):
            raise CheckpointError(
                f"there is no model {named.name!r}: the last layer of {architecture.name} is not linear"
            )
        features = replaced.in_features
        layers: list[nnx.Module] = [Identity() for _ in range(last + 1)]
        for place, width in hidden:
            layers[place], features = linear(features, width, rngs), width
        for (place, _), following in zip(hidden, [*(place for place, _ in hidden[1:]), last], strict=True):
            if following - place > 1 and (function := BETWEEN[between]):
                layers[place + 1] = Activation(function)
        layers[last] = linear(features, num_classes, rngs)
        _put(parent, path[-1], Sequential(layers))
        return model

    return replace(
        named,
        name=named.name + between,
        variant_of=named.name if between else named.variant_of,
        build=build,
        classifier=f"{'.'.join(path)}.{last}.weight",
    )


def is_headed(architecture: Architecture) -> bool:
    """Says whether an architecture has another head than the one that was published."""
    return re.search(HEAD, architecture.name) is not None


def _named(architecture: Architecture, suffix: str) -> Architecture:
    return replace(
        architecture,
        name=architecture.name + suffix,
        torch_module=None,
        variant_of=architecture.variant_of and architecture.variant_of + suffix,
    )


def _part(module: nnx.Module, name: str) -> nnx.Module:
    part: nnx.Module = module[int(name)] if isinstance(module, nnx.List) else getattr(module, name)
    return part


def _put(module: nnx.Module, name: str, part: nnx.Module) -> None:
    if isinstance(module, nnx.List):
        module[int(name)] = part
    else:
        setattr(module, name, part)


def told_head(shapes: Shapes, classifier: str) -> tuple[Hidden, int] | None:
    """The head that a state dict has in the place of a classifier, if it has several linear layers there that fit."""
    stem = classifier.removesuffix("weight")
    places = {
        int(match[1]): shape
        for name, shape in shapes.items()
        if name.startswith(stem)
        and len(shape) == 2
        and (match := re.fullmatch(r"(\d{1,2})\.weight", name[len(stem) :]))
    }
    ordered = sorted(places.items())
    joined = all(later[1] == before[0] for (_, before), (_, later) in pairwise(ordered))
    if not 2 <= len(ordered) <= 1 + MOST_HIDDEN or not joined or 0 in (size for _, shape in ordered for size in shape):
        return None
    *hidden, (last, _) = ordered
    return tuple((place, shape[0]) for place, shape in hidden), last


def _grey(base: Architecture, match: re.Match[str]) -> Architecture | None:
    # Images of one channel can't be normalised anew as three.
    possible = base.channels == 3 and not base.is_guessed and "_transform_input" not in base.name
    return grey(base) if possible else None


def _headed(base: Architecture, match: re.Match[str]) -> Architecture | None:
    hidden = tuple(tuple(map(int, one.split("x"))) for one in match["hidden"].removesuffix("_").split("_"))
    places, between = [*(place for place, _ in hidden), int(match["last"])], match["between"] or ""
    if (
        base.classifier is None
        or base.is_guessed
        or places != sorted(set(places))
        or not all(width for _, width in hidden)
    ):
        return None
    is_something_between = any(later - place > 1 for place, later in pairwise(places))
    if between and (base.variant_of or not is_something_between):
        return None
    return with_head(base, hidden, int(match["last"]), between)


register_derivation(Derivation(re.compile(rf"(?P<base>.+){HEAD}"), _headed, tuple(filter(None, BETWEEN))))
register_derivation(Derivation(re.compile(rf"(?P<base>.+){GREY}"), _grey))
