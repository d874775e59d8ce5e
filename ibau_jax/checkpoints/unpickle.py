"""A restricted unpickler: reads a pickle as data.

`pickletools` cuts the stream into opcodes; the few that plain data and tensors need are interpreted here, all others
are refused. Globals and calls go through the allow list in `ibau_jax.checkpoints.allowed`.
"""

import pickletools
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Sized
from typing import IO, Any

import numpy as np

from ibau_jax.checkpoints.allowed import (
    NESTED_STORAGE,
    call,
    checked_dtype,
    checked_key,
    checked_shape,
    find_global,
    is_allowed,
)
from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.values import GlobalName, TorchTensor, TorchValue
from ibau_jax.errors import CheckpointError

_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LITERALS = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()  # noqa: SIM905
)
_PUTS, _GETS = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))
MAX_NESTING = 100


def unpickle(
    file: IO[bytes],
    budget: Budget,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    load_nested: Callable[[bytes], Any] | None = None,
    refused: dict[GlobalName, None] | None = None,
) -> Any:
    """The object that one pickle, from the file's position to its STOP, describes.

    Args:
        file: a binary file; afterwards its position is behind the pickle.
        budget: charged for the tensors, and for what calls copy.
        persistent_load: turns a persistent id (PyTorch: a storage's description) into an object.
        load_nested: reads a storage that was pickled by itself, as `pickle.dump` of a tensor has it.
        refused: where given, a global outside the allow list becomes a key here and stands for itself, and calls of it
            stay undone, so that the file can be looked at; by default it is an error.

    Raises:
        CheckpointError: the pickle is damaged, or asks for anything but plain data and tensors.
    """
    machine = _Machine(budget, persistent_load, load_nested, refused)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return checked_nesting(machine.pop())
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged stream makes the standard library raise, it means just that
        raise CheckpointError(f"the pickle can't be read ({str(error)[:120]}); the file is damaged") from error
    raise CheckpointError("the pickle has no end; the file is truncated")


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(
        self,
        budget: Budget,
        persistent_load: Callable[[Any], Any] | None,
        load_nested: Callable[[bytes], Any] | None,
        refused: dict[GlobalName, None] | None,
    ) -> None:
        self.budget = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistent_load = persistent_load
        self.load_nested = load_nested
        self.refused = refused

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            self.stack.append(_CONTAINERS[name]())
        elif name in _PUTS:
            self.memo[argument] = self.top()
        elif name in _GETS:
            self.stack.append(self.recall(argument))
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise CheckpointError(f"the pickle uses the opcode {name}, which a checkpoint does not need: refused")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise CheckpointError("the pickle takes more from its stack than is there; the file is damaged")
        return self.stack[-1]

    def pop(self) -> Any:
        top = self.top()
        self.stack.pop()
        return top

    def pop_to_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is _MARK:
                items = self.stack[position + 1 :]
                del self.stack[position:]
                return items
        raise CheckpointError("the pickle lacks a mark; the file is damaged")

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise CheckpointError("the pickle refers to something it did not store; the file is damaged")
        return self.memo[index]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if self.is_undone(target):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise CheckpointError("the pickle sets items of something that is no dict; the file is damaged")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[checked_key(key)] = value

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if self.is_undone(target):
            return
        if not isinstance(target, list):
            raise CheckpointError("the pickle appends to something that is no list; the file is damaged")
        target.extend(items)

    def add_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        target = self.top()
        if not isinstance(target, set):
            raise CheckpointError("the pickle adds to something that is no set; the file is damaged")
        target.update(checked_key(item) for item in items)

    def append_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append_dict(self, _: Any) -> None:
        pairs = self.pop_to_mark()
        self.stack.append({})
        self.set_items(pairs)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append_global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.found(module, name))

    def found(self, module: str, name: str) -> GlobalName:
        if self.refused is None or is_allowed(module, name):
            return find_global(module, name)
        refused = GlobalName(module, name)
        self.refused[refused] = None
        return refused

    def is_undone(self, value: Any) -> bool:
        """Whether `value` stands for an object that a refused global would have made."""
        return self.refused is not None and isinstance(value, TorchValue) and value.function in self.refused

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("the pickle names a global by something that is no text; the file is damaged")
        self.stack.append(self.found(module, name))

    def charge(self, parts: Any) -> None:
        """Charges for what is copied: an object can be named again and again in a few bytes."""
        if isinstance(parts, tuple):
            self.budget.take(sum(8 * len(part) for part in parts if isinstance(part, Sized)))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.charge(args)
        made = self.made(function, args)
        if isinstance(made, TorchTensor):
            self.budget.take(made.nbytes)
        self.stack.append(made)

    def made(self, function: Any, args: Any) -> Any:
        if self.refused is not None and isinstance(function, GlobalName) and function in self.refused:
            return TorchValue(function, args if isinstance(args, tuple) else (args,))
        if function == NESTED_STORAGE and self.load_nested and isinstance(args, tuple) and len(args) == 1:
            return self.load_nested(args[0])
        return call(function, args)

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if self.is_undone(target):
            return
        self.charge(state)
        set_state(target, state)

    def load_persistent(self, _: Any) -> None:
        if self.persistent_load is None:
            raise CheckpointError("the pickle refers to a storage where there can be none; the file is damaged")
        self.stack.append(self.persistent_load(self.pop()))


_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.top()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.append_tuple(1),
    "TUPLE2": lambda machine, _: machine.append_tuple(2),
    "TUPLE3": lambda machine, _: machine.append_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": _Machine.append_dict,
    "FROZENSET": lambda machine, _: machine.stack.append(frozenset(map(checked_key, machine.pop_to_mark()))),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.append_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.load_persistent,
}


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values(), getattr(value, "_metadata", None)]
    if isinstance(value, Namespace):
        return list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value.args) if isinstance(value, TorchValue) else []


def checked_nesting(tree: Any) -> Any:
    """`tree` if its containers are nested at most MAX_NESTING deep and none contains itself, else CheckpointError.

    What walks the tree later may then recurse.
    """
    heights: dict[int, int] = {}
    entered: set[int] = set()
    pending: list[tuple[Any, bool]] = [(tree, False)]
    while pending:
        value, children_done = pending.pop()
        children = [child for child in _children(value) if _children(child)]
        if children_done:
            # An entered child without a height is an ancestor: a cycle.
            height = heights[id(value)] = 1 + max(
                (heights.get(id(child), MAX_NESTING) for child in children), default=0
            )
            if height > MAX_NESTING:
                raise CheckpointError("the pickle nests its containers too deeply, or in themselves: refused")
        elif id(value) not in entered:
            entered.add(id(value))
            pending.append((value, True))
            pending.extend((child, False) for child in children)
    return tree


def set_state(target: Any, state: Any) -> None:
    """Pickle's BUILD, for the few types whose state is data."""
    if isinstance(target, OrderedDict) and isinstance(state, dict):
        # What torch.nn.Module.state_dict() attaches. Other attributes could hide the dict's own methods.
        if "_metadata" in state:
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]
    elif isinstance(target, Namespace) and isinstance(state, dict) and all(isinstance(key, str) for key in state):
        vars(target).update(state)
    elif isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        dtype = checked_dtype(dtype)
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # as Python 2 wrote it
        new_state: Any = (1, checked_shape(shape, dtype, raw), dtype, bool(fortran), bytes(raw))
        target.__setstate__(new_state)
    elif (
        isinstance(target, np.dtype)
        and isinstance(state, tuple)
        and len(state) >= 8
        and state[1] in ("<", ">", "|", "=")
    ):
        text = target.kind in "SU"
        size, alignment = (target.itemsize, target.alignment) if text else (-1, -1)
        target.__setstate__((3, state[1], None, None, None, size, alignment, 8 if text else 0))  # type: ignore[attr-defined]
    else:
        raise CheckpointError(f"the pickle sets the state of a {type(target).__name__}, which is not allowed")
