"""Refuses files that PyTorch would take for another format than we do: a file may be of two at once."""

import pickletools
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from ibau_jax.checkpoints.unpickle import OPCODES
from ibau_jax.errors import CheckpointError

MOST = 1000  # opcodes; honest JSON is no pickle after a few
IMPORTING = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


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
    """Raises CheckpointError where the file is also a pickle that imports something.

    PyTorch takes whatever is no zip archive for a pickle, and runs it until it fails; text in JSON may be one. What is
    read at once is no more than the file.
    """
    for count, (name, argument) in enumerate(_opcodes(file)):
        if name in ("GLOBAL", "INST") and not _is_module(argument):
            break  # nothing can be imported, and the pickle fails
        if name in IMPORTING or count == MOST:
            raise CheckpointError("the file is a safetensors file and a pickle that names globals at once: refused")
    file.seek(0)


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """A pickle's opcodes up to the first unknown one, also behind STOP.

    Lines stay as they are: Python's own unpickler takes more of them than `pickletools` does.
    """
    while opcode := OPCODES.get(file.read(1)):
        argument: Any = None
        if opcode.arg and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            argument = file.readline()
            if opcode.arg.name == "stringnl_noescape_pair":
                file.readline()
        elif opcode.arg:
            try:
                argument = opcode.arg.reader(file)
            except Exception:  # truncated, or text in no encoding: the pickle fails
                return
        yield opcode.name, argument


def _is_module(line: bytes) -> bool:
    """Whether a line, its end included, may be the name of a module."""
    return all(part.isidentifier() for part in line[:-1].decode("utf-8", "replace").split("."))
