"""What a whole pickled module says of its layers and its tensors do not: strides, padding, poolings, activations, ε.

What a module's `forward` calls without a layer does not show. A layer whose code is not known here is an error: what it
computes can't be told.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx
from jax.nn import sigmoid

from ibau_jax.checkpoints.naming import common_prefix, is_below
from ibau_jax.checkpoints.recognition import abstract_model
from ibau_jax.checkpoints.records import SCRIPT, is_leaf, modules
from ibau_jax.checkpoints.values import Record
from ibau_jax.errors import CheckpointError, ConfigError, and_more, shortened
from ibau_jax.image_size import ImageSize
from ibau_jax.models import Architecture, Normalization
from ibau_jax.models.alterations import ACTIVATIONS, ALTERATIONS, KINDS, replacing
from ibau_jax.models.chain_steps import PlainChain
from ibau_jax.models.googlenet import InceptionNetwork
from ibau_jax.models.layers import (
    Activation,
    AdaptiveAvgPool,
    AvgPool,
    BlurPool,
    Function,
    Identity,
    MaxPool,
    Permute,
    hardsigmoid,
)
from ibau_jax.models.registry import altered, unaltered
from ibau_jax.models.tensorflow import SameConv

SHOWN = 3  # layers that a message names
TRIED = 4  # architectures that are altered as the layers ask for
FUNCTIONS: dict[str, Function] = {**ACTIVATIONS, "sigmoid": sigmoid, "hardsigmoid": hardsigmoid}
PLAIN = {
    name: name.lower()
    for name in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Hardswish", "Hardsigmoid")
}
LEAKY = {0.01: "leaky_relu", 0.1: "leaky_relu0.1", 0.2: "leaky_relu0.2"}
ACTIVATION_MODULES = ("torch.nn.modules.activation.", "timm.layers.activations.")
# Without effect in inference, or on which class is the largest.
HARMLESS = (
    *("Identity", "Dropout", "Dropout1d", "Dropout2d", "AlphaDropout", "Flatten"),
    *("Sequential", "ModuleList", "StochasticDepth", "DropPath"),
)
LAST = ("Softmax", "LogSoftmax")  # leave the order of classes as it is, behind all else
POOLINGS = ("MaxPool2d", "AvgPool2d")
AVERAGING = ("AdaptiveAvgPool2d", "AvgPool2d")  # of the last features, where the network here has no layer for it
# Other people's layers that compute what one of torch.nn does, or what only their own class does.
ALIKE = {
    "timm.layers.norm_act.BatchNormAct2d": "BatchNorm2d",
    "timm.layers.norm.LayerNorm": "LayerNorm",
    "timm.layers.conv2d_same.Conv2dSame": "Conv2dSame",
    "timm.layers.blur_pool.BlurPool2d": "BlurPool2d",
    "torchvision.models.convnext.LayerNorm2d": "LayerNorm",
    "torchvision.ops.misc.Permute": "Permute",
}
LOSSES = "torch.nn.modules.loss."
SEQUENTIAL = "torch.nn.modules.container.Sequential"
MANGLED = re.compile(r"___torch_mangle_\d+\.")
NORMALIZE = "torchvision.transforms.transforms.Normalize"


class Layers:
    """The layers of a module.

    Args:
        module: the whole.
        names: the file's names of the network's tensors, by the network's own.
        left_out: what the names of layers begin with that take no part in what the network computes. Those that stand
            where the network has a layer do.
    """

    def __init__(self, module: Record, names: Mapping[str, str], left_out: Sequence[str] = ()) -> None:
        self._by_name, self._left_out = dict(modules(module)), left_out
        self._names, self._prefix = names, common_prefix(names)
        self._activations = {name: found for name, one in self._by_name.items() if (found := _activation(one))}

    def at(self, path: Sequence[Any]) -> tuple[str, Record | None]:
        """The layer that the network has at a path of Flax's, and its name in the file."""
        own = ".".join(map(str, path))
        weight = self._names.get(f"{own}.weight")
        name = weight.removesuffix(".weight") if weight else (self._prefix + own).rstrip(".")
        return name, self._by_name.get(name)

    def normalization(self) -> Normalization | None:
        """What a layer of torchvision's before the network normalises images with."""
        found = [one.attributes for one in self._by_name.values() if str(one.kind) == NORMALIZE]
        if len(found) != 1:
            return None
        with contextlib.suppress(TypeError, ValueError, KeyError, ConfigError):
            return Normalization(*(tuple(map(float, found[0][part])) for part in ("mean", "std")))
        return None

    def contradictions(self, model: nnx.Module) -> list[str]:
        """What of the layers differs from a network's, or is not known, a line each."""
        found, seen = list[str](), set[str]()
        functions = activations_of(model)
        for path, layer in nnx.iter_graph(model):
            if not isinstance(layer, nnx.Module):
                continue
            name, one = self.at(path)
            seen.add(name)
            if one is not None:
                found += [f"{name or 'the module'}: {what}" for what in _differences(layer, one)]
            if hasattr(layer, "heads") and isinstance(layer.heads, int):
                found += self._heads(path, layer.heads)
        has_places = not isinstance(model, PlainChain)  # of its own for activations
        for name, what in self._activations.items():
            unplaced = has_places and name not in seen and self._is_in_sequence(name)
            if (what not in functions or unplaced) and (name in seen or not is_below(name, self._left_out)):
                found.append(f"{name}: {what}")
        return found + list(self._unknown(seen, model))

    @property
    def are_in_order(self) -> bool:
        """Whether `torch.nn.Sequential` calls them all, or else code that no file holds."""
        return all(self._is_in_sequence(name) for name in self._by_name if name)

    def _is_in_sequence(self, name: str) -> bool:
        """Whether a layer stands in a `torch.nn.Sequential`, which calls all of its layers."""
        parent = self._by_name.get(name.rpartition(".")[0])
        return parent is not None and _kind(parent) == SEQUENTIAL

    def _heads(self, path: Sequence[Any], heads: int) -> Iterator[str]:
        projection = self._names.get(f"{'.'.join(map(str, path))}.out_proj.weight", "")
        name = projection.rpartition(".")[0].rpartition(".")[0]
        one = self._by_name.get(name)
        if one is not None and one.attributes.get("num_heads", heads) != heads:
            yield f"{name}: num_heads {shortened(one.attributes['num_heads'])}"

    def _unknown(self, seen: set[str], model: nnx.Module) -> Iterator[str]:
        """Layers that the network has no place for and that may compute something, and code that replaces a layer's.

        A chain of layers has all of its poolings, at whatever place, and no other.
        """
        is_chain, last = isinstance(model, PlainChain), next(reversed(self._by_name))
        chained = [
            layer
            for _, layer in (nnx.iter_graph(model) if is_chain else ())
            if isinstance(layer, MaxPool | AvgPool | AdaptiveAvgPool)
        ]
        for name, one in self._by_name.items():
            kind, attributes = _kind(one), one.attributes
            hooks = [part for part in ("_forward_hooks", "_forward_pre_hooks") if attributes.get(part)]
            if hooks or "forward" in attributes:
                yield f"{name or 'the module'}: {hooks[0] if hooks else 'forward'}"
            if not is_leaf(one) or name in seen or name in self._activations or _class(one) in HARMLESS:
                continue
            if is_below(name, self._left_out) or (_class(one) in LAST and name == last):
                continue
            if is_chain:
                averages = any(not list(_differences(layer, one)) for layer in chained)
            else:
                averages = _class(one) in AVERAGING and name.startswith(self._prefix)
            normalizes = kind == NORMALIZE and self.normalization() is not None
            if not (averages or normalizes or kind.startswith(LOSSES)):
                yield f"{name}: {kind}"

    def suggested(self, model: nnx.Module) -> set[str]:
        """The alterations of a network that its differences from the layers ask for."""
        activations = self._activations_of_blocks(model)
        names = activations - activations_of(model) if len(activations) == 1 else set()
        for path, layer in nnx.iter_graph(model):
            one = self.at(path)[1] if isinstance(layer, nnx.Module) else None
            if one is None:
                continue
            if isinstance(layer, nnx.BatchNorm) and _same(one.attributes.get("eps"), 1e-3):
                names.add("eps1e-3")
            if isinstance(layer, nnx.Conv) and layer.strides == 2 and _same(one.attributes.get("stride"), 1):
                names.add("last_stride1")
            if isinstance(layer, MaxPool):
                names.update(_pool(one))
        if isinstance(model, PlainChain):  # its poolings have no places
            names.update(name for one in self._by_name.values() if _class(one) in POOLINGS for name in _pool(one))
        return names

    def _activations_of_blocks(self, model: nnx.Module) -> set[str]:
        """The activations in the file; without those at places of their own, where the network's blocks have others.

        What blocks call in their `forward` shows in no layer: a layer of a head, say, does not tell it.
        """
        graph = [(path, layer) for path, layer in nnx.iter_graph(model) if hasattr(layer, "activation")]
        placed = {self.at(path)[0] for path, layer in graph if isinstance(layer, Activation)}
        in_blocks = any(not isinstance(layer, Activation) for _, layer in graph)
        return {what for name, what in self._activations.items() if not (in_blocks and name in placed)}


def told_by_module(
    possible: Sequence[Architecture], layers: Layers, num_classes: int, image_size: ImageSize
) -> list[Architecture]:
    """Those of several architectures with the same names and shapes that a module's layers do not contradict.

    Where all of them are contradicted, one of them altered (`ibau_jax.models.alterations`) that is not.

    Raises:
        CheckpointError: there is none; the message says what differs.
    """

    def differences(architecture: Architecture) -> list[str]:
        return layers.contradictions(abstract_model(architecture, num_classes, image_size))

    known = {one: differences(one) for one in possible}
    if right := [one for one, found in known.items() if not found]:
        return right
    closest = sorted(known, key=lambda one: len(known[one]))
    for one in closest[:TRIED]:
        with contextlib.suppress(CheckpointError):
            likely = _altered_as_told(one, layers, num_classes, image_size)
            if likely is not one and not differences(likely):
                return [likely]
    best = closest[0]
    left = known[best]
    raise CheckpointError(
        f"the module in the file has the names and shapes of {best.name}, but other layers: "
        f"{shortened('; '.join(left[:SHOWN]), 400)}{and_more(left, SHOWN)}. If they are beside the network and take no "
        "part, --leave-out NAME says so; else write "
        "the network as a Flax module and name it by --model FILE.py:CLASS (see docs/custom_model.md)"
    )


def _altered_as_told(
    architecture: Architecture, layers: Layers, num_classes: int, image_size: ImageSize
) -> Architecture:
    """An architecture with those alterations that a module's layers ask for and that change something of it."""
    model = abstract_model(architecture, num_classes, image_size)
    names = {name for name in layers.suggested(model) & set(ALTERATIONS) if ALTERATIONS[name](nnx.clone(model))}
    base, chosen = unaltered(architecture)
    for kind in KINDS:
        for name in kind:
            chosen = replacing(chosen, kind, name) if name in names else chosen
    return altered(base, *chosen)


def activations_of(model: nnx.Module) -> set[str | None]:
    """The names of a network's activations."""
    layers = [layer for _, layer in nnx.iter_graph(model)]
    return {_name_of(getattr(one, part)) for one in layers for part in ("activation", "gate") if hasattr(one, part)}


def _kind(module: Record) -> str:
    """A layer's class, without what TorchScript adds to it."""
    return MANGLED.sub("", str(module.kind).removeprefix(SCRIPT))


def _class(module: Record) -> str:
    kind = _kind(module)
    return ALIKE.get(kind, kind).rpartition(".")[2]


def _activation(module: Record) -> str | None:
    """What `FUNCTIONS` calls an activation of torch.nn, or a name that is none there; None of another layer."""
    kind, attributes = _kind(module), module.attributes
    name = kind.rpartition(".")[2]
    if kind.removesuffix(name) not in ACTIVATION_MODULES or name in ("MultiheadAttention", *HARMLESS, *LAST):
        return None
    if name == "LeakyReLU" and "negative_slope" in attributes:
        slope = attributes["negative_slope"]
        return LEAKY.get(slope) if _is_number(slope) and slope in LEAKY else f"leaky_relu{shortened(slope)}"
    if name == "ELU":
        alpha = attributes.get("alpha", 1.0)
        return "elu" if _is_number(alpha) and alpha == 1 else f"elu{shortened(alpha)}"
    if name == "GELU":
        return "gelu" if attributes.get("approximate", "none") == "none" else "gelu_tanh"
    return PLAIN.get(name, name)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _name_of(function: Function) -> str | None:
    return next((name for name, known in FUNCTIONS.items() if known is function), None)


def _pool(module: Record) -> Iterator[str]:
    """The alteration by which max pooling becomes this layer."""
    attributes = module.attributes
    if _class(module) == "AvgPool2d":
        yield "avg_pool"
    elif attributes.get("ceil_mode") is True:
        yield "pool_ceil"
    elif _same(attributes.get("kernel_size"), 2):
        yield "pool2"
    elif _same(attributes.get("kernel_size"), 3):
        yield "pool3"


def _differences(layer: nnx.Module, module: Record) -> Iterator[str]:
    """What a layer of torch.nn has otherwise than one of Flax at its place."""
    if isinstance(layer, Activation):
        if _activation(module) != _name_of(layer.activation):
            yield _activation(module) or _kind(module)
        return
    classes, wanted = _wanted(layer)
    kind = _kind(module)
    if classes and (_class(module) not in classes or not kind.startswith(("torch.", *ALIKE))):
        yield kind
        return
    for name, value in wanted.items():
        stored = _padding(module.attributes) if name == "padding" else module.attributes.get(name)
        if name in module.attributes and not _same(stored, value):
            yield f"{name} {shortened(stored)}"


def _wanted(layer: nnx.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The classes of torch.nn that a layer of Flax stands for, and the attributes that they have to have."""
    if isinstance(layer, SameConv):
        return ("Conv2dSame",), {"stride": layer.strides, "dilation": 1, "groups": layer.feature_group_count}
    if isinstance(layer, nnx.Conv):
        steps = {"stride": layer.strides, "padding": layer.padding, "dilation": 1, "padding_mode": "zeros"}
        return ("Conv2d",), {**steps, "groups": layer.feature_group_count}
    if isinstance(layer, nnx.BatchNorm):
        return ("BatchNorm2d", "BatchNorm1d", "SyncBatchNorm"), {"eps": layer.epsilon}
    if isinstance(layer, nnx.LayerNorm):
        return ("LayerNorm",), {"eps": layer.epsilon}
    if isinstance(layer, nnx.Linear):
        return ("Linear", "NonDynamicallyQuantizableLinear"), {}
    if isinstance(layer, MaxPool):
        window = {"kernel_size": layer.size, "stride": layer.stride, "padding": layer.padding, "dilation": 1}
        return ("MaxPool2d",), {**window, "ceil_mode": layer.ceil}
    if isinstance(layer, AvgPool):
        window = {"kernel_size": layer.size, "stride": layer.stride, "padding": layer.padding, "ceil_mode": layer.ceil}
        padded = {"count_include_pad": True} if layer.padding else {}
        return ("AvgPool2d",), {**window, **padded, "divisor_override": None}
    if isinstance(layer, BlurPool):
        return ("BlurPool2d",), {"filt_size": 3, "stride": 2, "pad_mode": "reflect"}
    if isinstance(layer, AdaptiveAvgPool):
        return ("AdaptiveAvgPool2d",), {"output_size": layer.size}
    if isinstance(layer, Permute):
        return ("Permute",), {"dims": list(layer.dims)}
    if isinstance(layer, Identity):
        return HARMLESS, {}
    if isinstance(layer, InceptionNetwork):
        return (), {"transform_input": layer.transform_input}
    return (), {}


def _padding(facts: Mapping[str, Any]) -> Any:
    """The padding in pixels where a convolution has a word for it."""
    sizes = facts.get("kernel_size")
    if facts.get("padding") == "valid":
        return 0
    if facts.get("padding") == "same" and isinstance(sizes, tuple) and all(type(size) is int for size in sizes):
        return tuple(size // 2 for size in sizes)
    return facts.get("padding")


def _same(stored: Any, wanted: Any) -> bool:
    """Whether a number, or the same one for rows and columns, is the wanted one; or several of them the wanted ones."""
    if isinstance(wanted, (list, tuple)):
        return type(stored) is type(wanted) and len(stored) == len(wanted) and all(map(_same, stored, wanted))
    values = stored if isinstance(stored, tuple) else (stored,)
    return all(type(value) in (int, float, bool, str, type(None)) and value == wanted for value in values)
