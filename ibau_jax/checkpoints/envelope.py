"""Where in a file the state dict lay, and everything around it, kept for the way back."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ibau_jax.checkpoints.conversion import is_counter
from ibau_jax.checkpoints.reader import Format
from ibau_jax.checkpoints.values import OWN_DIALECT, Dialect, TorchTensor
from ibau_jax.errors import CheckpointError

WRAPPERS = ("net", "model", "state_dict", "model_state_dict", "netC")  # the entry to take, in this order
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile: never part of a model's own names
MAX_DEPTH = 3


@dataclass(frozen=True)
class Envelope:
    """A file without the weights that were converted.

    Attributes:
        tree: the file's content, its state dict's tensors emptied (their dtype and kind stay).
        path: the keys that lead from `tree` to the state dict; `()` where the file is the state dict.
        prefix: what every name in the state dict began with, such as `module.`.
        format: the file format it came in.
        dialect: how its pickle spells what is beside the weights.
    """

    tree: Any = field(repr=False)
    path: tuple[str, ...]
    prefix: str
    format: Format
    dialect: Dialect = field(default=OWN_DIALECT, repr=False)

    def state_dict(self) -> Mapping[str, Any]:
        """The (emptied) state dict inside `tree`, in its original key order."""
        return self.state_dict_in(self.tree)

    def state_dict_in(self, tree: Any) -> Mapping[str, Any]:
        """The state dict inside another tree of the same form, such as `filled` gives or torch loads."""
        for key in self.path:
            tree = tree[key]
        return tree

    def tensors(self) -> dict[str, TorchTensor]:
        """The state dict's tensors by their full names."""
        return {name: value for name, value in self.state_dict().items() if isinstance(value, TorchTensor)}

    def metadata(self) -> Mapping[str, Any]:
        """Plain values beside the state dict at the top of the file (`acc`, `epoch`, ...)."""
        tree = self.tree if self.path else {}
        return {key: value for key, value in tree.items() if key != self.path[0]}

    def filled(self, tensors: Mapping[str, np.ndarray]) -> Any:
        """The file's content with `tensors` (names without prefix) in their places, each in its original dtype."""
        filled = _copied(self.state_dict())
        for name, array in tensors.items():
            filled[self.prefix + name] = filled[self.prefix + name].holding(array)
        return _with_node(self.tree, self.path, filled)

    def emptied(self, names: set[str]) -> "Envelope":
        """The envelope with the tensors called `names` (without prefix) emptied: they are held elsewhere now."""
        state_dict = _copied(self.state_dict())
        for name in names:
            state_dict[self.prefix + name] = state_dict[self.prefix + name].holding(np.zeros(0))
        return replace(self, tree=_with_node(self.tree, self.path, state_dict))


def open_envelope(tree: Any, format: Format, key: str | None = None) -> Envelope:
    """The envelope around the state dict in `tree`.

    Args:
        tree: a file's content.
        format: the format it came in.
        key: where the state dict lies, such as `model_ema` or `ema.state_dict`; by default under one of `WRAPPERS`,
            else the one with the most tensors.

    Raises:
        CheckpointError: there is no state dict in `tree`, or none under `key`, or several and nothing to choose by.
    """
    found = state_dicts(tree)
    names = ", ".join(repr(".".join(path)) for path in found if path)
    if key is not None:
        chosen = [path for path in found if ".".join(path) == key]
        if not chosen:
            raise CheckpointError(f"there is no state dict under {key!r}; --key takes one of: {names or 'none here'}")
        return Envelope(tree, chosen[0], "", format)
    if not found:
        raise CheckpointError(f"there is no state dict in the file; it holds {_summary(tree)}")
    first = min(found, key=lambda path: (_rank(path), -found[path]))
    equals = [path for path in found if (_rank(path), found[path]) == (_rank(first), found[first])]
    if len(equals) > 1:
        raise CheckpointError(f"the file holds several state dicts: {names}; choose one by --key")
    return Envelope(tree, first, "", format)


def state_dicts(tree: Any) -> dict[tuple[str, ...], int]:
    """Where in `tree` there are state dicts, dicts of named tensors, and how many tensors each has."""
    return {path: count for path, count in _state_dicts(tree, (), set()) if count}


def _state_dicts(node: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], int]]:
    if not isinstance(node, dict) or id(node) in seen:  # a hostile file may hold one dict a million times
        return
    seen.add(id(node))
    named = [key for key, value in node.items() if isinstance(value, TorchTensor)]
    if all(isinstance(key, str) for key in named):
        yield path, len(named)
    if len(path) < MAX_DEPTH:
        for key, value in node.items():
            if isinstance(key, str):
                yield from _state_dicts(value, (*path, key), seen)


def _rank(path: tuple[str, ...]) -> tuple[int, ...]:
    """Smaller for better known wrappers; all unknown ones, and the file itself, are alike."""
    known = path and all(key in WRAPPERS for key in path)
    return tuple(WRAPPERS.index(key) for key in path) if known else (len(WRAPPERS),)


def prefixes(tensors: Mapping[str, TorchTensor]) -> list[str]:
    """What the tensors' names may begin with beside the model's own names, in the order to try.

    `module.` and `_orig_mod.` are always taken off; a further part that all names share, such as `model.` of a
    Lightning module, may belong to either.
    """
    names = [name for name, tensor in tensors.items() if not (is_counter(name, tensor) and "." not in name)]
    prefix, found = "", []
    while names:
        part = names[0][len(prefix) :].partition(".")[0] + "."
        shared = all(name.startswith(prefix + part) for name in names)
        if not shared or part not in PREFIXES:
            found.append(prefix)
        if not shared:
            break
        prefix += part
    return found


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
    return f"a {type(tree).__name__}"
