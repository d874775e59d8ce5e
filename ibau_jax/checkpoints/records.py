"""Whole pickled modules, as `torch.save(model)` writes them: their tensors by name; trees with other tensors."""

import copy
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np

from ibau_jax.checkpoints.tree import CONTAINERS, MAX_NAME
from ibau_jax.checkpoints.values import Record, TorchTensor, TorchValue
from ibau_jax.errors import CheckpointError, quoted

PARTS = ("_parameters", "_buffers", "_modules")  # of every torch.nn.Module, by name
SCRIPT = "__torch__."  # what the classes in a TorchScript archive begin with
MOST = 10_000  # modules in one, and tensors; a hostile file may hold one module in two places of each of many


def is_module(value: Any) -> TypeGuard[Record]:
    """Says whether something is an object with the parts of a `torch.nn.Module`, or one of TorchScript's."""
    if not isinstance(value, Record):
        return False
    return is_scripted(value) or all(isinstance(value.attributes.get(part), dict) for part in PARTS)


def is_scripted(module: Record) -> bool:
    """Says whether a module is of TorchScript: its tensors and modules are its attributes."""
    return str(module.kind).startswith(SCRIPT)


def _parts(module: Record) -> tuple[dict[Any, Any], ...]:
    """A module's parameters, buffers and modules by their names."""
    if is_scripted(module):
        return module.attributes, {}, module.attributes
    parameters, buffers, inside = (module.attributes[part] for part in PARTS)
    transient = module.attributes.get("_non_persistent_buffers_set")
    left_out = transient if isinstance(transient, set) else set()
    return parameters, {key: value for key, value in buffers.items() if key not in left_out}, inside


def is_leaf(module: Record) -> bool:
    """Says whether a module holds neither tensors nor modules."""
    return not any(
        isinstance(value, TorchTensor) or is_module(value) for part in _parts(module) for value in part.values()
    )


def modules(module: Record) -> Iterator[tuple[str, Record]]:
    """Lists a module and all modules in it by their names, in the module's order; the name of the first is empty.

    Raises:
        CheckpointError: a name is no text or very long, or there are very many.
    """
    waiting, count = [("", module)], 0
    while waiting:
        name, here = waiting.pop()
        yield name, here
        inside = [(_joined(name, key), one) for key, one in _parts(here)[2].items() if is_module(one)]
        waiting.extend(reversed(inside))
        count += 1
        if count + len(waiting) > MOST:
            raise CheckpointError(f"the file holds a module of more than {MOST:,} modules: refused")


def module_tensors(module: Record) -> dict[str, TorchTensor]:
    """Collects a module's parameters and buffers by their names, as its `state_dict()` has them."""
    tensors: dict[str, TorchTensor] = OrderedDict()
    for name, here in modules(module):
        for part in _parts(here)[:2]:
            tensors |= {_joined(name, key): value for key, value in part.items() if isinstance(value, TorchTensor)}
            if len(tensors) > MOST:
                raise CheckpointError(f"the file holds a module of more than {MOST:,} tensors: refused")
    return tensors


def _joined(name: str, key: Any) -> str:
    if not isinstance(key, str) or len(name) + len(key) > MAX_NAME:
        raise CheckpointError(f"a module's name is no text, or too long: {quoted(str(key))}: refused")
    return f"{name}.{key}" if name else key


def arrays_as_tensors(tree: Any) -> Any:
    """A tree whose arrays of numbers are tensors, for files that were saved with NumPy's in their place."""
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if not isinstance(value, np.ndarray | dict | list | tuple):
            return value
        if id(value) not in done:
            done[id(value)] = _array_as_tensor(value) if isinstance(value, np.ndarray) else _rebuilt(value, visit)
        return done[id(value)]

    return visit(tree)


def _array_as_tensor(array: np.ndarray) -> Any:
    plain = array.dtype.kind == "f" and array.dtype.isnative and array.flags.c_contiguous
    return replace(TorchTensor.from_numpy(array), is_array=True) if plain else array


def replaced(tree: Any, tensors: Mapping[int, TorchTensor]) -> Any:
    """A tree with other tensors in the places of some, which are named by their `id`; what holds none is not copied.

    What is in several places stays one thing.
    """
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, TorchTensor):
            return tensors.get(id(value), value)
        if not isinstance(value, CONTAINERS):
            return value
        if id(value) not in done:
            done[id(value)] = _rebuilt(value, visit)
        return done[id(value)]

    return visit(tree)


def _rebuilt(value: Any, visit: Callable[[Any], Any]) -> Any:
    """A container with what `visit` gives for what it holds; itself where that is the same."""
    if isinstance(value, dict):
        pairs = [(visit(key), visit(item)) for key, item in value.items()]
        if all(new is key and other is value[key] for (new, other), key in zip(pairs, value, strict=True)):
            return value
        copied = copy.copy(value)
        copied.clear()
        for key, item in pairs:  # a Counter's update counts
            copied[key] = item
        return copied
    if isinstance(value, (list, tuple)):
        items = [visit(item) for item in value]
        same = all(new is item for new, item in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if isinstance(value, Namespace):
        return Namespace(**_rebuilt(vars(value), visit))
    if isinstance(value, TorchValue):
        return replace(value, args=visit(value.args))
    if isinstance(value, Record):
        parts = {part: visit(getattr(value, part)) for part in ("args", "items", "entries", "state")}
        return replace(value, **parts)
    return value
