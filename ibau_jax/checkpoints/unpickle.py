"""A restricted unpickler: reads a pickle as data.

`pickletools` knows the opcodes; the few that plain data and tensors need are interpreted here, all others are refused.
Calls go through the allow list in `ibau_jax.checkpoints.allowed`; an object that is made without a call, of whatever
class, becomes a record of what the pickle says of it. All that a pickle makes is charged to a
budget: one byte of it can ask for an empty set of 216 bytes, or for a copy of a list of a million.
"""

import codecs
import io
import pickletools
import re
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sized
from sys import getsizeof
from typing import Any

import numpy as np

from ibau_jax.checkpoints.allowed import (
    ENCODE,
    FILLED,
    NESTED_STORAGE,
    RECORDS,
    call,
    check_record,
    checked_dtype,
    checked_key,
    checked_shape,
    is_allowed,
    is_plain_object,
    may_be_class,
    raw_bytes,
    refuse_global,
)
from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.tree import checked_tree
from ibau_jax.checkpoints.values import Dialect, GlobalName, ModuleClass, Record, TorchTensor, TorchValue
from ibau_jax.errors import CheckpointError, quoted, shortened

MAX_LINE = 1000  # of what ends with a line: numbers, names of globals
MAX_INTEGER = 255  # bytes, 614 digits: Python itself prints at most 4300
MAX_PROTOCOL = 5
MAX_NAMES = 1000  # of globals that are not on the allow list
STRIDE = 32  # opcodes that are charged at once
CALL = 2  # what a call is charged beside, in opcodes, and beside as many as it has arguments or copies items
LARGE = 2**12  # bytes of an opcode's argument, from which on its copies are asked for first
TEXT = 5  # what decoding a text may take, as a multiple of its bytes
DECIMAL = re.compile(rb"-?(0|[1-9][0-9]*)")  # as Python writes it; readers differ on 010
# What torch.save makes of a storage's description in protocol 0, where it has to be one line of text.
PERSISTENT = re.compile(
    r"\('storage', <class '(?P<module>torch(\.[a-z]+)?)\.(?P<name>[A-Za-z0-9]+)'>, '(?P<key>[0-9]{1,30})', "
    r"'(?P<location>[a-z]+(:[0-9]+)?)', (?P<size>[0-9]{1,18})(?P<view>, None)?\)"
)
TENSOR, RECORD, SLOT = 512, 256, 110  # bytes that an object takes beside its own
_NOTHING = object()
_INTEGERS = (int, np.integer)


def unpickle(
    file: io.BytesIO,
    budget: Budget,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    load_nested: Callable[[bytes], Any] | None = None,
    refused: dict[GlobalName, None] | None = None,
) -> Any:
    """The object that one pickle, from the file's position to its STOP, describes.

    Args:
        file: afterwards its position is behind the pickle.
        budget: charged for all that the pickle makes.
        persistent_load: turns a persistent id (PyTorch: a storage's description) into an object.
        load_nested: reads a storage that was pickled by itself, as `pickle.dump` of a tensor has it.
        refused: where given, a global outside the allow list that is called becomes a key here, and calls of it stay
            undone, so that the file can be looked at; by default it is an error.

    Raises:
        CheckpointError: the pickle is damaged, or calls what makes anything but plain data and tensors.
    """
    return unpickle_with_dialect(file, budget, persistent_load, load_nested=load_nested, refused=refused)[0]


def unpickle_with_dialect(
    file: io.BytesIO,
    budget: Budget,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    load_nested: Callable[[bytes], Any] | None = None,
    refused: dict[GlobalName, None] | None = None,
) -> tuple[Any, Dialect]:
    """As `unpickle`, and how the pickle spells what it holds."""
    machine = _Machine(file, budget, persistent_load, load_nested, refused)
    try:
        return checked_tree(machine.run(), budget), machine.dialect()
    except CheckpointError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged stream makes the standard library raise, it means just that
        raise CheckpointError(f"the pickle can't be read ({shortened(error)}); the file is damaged") from error


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(
        self,
        file: io.BytesIO,
        budget: Budget,
        persistent_load: Callable[[Any], Any] | None,
        load_nested: Callable[[bytes], Any] | None,
        refused: dict[GlobalName, None] | None,
    ) -> None:
        self.file = file
        self.budget = budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.sparse_memo: dict[int, Any] = {}
        self.memorised = 0  # indices, which MEMOIZE counts
        self.persistent_load = persistent_load
        self.load_nested = load_nested
        self.refused = refused
        self.protocol: int | None = None
        self.names: dict[GlobalName, GlobalName] = {}  # so that a name that is written often is one object
        self.opcodes: set[str] = set()  # those that store bytes
        self.is_text = False  # whether it remembers as protocol 0 does

    def run(self) -> Any:
        """Interprets the pickle to its STOP and gives what is on top of the stack."""
        read = self.file.read
        while True:
            self.budget.step(STRIDE)
            for _ in range(STRIDE):
                code = read(1)
                if code == b".":
                    return self.pop()
                reader, operation = _TABLE.get(code) or _unknown(code)
                operation(self, reader(self) if reader else None)

    def dialect(self) -> Dialect:
        if ENCODE in self.names or not self.opcodes:
            bytes_as: Any = "call"
        else:
            bytes_as = "bytes" if "bytes" in self.opcodes else "text"
        unnamed = 0 if self.is_text else 1  # protocols that pickles do not tell
        return Dialect(self.protocol or unnamed, frozenset(self.names), bytes_as)

    # What an opcode's argument is.

    def fixed(self, form: struct.Struct) -> Any:
        return form.unpack(self.file.read(form.size))[0]

    def counted(self, width: int) -> bytes:
        """As many bytes as the next `width` say; what decoding them may take is asked for first."""
        count = int.from_bytes(self.file.read(width), "little")
        if count > LARGE:
            self.budget.require(TEXT * count)
        content = self.file.read(count)
        if len(content) != count:
            raise CheckpointError("the pickle's text or bytes are longer than the pickle; the file is truncated")
        return content

    def line(self) -> bytes:
        """The next line, of bounded length, without its end; reading one takes as long as another opcode."""
        self.budget.step(1)
        line = self.file.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise CheckpointError(f"the pickle has a number or a name of more than {MAX_LINE} characters: refused")
        return line[:-1]

    def text_line(self) -> bytes:
        """The next line, which is text of any length; what decoding it may take is asked for first."""
        self.budget.step(1)
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise CheckpointError("the pickle ends within a text; the file is truncated")
        if len(line) > LARGE:
            self.budget.require(TEXT * len(line))
        return line[:-1]

    # The stack.

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CheckpointError("the pickle takes more from its stack than is there; the file is damaged")
        return self.stack[-1]

    def pop(self) -> Any:
        top = self.top()
        self.stack.pop()
        return top

    def drop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError("the pickle lacks a mark; the file is damaged")
        position = self.marks.pop()
        if len(self.stack) - position > LARGE:
            self.budget.require(9 * (len(self.stack) - position))
        items = self.stack[position:]
        del self.stack[position:]
        return items

    def push(self, value: Any) -> None:
        """Puts something new on the stack, charged by what it takes without what it holds."""
        self.budget.take(getsizeof(value))
        self.stack.append(value)

    def push_bytes(self, value: bytes | bytearray) -> None:
        self.opcodes.add("bytes")
        self.push(value)

    def push_text_of_python2(self, value: str) -> None:
        self.opcodes.add("text")
        self.push(value)

    # The memo.

    def store(self, index: int) -> None:
        """Remembers the top of the stack; Python counts `index` up from 0 or 1, and others take more memory."""
        value = self.top()
        if index < 0:
            raise CheckpointError("the pickle stores something at a negative place; the file is damaged")
        self.memorised += self.remembered(index) is _NOTHING
        if index <= len(self.memo) + 1:
            self.memo.extend([_NOTHING] * (index + 1 - len(self.memo)))
            self.memo[index] = value
        else:
            self.budget.take(SLOT + getsizeof(index))
            self.sparse_memo[index] = value

    def store_as_text(self, index: int) -> None:
        self.is_text = True
        self.store(index)

    def memoize(self, _: Any) -> None:
        self.store(self.memorised)

    def remembered(self, index: int) -> Any:
        value = self.memo[index] if 0 <= index < len(self.memo) else _NOTHING
        return self.sparse_memo.get(index, _NOTHING) if value is _NOTHING else value

    def recall(self, index: int) -> None:
        value = self.remembered(index)
        if value is _NOTHING:
            raise CheckpointError("the pickle refers to something it did not store; the file is damaged")
        self.stack.append(value)

    # Containers.

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if self.is_undone(target):
            return
        target = target.entries if isinstance(target, Record) else target
        if not isinstance(target, dict) or len(pairs) % 2:
            raise CheckpointError("the pickle sets items of something that is no dict; the file is damaged")
        self.fill_dict(target, zip(pairs[::2], pairs[1::2], strict=True), len(pairs) // 2)

    def fill_dict(self, target: dict[Any, Any], items: Iterable[tuple[Any, Any]], count: int) -> None:
        self.budget.require(SLOT * count)
        before = getsizeof(target)
        for key, value in items:
            if type(checked_key(key)) is not str:
                self.charge_key(key, target)
            target[key] = value
        self.budget.take(max(0, getsizeof(target) - before))

    def fill_set(self, target: set[Any], items: list[Any] | tuple[Any, ...]) -> None:
        self.budget.require(SLOT * len(items))
        before = getsizeof(target)
        for item in items:
            if type(checked_key(item)) is not str:
                self.charge_key(item, target)
            target.add(item)
        self.budget.take(max(0, getsizeof(target) - before))

    def charge_key(self, key: Any, target: dict[Any, Any] | set[Any]) -> None:
        """Charges the look-ups that putting `key` into `target` may take.

        Text hashes at random, numbers do not: chosen so, each collides with all before. Those that count up, with few
        gaps, can't: the table has a place for each.
        """
        count = len(target)
        if count <= 8 or isinstance(key, (bytes, TorchTensor)):
            return
        first = next(iter(target)) if isinstance(target, dict) else 0
        if isinstance(key, _INTEGERS) and isinstance(first, _INTEGERS) and 0 <= int(key) - int(first) <= count * 3 // 2:
            return
        self.budget.probe(16 * count if isinstance(key, tuple) else count)

    def filled(self, function: GlobalName, args: tuple[Any, ...]) -> Any:
        """The dict or set that a call makes of the items of its argument."""
        target: Any = FILLED[function]()
        source = args[0] if args else ()
        self.budget.step(len(source) if isinstance(source, Sized) else 0)
        if isinstance(target, set) and isinstance(source, (list, tuple)):
            self.fill_set(target, source)
        elif isinstance(target, dict) and isinstance(source, dict):
            self.fill_dict(target, source.items(), len(source))
        elif isinstance(target, OrderedDict) and isinstance(source, (list, tuple)):
            self.fill_dict(target, map(_pair, source), len(source))
        else:
            raise CheckpointError(f"a {function.name} is built from something else than its items; the file is damaged")
        return frozenset(target) if function.name == "frozenset" else target

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if self.is_undone(target):
            return
        target = target.items if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise CheckpointError("the pickle appends to something that is no list; the file is damaged")
        self.budget.require(10 * len(items))
        before = getsizeof(target)
        target.extend(items)
        self.budget.take(max(0, getsizeof(target) - before))

    def add_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        target = self.top()
        if not isinstance(target, set):
            raise CheckpointError("the pickle adds to something that is no set; the file is damaged")
        self.fill_set(target, items)

    def append_frozenset(self, _: Any) -> None:
        items: set[Any] = set()
        self.fill_set(items, self.pop_to_mark())
        self.push(frozenset(items))

    def append_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append_dict(self, _: Any) -> None:
        pairs = self.pop_to_mark()
        self.push({})
        self.set_items(pairs)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    # Globals and calls.

    def append_global(self, names: tuple[str, str]) -> None:
        self.stack.append(self.found(*names))

    def found(self, module: str, name: str) -> GlobalName:
        found = GlobalName(module, name)
        if found in self.names:
            return self.names[found]
        if not is_allowed(found):
            if not found.is_plain():
                raise CheckpointError(
                    f"the pickle names a global by something that is no name: {quoted(str(found))}: refused"
                )
            if len(module) + len(name) > MAX_LINE or len(self.names) >= MAX_NAMES:
                raise CheckpointError(
                    f"the pickle names more globals than a checkpoint needs, such as {shortened(found)}"
                )
            self.budget.take(SLOT + getsizeof(module) + getsizeof(name))
            if not may_be_class(found):
                self.refuse(found)
        self.names[found] = found
        return found

    def refuse(self, name: GlobalName) -> None:
        """Raises CheckpointError, or notes a global that is not on the allow list where the file is only inspected."""
        if self.refused is None:
            refuse_global(name)
        self.refused[name] = None

    def is_undone(self, value: Any) -> bool:
        """Whether `value` stands for an object that a refused global would have made."""
        return self.refused is not None and isinstance(value, TorchValue) and value.function in self.refused

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("the pickle names a global by something that is no text; the file is damaged")
        self.stack.append(self.found(module, name))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.budget.step(CALL + (len(args) if isinstance(args, tuple) else 0))
        if isinstance(function, GlobalName) and function in RECORDS and isinstance(args, tuple):
            if self.protocol is None and is_plain_object(function, args):
                self.stack.extend((args[0], ()))
                self.new(None)
                return
            check_record(function, args)
            self.push_record(function, args, is_called=True)
            return
        made = self.made(function, args)
        # A tensor is charged as the copy that may be made of it: it may be tiny in the file, and expanded.
        self.budget.take(TENSOR + made.nbytes if isinstance(made, TorchTensor) else 0)
        self.push(made)

    def new(self, _: Any) -> None:
        """A call that makes an object without filling it: what it is given beside its class is not its content."""
        args, kind = self.pop(), self.top()
        if isinstance(args, tuple) and (isinstance(kind, ModuleClass) or is_unknown(kind) or kind in RECORDS):
            self.pop()
            self.push_record(kind, args, is_called=False)
            return
        if not isinstance(args, tuple) or args:
            raise CheckpointError(f"the pickle makes a {shortened(kind)} in a way that Python does not write: refused")
        self.stack.append(args)
        self.reduce(None)

    def push_record(self, kind: GlobalName | ModuleClass, args: tuple[Any, ...], *, is_called: bool) -> None:
        self.budget.take(RECORD)
        self.push(Record(kind, args, is_called))

    def made(self, function: Any, args: Any) -> Any:
        if is_unknown(function):
            self.refuse(function)
            return TorchValue(function, args if isinstance(args, tuple) else (args,))
        if function == NESTED_STORAGE and self.load_nested and isinstance(args, tuple) and len(args) == 1:
            return self.load_nested(args[0])
        if isinstance(args, tuple):
            if _is_filled(function) and len(args) <= 1:
                return self.filled(function, args)
            self.budget.require(sum(len(part) for part in args if isinstance(part, (str, bytes, bytearray))))
        return call(function, args)

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if self.is_undone(target):
            return
        self.budget.step(CALL)
        if isinstance(state, dict):
            self.budget.step(len(state))
            self.budget.require(SLOT * len(state))
        if isinstance(target, Record):
            if target.state is not None:
                raise CheckpointError(f"the pickle sets the state of a {target.kind} twice: refused")
            target.state = state
            return
        copied = set_state(target, state)
        self.budget.take(copied)

    def load_persistent(self, _: Any) -> None:
        if self.persistent_load is None:
            raise CheckpointError("the pickle refers to a storage where there can be none; the file is damaged")
        self.stack.append(self.persistent_load(self.pop()))

    def load_text_persistent(self, text: str) -> None:
        """Protocol 0 has a tuple's text for the tuple; PyTorch itself does not read that."""
        self.budget.step(CALL)
        described = PERSISTENT.fullmatch(text)
        if described is None:
            raise CheckpointError(
                "the pickle of protocol 0 refers to something that is no storage; save it again without pickle_protocol"
            )
        kind = self.found(described["module"], described["name"])
        view = (None,) if described["view"] else ()
        self.stack.append(("storage", kind, described["key"], described["location"], int(described["size"]), *view))
        self.load_persistent(None)

    def check_protocol(self, number: int) -> None:
        if number > MAX_PROTOCOL:
            raise CheckpointError(
                f"the pickle is of protocol {number}, which Python does not know; the file is damaged"
            )
        self.protocol = self.protocol or number


def is_unknown(function: Any) -> bool:
    """Whether something is the name of a global that is not on the allow list."""
    return isinstance(function, GlobalName) and not is_allowed(function)


def _is_filled(function: Any) -> bool:
    return isinstance(function, GlobalName) and function in FILLED


def _pair(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CheckpointError("a dict is built from something that is no pair of key and value; the file is damaged")
    return value


def _unknown(code: bytes) -> Any:
    if not code:
        raise CheckpointError("the pickle has no end; the file is truncated")
    if code not in OPCODES:
        raise CheckpointError(f"the pickle has no opcode {code!r}; the file is damaged")
    raise CheckpointError(f"the pickle uses the opcode {OPCODES[code].name}, which a checkpoint does not need: refused")


def _checked_integer(content: bytes) -> int:
    if len(content) > MAX_INTEGER:
        raise CheckpointError(f"the pickle has an integer of {len(content):,} bytes: refused")
    return int.from_bytes(content, "little", signed=True)


def _decimal(line: bytes) -> int:
    if not DECIMAL.fullmatch(line):
        raise CheckpointError(f"the pickle has {quoted(line)} for a number: refused")
    return int(line)


def _decimal_or_truth(line: bytes) -> int | bool:
    """What protocols 0 and 1 have for integers, and for True and False."""
    return line == b"01" if line in (b"00", b"01") else _decimal(line)


def _string_of_python2(line: bytes) -> str:
    """Text in quotes; what the escapes in it stand for are bytes."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise CheckpointError("the pickle has a text without quotes; the file is damaged")
    return str(codecs.escape_decode(line[1:-1])[0], "latin1")


_DECODE: dict[str, Callable[[bytes], Any]] = {
    "unicodestring": lambda content: str(content, "utf-8", "surrogatepass"),
    "string": lambda content: str(content, "latin1"),
    "long": _checked_integer,
    "bytes": bytes,
    "bytearray": bytearray,
}
_LINES: dict[str, Callable[[_Machine], Any]] = {
    "decimalnl_short": lambda machine: _decimal_or_truth(machine.line()),
    "decimalnl_long": lambda machine: _decimal(machine.line().removesuffix(b"L")),
    "floatnl": lambda machine: float(machine.line()),
    "stringnl": lambda machine: _string_of_python2(machine.text_line()),
    "unicodestringnl": lambda machine: str(machine.text_line(), "raw-unicode-escape"),
    "stringnl_noescape": lambda machine: str(machine.line(), "ascii"),
    "stringnl_noescape_pair": lambda machine: (str(machine.line(), "ascii"), str(machine.line(), "ascii")),
}


def _reader(argument: Any) -> Callable[[_Machine], Any] | None:
    """What reads an opcode's argument, by `pickletools`' description of it."""
    if argument is None:
        return None
    fixed = {"uint1": "<B", "uint2": "<H", "int4": "<i", "uint4": "<I", "uint8": "<Q", "float8": ">d"}
    if argument.name in fixed:
        form = struct.Struct(fixed[argument.name])
        return lambda machine: machine.fixed(form)
    if argument.name in _LINES:
        return _LINES[argument.name]
    decode, width = _DECODE[argument.name[:-1]], int(argument.name[-1])
    return lambda machine: decode(machine.counted(width))


def _constant(value: Any) -> Callable[[_Machine, Any], Any]:
    return lambda machine, _: machine.stack.append(value)


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **{name: _constant(value) for name, value in _CONSTANTS.items()},
    "BININT1": lambda machine, number: machine.stack.append(number),  # one of Python's own small integers
    **dict.fromkeys(("INT", "BININT", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push_text_of_python2),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push_bytes),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "PUT": _Machine.store_as_text,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.store),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "MEMOIZE": _Machine.memoize,
    "PROTO": _Machine.check_protocol,
    "FRAME": lambda machine, _: None,
    "POP": _Machine.drop,
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.append_tuple(1),
    "TUPLE2": lambda machine, _: machine.append_tuple(2),
    "TUPLE3": lambda machine, _: machine.append_tuple(3),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": _Machine.append_dict,
    "FROZENSET": _Machine.append_frozenset,
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.append_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.load_persistent,
    "PERSID": _Machine.load_text_persistent,
}
OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}  # those that there are
_TABLE = {
    code: (_reader(opcode.arg), _OPERATIONS[opcode.name])
    for code, opcode in OPCODES.items()
    if opcode.name in _OPERATIONS
}


def set_state(target: Any, state: Any) -> int:
    """Pickle's BUILD, for the few types whose state is data; gives how many bytes it took."""
    before = getsizeof(target)
    if isinstance(target, OrderedDict) and isinstance(state, dict):
        # What torch.nn.Module.state_dict() attaches. Other attributes could hide the dict's own methods.
        if "_metadata" in state:
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        return SLOT
    if isinstance(target, Namespace) and isinstance(state, dict) and all(isinstance(key, str) for key in state):
        before = getsizeof(vars(target))
        vars(target).update(state)
        return SLOT + max(0, getsizeof(vars(target)) - before)
    if isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, content = state
        dtype, raw = checked_dtype(dtype), raw_bytes(content)
        new_state: Any = (1, checked_shape(shape, dtype, raw), dtype, bool(fortran), raw)
        target.__setstate__(new_state)
        return getsizeof(target) - before + (0 if raw is content else len(raw))
    is_state_of_dtype = isinstance(target, np.dtype) and isinstance(state, tuple) and len(state) >= 8
    if is_state_of_dtype and state[1] in ("<", ">", "|", "="):
        text = target.kind in "SU"
        size, alignment = (target.itemsize, target.alignment) if text else (-1, -1)
        target.__setstate__((3, state[1], None, None, None, size, alignment, 8 if text else 0))
        return 0
    raise CheckpointError(f"the pickle sets the state of a {type(target).__name__}, which is not allowed")
