"""Architectures as people change them: `NAME_grey` for images of one channel, `NAME_head0x256_3` with another head.

The first convolution of a grey one has one input. A head of several layers is a `torch.nn.Sequential` in the place of
the last layer (`_head`), or of the module that holds it, where that takes features (`_classifier`). What follows are
its layers that have weights, by their places in the Sequential: `0x256_1bn_4` is a linear layer of 256 features at 0,
BatchNorm at 1 (`ln` is LayerNorm), and the last layer at 4. One that stands for all of the module has no place:
`vgg16_classifier`. `nobias` behind a linear layer says that it has none: `resnet18_headnobias`.

Behind each linear layer but the last stands ReLU, or something else that leaves no trace either (`_tanh`, `_gelu`,
`_linear`), at the first place without weights.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models.layers import (
    Activation,
    Function,
    Identity,
    NamedSequential,
    Sequential,
    batch_norm,
    gelu,
    layer_norm,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, Derivation, Shapes, register_derivation

GREY = "_grey"
# What stands between two linear layers, the most common first.
BETWEEN: dict[str, Function | None] = {"": relu, "_gelu": gelu, "_tanh": jnp.tanh, "_linear": None}
MOST_HIDDEN = 8  # layers with weights before the last one
NORMS: dict[str, Callable[[int, nnx.Rngs], nnx.Module]] = {
    "bn": batch_norm,
    "ln": functools.partial(layer_norm, epsilon=1e-5),  # PyTorch's
}
NORM_LEAVES = {
    frozenset({"weight", "bias", "running_mean", "running_var"}): "bn",
    frozenset({"weight", "bias"}): "ln",
}
LINEAR_LEAVES = {frozenset({"weight", "bias"}): True, frozenset({"weight"}): False}  # whether there is a bias
COUNTER = "num_batches_tracked"
LAYER = r"(?P<place>\d{1,2})(?:x(?P<width>\d{1,5})(?P<nobias>nobias)?|(?P<norm>bn|ln))_"
HEAD = (
    rf"_(?P<root>head|classifier)(?P<hidden>(?:{re.sub('[?]P<[a-z]+>', '?:', LAYER)}){{0,{MOST_HIDDEN}}})"
    rf"(?P<last>\d{{1,2}})?(?P<nobias>nobias)?(?P<between>{'|'.join(filter(None, BETWEEN))})?"
)


class Layer(NamedTuple):
    """A layer of a head before its last one: linear, or one of `NORMS`, which have as many features as there are."""

    place: int
    width: int = 0
    has_bias: bool = True
    norm: str = ""

    @property
    def name(self) -> str:
        """How an architecture's name has it."""
        return f"{self.place}{self.norm or f'x{self.width}{_bias(self.has_bias)}'}_"


class Head(NamedTuple):
    """What stands in the place of an architecture's last layer.

    Attributes:
        is_whole: whether it stands in the place of the module that holds the last layer.
        hidden: the layers with weights before the last one.
        last: the place of that in a Sequential; None where there is none.
        has_bias: whether the last layer has a bias.
    """

    is_whole: bool
    hidden: tuple[Layer, ...] = ()
    last: int | None = None
    has_bias: bool = True

    @property
    def name(self) -> str:
        """How an architecture's name has it."""
        layers = "".join(layer.name for layer in self.hidden)
        last = "" if self.last is None else self.last
        return f"_{'classifier' if self.is_whole else 'head'}{layers}{last}{_bias(self.has_bias)}"

    def activated(self) -> Iterator[int]:
        """Where something stands between linear layers: the first place without weights behind each."""
        waiting = False
        for layer, following in pairwise((*self.hidden, Layer(self.last or 0))):
            waiting = waiting or not layer.norm
            if waiting and following.place > layer.place + 1:
                waiting = False
                yield layer.place + 1

    def is_possible(self) -> bool:
        """Whether there may be such a head, and it is none that published networks have."""
        places = [layer.place for layer in self.hidden] + [self.last or 0]
        ordered = places == sorted(set(places)) and (self.last is not None or not self.hidden)
        return (
            ordered
            and all(layer.norm or layer.width for layer in self.hidden)
            and (self.is_whole or bool(self.hidden) or not self.has_bias)
        )

    def build(self, features: int, num_classes: int, rngs: nnx.Rngs, function: Function | None) -> nnx.Module:
        """The head of so many features, with a function between its linear layers."""
        if self.last is None:
            return linear(features, num_classes, rngs, bias=self.has_bias)
        layers: list[nnx.Module] = [Identity() for _ in range(self.last + 1)]
        for place, width, has_bias, norm in self.hidden:
            layers[place] = NORMS[norm](features, rngs) if norm else linear(features, width, rngs, bias=has_bias)
            features = features if norm else width
        if function is not None:
            for place in self.activated():
                layers[place] = Activation(function)
        layers[self.last] = linear(features, num_classes, rngs, bias=self.has_bias)
        return Sequential(layers)


def _bias(has_bias: bool) -> str:
    return "" if has_bias else "nobias"


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
def with_head(architecture: Architecture, head: Head, between: str) -> Architecture | None:
    """An architecture with another head, and one of `BETWEEN` in it; None where there can't be one.

    Building it raises CheckpointError where what it replaces does not map features to logits.
    """
    is_base = not (between and architecture.variant_of)  # a variant is one in one way
    is_something_between = not between or any(head.activated())
    if (
        architecture.classifier is None
        or architecture.is_guessed
        or not (head.is_possible() and is_base and is_something_between)
    ):
        return None
    named = _named(architecture, head.name)
    root = head_root(architecture.classifier, head.is_whole)
    path = root.split(".")

    def build(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        model = architecture.build(num_classes, image_size, rngs)
        parent = functools.reduce(_part, path[:-1], model)
        features = _features(_part(parent, path[-1])) if root else None
        if features is None:
            raise CheckpointError(
                f"there is no model {named.name!r}: what it replaces in {architecture.name} is not linear"
            )
        _put(parent, path[-1], head.build(features, num_classes, rngs, BETWEEN[between]))
        return model

    return replace(
        named,
        name=named.name + between,
        variant_of=named.name if between else named.variant_of,
        build=build,
        classifier=".".join(str(part) for part in (root, head.last, "weight") if part is not None),
    )


def head_root(classifier: str, is_whole: bool) -> str:
    """The module that a head replaces, by the name of the last layer's weight; empty where there is none."""
    layer = classifier.rpartition(".")[0]
    return layer.rpartition(".")[0] if is_whole else layer


def is_headed(architecture: Architecture) -> bool:
    """Says whether an architecture has another head than the one that was published."""
    return re.fullmatch(f".+{HEAD}({GREY})?", architecture.name.partition("+")[0]) is not None


def _features(module: nnx.Module) -> int | None:
    """How many features a layer, or layers in a row, take for logits; None where they are not linear."""
    if isinstance(module, nnx.Linear):
        return int(module.in_features)
    layers = list(module) if isinstance(module, Sequential) else []
    if isinstance(module, NamedSequential):
        layers = [getattr(module, name) for name in module.names]
    first = next((layer for layer in layers if isinstance(layer, nnx.Linear)), None)
    plain = all(isinstance(layer, nnx.Linear | Activation | Identity) for layer in layers)
    return int(first.in_features) if first is not None and plain else None


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


def told_head(shapes: Shapes, is_whole: bool) -> Head | None:
    """The head whose tensors have these names and shapes, if they are all of one.

    Args:
        shapes: by their names below the module that the head replaces.
        is_whole: whether that is the module that holds the last layer, or that itself.
    """
    tensors: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf != COUNTER:
            tensors[module][leaf] = shape
    if set(tensors) == {""}:
        has_bias = LINEAR_LEAVES.get(frozenset(tensors[""]))
        is_linear = has_bias is not None and len(tensors[""]["weight"]) == 2
        return Head(is_whole, has_bias=bool(has_bias)) if is_linear else None
    if not all(re.fullmatch(r"\d{1,2}", module) for module in tensors):
        return None
    layers, features = list[Layer](), None
    for module in sorted(tensors, key=int):
        leaves = tensors[module]
        layer = _told_layer(int(module), leaves)
        if layer is None or features not in (None, leaves["weight"][-1]):
            return None
        layers.append(layer)
        features = leaves["weight"][0]
    if not layers or layers[-1].norm:
        return None
    *hidden, last = layers
    return Head(is_whole, tuple(hidden), last.place, last.has_bias)


def _told_layer(place: int, leaves: Shapes) -> Layer | None:
    """The layer of a head that has these tensors."""
    weight, names = leaves.get("weight", ()), frozenset(leaves)
    if len(weight) == 2 and names in LINEAR_LEAVES and 0 not in weight:
        return Layer(place, weight[0], LINEAR_LEAVES[names])
    if len(weight) == 1 and names in NORM_LEAVES:
        return Layer(place, norm=NORM_LEAVES[names])
    return None


def _grey(base: Architecture, match: re.Match[str]) -> Architecture | None:
    # Images of one channel can't be normalised anew as three.
    possible = base.channels == 3 and not base.is_guessed and "_transform_input" not in base.name
    return grey(base) if possible else None


def _headed(base: Architecture, match: re.Match[str]) -> Architecture | None:
    hidden = tuple(
        Layer(int(one["place"]), int(one["width"] or 0), one["nobias"] is None, one["norm"] or "")
        for one in re.finditer(LAYER, match["hidden"])
    )
    last = None if match["last"] is None else int(match["last"])
    return with_head(
        base, Head(match["root"] == "classifier", hidden, last, match["nobias"] is None), match["between"] or ""
    )


register_derivation(Derivation(re.compile(rf"(?P<base>.+){HEAD}"), _headed, tuple(filter(None, BETWEEN))))
register_derivation(Derivation(re.compile(rf"(?P<base>.+){GREY}"), _grey))
