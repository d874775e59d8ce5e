"""Where in a file the state dict lay, and everything around it, kept for the way back."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ibau_jax.checkpoints.folding import Fold, find_folds, with_folds
from ibau_jax.checkpoints.reader import Format
from ibau_jax.checkpoints.records import arrays_as_tensors, is_module, is_scripted, module_tensors, replaced
from ibau_jax.checkpoints.values import OWN_DIALECT, Dialect, Record, TorchTensor
from ibau_jax.errors import CheckpointError, and_more, shortened

SHOWN = 10  # state dicts that a message names

WRAPPERS = ("net", "model", "state_dict", "model_state_dict", "netC")  # the entry to take, in this order
MAX_DEPTH = 6
MOST_MODULES, MOST_ITEMS = 20, 100  # in a file, and of a list that is looked into


@dataclass(frozen=True)
class Envelope:
    """A file without the weights that were converted.

    Attributes:
        tree: the file's content, its state dict's tensors emptied (their dtype and kind stay) but for those that are
            held in another form.
        path: the keys that lead from `tree` to the state dict; `()` where the file is the state dict.
        names: the network's own names of its tensors, and the state dict's; empty until the network is recognised.
        format: the file format it came in.
        dialect: how its pickle spells what is beside the weights.
        part: what the names of the tensors to look at begin with, where the state dict holds several networks.
        description: what files beside it say of the model, by their names (`checkpoints.hugging_face`).
    """

    tree: Any = field(repr=False)
    path: tuple[str, ...]
    names: Mapping[str, str] = field(repr=False)
    format: Format
    dialect: Dialect = field(default=OWN_DIALECT, repr=False)
    part: str = ""
    description: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def state_dict(self) -> Mapping[str, Any]:
        """The (emptied) state dict inside `tree`, in its original key order."""
        return self.state_dict_in(self.tree)

    def module(self) -> Record | None:
        """The whole pickled module whose state dict it is, if the file holds that."""
        node = _nodes(self.tree, self.path)[-1]
        return node if isinstance(node, Record) else None

    def tells_layers(self) -> bool:
        """Whether it is the state dict of a module whose layers say what they do; TorchScript's code says it."""
        module = self.module()
        return module is not None and not is_scripted(module)

    def state_dict_in(self, tree: Any) -> Mapping[str, Any]:
        """The state dict inside another tree of the same form, such as `filled` gives or torch loads."""
        return _named(_nodes(tree, self.path)[-1])

    def stored(self) -> dict[str, TorchTensor]:
        """The state dict's tensors by their full names, below `part`."""
        named = self.state_dict().items()
        return {name: value for name, value in named if isinstance(value, TorchTensor) and name.startswith(self.part)}

    def tensors(self) -> dict[str, TorchTensor]:
        """The state dict's tensors, `stored`, with folds in the places of what they are made of."""
        return with_folds(self.stored(), self.folds.values())

    @cached_property
    def folds(self) -> dict[str, Fold]:
        """The tensors that the file holds in another form, by their names in `tensors`."""
        return {fold.name: fold for fold in find_folds(self.stored())}

    def beside(self) -> list[str]:
        """The full names of the tensors that are not the network's."""
        own = set(self.names.values())
        own |= {part for name in own & self.folds.keys() for part in self.folds[name].parts}
        return [name for name, value in self.state_dict().items() if isinstance(value, TorchTensor) and name not in own]

    def others(self) -> list[str]:
        """The other state dicts in the file that have at least half as many tensors, by their keys: averages, say."""
        counts = state_dicts(self.tree)
        least = counts.get(self.path, 0) / 2
        others = [path for path, count in counts.items() if path != self.path and count >= least]
        return [".".join(path) or "the file's first level" for path in others]

    def metadata(self) -> Mapping[str, Any]:
        """Plain values beside the state dict at the top of the file (`acc`, `epoch`, ...), and the description."""
        tree = _entries(self.tree) if self.path else {}
        return {key: value for key, value in tree.items() if key != self.path[0]} | dict(self.description)

    def filled(self, tensors: Mapping[str, np.ndarray]) -> Any:
        """The file's content with `tensors` (by the network's names) in their places, each in its original dtype.

        What shares a tensor with a module, such as its optimiser, shares the new one.
        """
        nodes = _nodes(self.tree, self.path)
        here, held = _named(nodes[-1]), self.held(tensors)
        if not all(isinstance(node, dict) for node in nodes):
            return replaced(self.tree, {id(here[name]): tensor for name, tensor in held.items()})
        state_dict = _copied(here)
        state_dict.update(held)
        return _with_node(self.tree, self.path, state_dict)

    def held(self, tensors: Mapping[str, np.ndarray]) -> dict[str, TorchTensor]:
        """The file's tensors, by their full names, that hold `tensors` (by the network's names)."""
        stored, held = self.stored(), dict[str, TorchTensor]()
        for own, array in tensors.items():
            name = self.names[own]
            fold = self.folds.get(name)
            held |= fold.unfolded(array, stored) if fold else {name: stored[name].holding(array)}
        return held

    def emptied(self, names: set[str]) -> "Envelope":
        """The envelope with the tensors that the network calls `names` emptied: they are held elsewhere now.

        Those stay that the file has in a form of which the network's tensor is only a part.
        """
        folds = {name: self.folds.get(self.names[name]) for name in names}
        held_elsewhere = [name for name, fold in folds.items() if fold is None or fold.form.is_lossless]
        return replace(self, tree=self.filled(dict.fromkeys(held_elsewhere, np.zeros(0))))


def open_envelope(tree: Any, format: Format, key: str | None = None) -> Envelope:
    """The envelope around the state dict in `tree`.

    Args:
        tree: a file's content.
        format: the format it came in.
        key: where the state dict lies, such as `model_ema` or `ema.state_dict`, or what the names of one of several
            networks in it begin with, such as `state_dict.student`; by default under one of `WRAPPERS`, else the one
            with the most tensors.

    Raises:
        CheckpointError: there is no state dict in `tree`, or none under `key`, or several and nothing to choose by.
    """
    tree, found = opened(tree)
    below = [".".join(path) for path in found if path]
    names = shortened(", ".join(map(repr, below[:SHOWN]))) + and_more(below, SHOWN)
    if key is not None:
        for path in sorted(found, key=len, reverse=True):
            place = "".join(f"{part}." for part in path)
            envelope = Envelope(tree, path, {}, format, part=f"{key}.".removeprefix(place))
            if f"{key}.".startswith(place) and envelope.tensors():
                return envelope
        raise CheckpointError(f"there is no state dict under {key!r}; --key takes one of: {names or 'none here'}")
    if not found:
        frozen = "; a frozen TorchScript module has constants for weights: save it before torch.jit.freeze"
        scripted = isinstance(tree, Record) and is_scripted(tree)
        raise CheckpointError(
            f"there is no state dict in the file; it holds {_summary(tree)}{frozen if scripted else ''}"
        )
    first = min(found, key=lambda path: (rank(path), -found[path]))
    equals = [path for path in found if (rank(path), found[path]) == (rank(first), found[first])]
    if len(equals) > 1:
        raise CheckpointError(f"the file holds several state dicts: {names}; choose one by --key")
    return Envelope(tree, first, {}, format)


def opened(tree: Any) -> tuple[Any, dict[tuple[str, ...], int]]:
    """A file's content and the `state_dicts` in it; its arrays are taken for tensors where there is none otherwise."""
    if found := state_dicts(tree):
        return tree, found
    tree = arrays_as_tensors(tree)
    return tree, state_dicts(tree)


def state_dicts(tree: Any) -> dict[tuple[str, ...], int]:
    """Where in `tree` there are state dicts, dicts of named tensors, and how many tensors each has.

    Lists of names and tensors, and whole modules, are some too.

    Raises:
        CheckpointError: there are more modules than a file has, or one has more modules in it than a network.
    """
    return {path: count for path, count in _state_dicts(tree, (), set(), []) if count}


def _state_dicts(
    node: Any, path: tuple[str, ...], seen: set[int], modules: list[Record]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Finds those in a node; a hostile file may hold one a million times, or many modules that share most of theirs."""
    if not isinstance(node, (dict, list, tuple, Record)) or id(node) in seen:
        return
    seen.add(id(node))
    if is_module(node):
        modules.append(node)
        if len(modules) > MOST_MODULES:
            raise CheckpointError(f"the file holds more than {MOST_MODULES} whole modules: refused")
    if isinstance(node, dict) or is_module(node) or _is_pairs(node):
        named = [key for key, value in _named(node).items() if isinstance(value, TorchTensor)]
        if all(isinstance(key, str) for key in named):
            yield path, len(named)
    if len(path) < MAX_DEPTH and not is_module(node):
        for key, value in _entries(node).items():
            if isinstance(key, str):
                yield from _state_dicts(value, (*path, key), seen, modules)


def rank(path: tuple[str, ...]) -> tuple[int, ...]:
    """Smaller for better known wrappers; all unknown ones, and the file itself, are alike."""
    known = path and all(key in WRAPPERS for key in path)
    return tuple(WRAPPERS.index(key) for key in path) if known else (len(WRAPPERS),)


def _entries(node: Any) -> Mapping[str, Any]:
    """What a dict holds, an object's attributes by name, or the items of a short list by their number."""
    if isinstance(node, (list, tuple)):
        return {str(place): item for place, item in enumerate(node[:MOST_ITEMS])}
    return node.attributes if isinstance(node, Record) else node


def _nodes(tree: Any, path: tuple[str, ...]) -> list[Any]:
    """A tree and what lies in it along a path, the last of them at its end."""
    nodes = [tree]
    for key in path:
        nodes.append(_entries(nodes[-1])[key])
    return nodes


def _is_pairs(node: Any) -> bool:
    """Whether a list holds names and tensors, as `list(state_dict.items())` does."""
    return (
        isinstance(node, (list, tuple))
        and bool(node)
        and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in node)
    )


def _named(node: Any) -> Mapping[str, Any]:
    """The state dict that a node is."""
    if is_module(node):
        return module_tensors(node)
    return dict(node) if _is_pairs(node) else node


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy of the same kind, with what torch attaches to a state dict."""
    copied: dict[str, Any] = OrderedDict(mapping) if isinstance(mapping, OrderedDict) else dict(mapping)
    if hasattr(mapping, "_metadata"):
        copied._metadata = mapping._metadata  # type: ignore[attr-defined]
    return copied


def _with_node(tree: Any, path: tuple[str, ...], node: Any) -> Any:
    if not path:
        return node
    copied = _copied(tree)
    copied[path[0]] = _with_node(tree[path[0]], path[1:], node)
    return copied


def _summary(tree: Any) -> str:
    if isinstance(tree, dict):
        keys = ", ".join(repr(key)[:30] for key in list(tree)[:8])
        return f"a dict with the keys {keys}" + (", ..." if len(tree) > 8 else "") if tree else "an empty dict"
    if isinstance(tree, list | tuple) and tree and all(isinstance(value, TorchTensor) for value in tree):
        return f"{len(tree)} tensors without names; save the model's state_dict() with torch.save instead"
    return f"a {tree.kind if isinstance(tree, Record) else type(tree).__name__}"
