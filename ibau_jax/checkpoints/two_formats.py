"""Refuses files that PyTorch would take for another format than we do: a file may be of two at once."""

import pickletools
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from ibau_jax.checkpoints.unpickle import MAX_PROTOCOL, OPCODES
from ibau_jax.errors import CheckpointError

MOST = 1000  # opcodes; honest JSON is no pickle after a few
MARK, SLICE = "mark", "stackslice"  # as pickletools calls them
# What some unpickler takes for a list, dict, set or text. "any" comes from the memo.
TAKEN = {
    "list": ("list", "bytearray"),
    "dict": ("dict", "list", "bytearray"),
    "set": ("set",),
    "str": ("str", "bytes_or_str"),
}
FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # what lies below stays where it is
NUMBERS = ("decimalnl_short", "decimalnl_long", "floatnl")
NUMBER = re.compile(rb"\s*[-+]?[\w.+-]*\s*")  # what some unpickler may take for one
# Before anything is imported there is nothing to call, nothing to look up outside the file, and Python's table of
# numbers that stand for globals is empty.
FAILING = ("REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "BINPERSID", "NEXT_BUFFER", "EXT1", "EXT2", "EXT4")
# Nobody takes one of these for a model, nor for the number that PyTorch's legacy format begins with.
SCALARS = ("str", "bytes_or_str", "bytes", "float", "None", "bool")


def refuse_tar(head: bytes) -> None:
    """Raises CheckpointError where the file's first 512 bytes are those of a tar archive.

    PyTorch looks for that, its oldest format, before it looks for a pickle; a file may be both.
    """
    if is_tar(head):
        raise CheckpointError("the file is of another format and a tar archive at once: refused")


def is_tar(head: bytes) -> bool:
    """Whether a file's first 512 bytes are those of a tar archive."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def refuse_pickle(file: IO[bytes]) -> None:
    """Raises CheckpointError where the file is also a pickle that imports something, or that holds more than a scalar.

    PyTorch takes whatever is no zip archive for a pickle, and runs it until it fails; text in JSON may be one. The
    length of an honest file's header, too, may begin with an opcode, and then with more. So what is refused is what an
    unpickler would really get to. What is read at once is no more than the file.
    """
    outline = _Outline()
    try:
        for count, (opcode, argument) in enumerate(_opcodes(file)):
            if count == MOST or outline.is_something(opcode, argument):
                raise CheckpointError("the file is a safetensors file and a pickle at once: refused")
    except _FailedError:
        pass
    file.seek(0)


class _FailedError(Exception):
    """Every unpickler ends here with an error."""


def _fail() -> NoReturn:
    raise _FailedError


class _Outline:
    """A pickle machine that knows of the values on its stack only what kind they are.

    Python has two unpicklers, in C and in Python; where they differ, this goes on as the one that goes on.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.memo: dict[int, str] = {}

    def is_something(self, opcode: pickletools.OpcodeInfo, argument: Any) -> bool:
        """Does what an opcode does, and says whether that may import something, or ends a pickle of more than a scalar.

        A frame may: behind its end the unpickler in C may go on elsewhere than where the opcodes do.
        """
        if opcode.name in ("GLOBAL", "INST"):  # the one in Python imports before it looks at the stack
            return _may_import(*argument) or _fail()
        if opcode.name in FAILING or not _is_possible(opcode, argument):
            _fail()
        if opcode.name == "STOP":
            kind = self.pop()
            self.stack, self.memo = [], {}  # another pickle may follow
            return kind not in SCALARS
        self.move(opcode, argument)
        return opcode.name in ("STACK_GLOBAL", "FRAME")

    def move(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Does what an opcode does to the stack and the memo."""
        name = opcode.name
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name.endswith("PUT"):
            self.memo[_index(argument)] = self.top()
        elif name.endswith("GET"):
            self.stack.append(self.memo.get(_index(argument)) or _fail())
        elif name == "DUP":
            self.stack.append(self.top())
        elif name == "POP" and self.stack[-1:] == [MARK]:
            self.stack.pop()
        elif name in FILLING:
            target, *items = (one.name for one in opcode.stack_before)
            taken = [self.take(kind) for kind in reversed(items)]
            self.check(self.top(), target if any(taken) else "any")
        else:
            for kind in reversed(opcode.stack_before):
                self.take(kind.name)
            self.stack += [kind.name for kind in opcode.stack_after]

    def top(self) -> str:
        """What is on top of the stack, above the last mark."""
        if not self.stack or self.stack[-1] == MARK:
            _fail()
        return self.stack[-1]

    def pop(self) -> str:
        """Takes that from it."""
        self.top()
        return self.stack.pop()

    def take(self, kind: str) -> bool:
        """Takes a value of a kind from the stack, or a mark, or all above the last; whether that is any value."""
        if kind == MARK:
            return not (self.stack or _fail()).pop()
        if kind != SLICE:
            self.check(self.pop(), kind)
            return True
        count = len(self.stack)
        while self.stack and self.stack[-1] != MARK:
            self.stack.pop()
        return len(self.stack) < count

    def check(self, kind: str, wanted: str) -> None:
        """Fails where a value is of a kind that nothing takes for the wanted one."""
        if kind not in TAKEN.get(wanted, (kind,)):
            _fail()


def _opcodes(file: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """A pickle's opcodes up to the first unknown one, also behind STOP.

    Lines stay as they are: Python's own unpickler takes more of them than `pickletools` does.
    """
    while opcode := OPCODES.get(file.read(1)):
        argument: Any = None
        if opcode.arg and opcode.arg.name == "stringnl_noescape_pair":
            argument = file.readline(), file.readline()
        elif opcode.arg and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            argument = file.readline()
        elif opcode.arg:
            try:
                argument = opcode.arg.reader(file)
            except Exception:  # truncated, or text in no encoding: the pickle fails
                return
        yield opcode, argument


def _is_possible(opcode: pickletools.OpcodeInfo, argument: Any) -> bool:
    """Whether an unpickler may take what stands behind an opcode."""
    if opcode.name == "PROTO":
        return bool(argument <= MAX_PROTOCOL)
    if opcode.name == "STRING":
        return argument[:1] in (b"'", b'"')
    is_number = opcode.arg is not None and opcode.arg.name in NUMBERS
    return not is_number or NUMBER.fullmatch(_of_c(argument)) is not None


def _index(argument: int | bytes) -> int:
    """A place in the memo, as a number or as a line."""
    try:
        return int(argument if isinstance(argument, int) else _of_c(argument))
    except ValueError:
        _fail()


def _of_c(line: bytes) -> bytes:
    """A line as C reads it, up to a zero."""
    return line.partition(b"\0")[0]


def _may_import(module: bytes, name: bytes) -> bool:
    """Whether two lines, their ends included, may name a module, of which Python imports the first part first."""
    try:
        first, _ = module[:-1].decode("utf-8").lstrip(".").partition(".")[0], name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return first.isprintable() and first != "" and not set(first) & set('"/\\')
