"""Where in a file the state dict lay, and everything around it, kept for the way back."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ibau_jax.checkpoints.reader import Format
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError

WRAPPERS = ("net", "model", "state_dict", "model_state_dict", "netC")
PREFIXES = ("module.", "_orig_mod.")
MAX_DEPTH = 3


@dataclass(frozen=True)
class Envelope:
    """A file without the weights that were converted.

    Attributes:
        tree: the file's content, its state dict's tensors emptied (their dtype and kind stay).
        path: the keys that lead from `tree` to the state dict; `()` where the file is the state dict.
        prefix: what every name in the state dict began with, such as `module.`.
        format: the file format it came in.
    """

    tree: Any = field(repr=False)
    path: tuple[str, ...]
    prefix: str
    format: Format

    def state_dict(self) -> Mapping[str, Any]:
        """The (emptied) state dict inside `tree`, in its original key order."""
        return self.state_dict_in(self.tree)

    def state_dict_in(self, tree: Any) -> Mapping[str, Any]:
        """The state dict inside another tree of the same form, such as `filled` gives or torch loads."""
        for key in self.path:
            tree = tree[key]
        return tree

    def filled(self, tensors: Mapping[str, np.ndarray]) -> Any:
        """The file's content with `tensors` (names without prefix) in their places, each in its original dtype."""
        filled = _copied(self.state_dict())
        for name, array in tensors.items():
            filled[self.prefix + name] = filled[self.prefix + name].holding(array)
        return _with_node(self.tree, self.path, filled)


def open_envelope(tree: Any, format: Format) -> tuple[dict[str, TorchTensor], Envelope]:
    """The state dict's tensors by name, without wrapper and prefix, and the envelope they came in.

    Raises:
        CheckpointError: there is no state dict in `tree`.
    """
    path = _locate(tree, ())
    if path is None:
        raise CheckpointError(f"there is no state dict in the file; it holds {_summary(tree)}")
    envelope = Envelope(tree, path, "", format)
    tensors = {name: value for name, value in envelope.state_dict().items() if isinstance(value, TorchTensor)}
    prefix = _common_prefix(list(tensors))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, replace(envelope, prefix=prefix)


def emptied(envelope: Envelope, names: set[str]) -> Envelope:
    """The envelope with the tensors called `names` (without prefix) emptied: they are held elsewhere now."""
    state_dict = _copied(envelope.state_dict())
    for name in names:
        state_dict[envelope.prefix + name] = state_dict[envelope.prefix + name].holding(np.zeros(0))
    return replace(envelope, tree=_with_node(envelope.tree, envelope.path, state_dict))


def _locate(node: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    if not isinstance(node, dict):
        return None
    if len(path) < MAX_DEPTH:
        for key in WRAPPERS:
            found = _locate(node.get(key), (*path, key))
            if found is not None:
                return found
    named = [key for key, value in node.items() if isinstance(value, TorchTensor)]
    return path if named and all(isinstance(key, str) for key in named) else None


def _common_prefix(names: list[str]) -> str:
    prefix = ""
    while True:
        longer = [p for p in PREFIXES if all(name.startswith(prefix + p) for name in names)]
        if not longer:
            return prefix
        prefix += longer[0]


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
