"""PyTorch's format before 0.1.10: a tar archive of storages, of tensors over them, and of a pickle that names these."""

import io
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.unpickle import TENSOR, unpickle, unpickle_with_dialect
from ibau_jax.checkpoints.values import STORAGE_DTYPES, Dialect, GlobalName, ModuleClass, Storage, TorchTensor
from ibau_jax.errors import CheckpointError

MEMBERS = frozenset({"sys_info", "pickle", "tensors", "storages"})
BLOCK = tarfile.BLOCKSIZE
TIMES = re.compile(rb"([0-9]+ [acm]time=[0-9.]+\n)*")  # what a member's extended header may say
KEY = re.compile("[0-9]{1,20}")
Span = tuple[int, int]


def read_tar(content: bytes, budget: Budget, refused: dict[GlobalName, None] | None) -> tuple[Any, Dialect]:
    """What such a file holds, and how its pickle spells it.

    Raises:
        CheckpointError: it is another tar archive, damaged, or calls a global outside the allow list.
    """
    spans = _spans(content)
    storages = _storages(content, spans["storages"], budget)
    tensors = _tensors(content, spans["tensors"], storages, budget)

    def load_persistent(persistent_id: Any) -> TorchTensor | ModuleClass:
        if isinstance(persistent_id, tuple):
            return ModuleClass.of(persistent_id)
        return _of(tensors, persistent_id)

    file, end = _opened(content, spans["pickle"])
    tree, dialect = unpickle_with_dialect(file, budget, load_persistent, refused=refused)
    _check_end(file, end)
    return tree, dialect


def _spans(content: bytes) -> dict[str, Span]:
    """Where each member begins and ends; nothing is in the archive that two readers could take for two contents."""
    spans, place = dict[str, Span](), 0
    for info, start in _headers(content):
        end = start + info.size
        if info.type == tarfile.XHDTYPE and TIMES.fullmatch(content[start:end]):
            pass
        elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.name not in MEMBERS:
            raise CheckpointError("this is no PyTorch checkpoint but a tar archive; unpack it first")
        elif info.name in spans:
            raise CheckpointError("the tar archive has two members of one name: refused")
        else:
            spans[info.name] = (start, end)
        place = end
    if set(spans) != MEMBERS or content[place:].strip(b"\0"):
        raise CheckpointError("the tar archive of an old PyTorch lacks a member, or has something behind the last")
    return spans


def _headers(content: bytes) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member's header and where its content begins."""
    place = 0
    while content[place : place + BLOCK].strip(b"\0"):
        try:
            info = tarfile.TarInfo.frombuf(content[place : place + BLOCK], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise CheckpointError("the tar archive is damaged or truncated") from error
        place += BLOCK
        if not 0 <= info.size <= len(content) - place:
            raise CheckpointError("the tar archive is truncated")
        yield info, place
        place += -(-info.size // BLOCK) * BLOCK


def _opened(content: bytes, span: Span) -> tuple[io.BytesIO, int]:
    """The content at a member's begin, without a copy, and where that ends."""
    file = io.BytesIO(content)
    file.seek(span[0])
    return file, span[1]


def _check_end(file: io.BytesIO, end: int) -> None:
    if file.tell() > end:
        raise CheckpointError("a member of the tar archive is truncated")


def _items(file: io.BytesIO, end: int, budget: Budget, length: int) -> Iterator[tuple[Any, ...]]:
    """The tuples of a member that begins with their number; what follows each is read by whoever takes it."""
    count = unpickle(file, budget)
    for index in range(count if type(count) is int else 0):
        budget.probe(index)  # numbers can be chosen so that each collides with all before
        item = unpickle(file, budget)
        if not isinstance(item, tuple) or len(item) != length:
            raise _damaged()
        yield item
        _check_end(file, end)


def _storages(content: bytes, span: Span, budget: Budget) -> dict[int, Storage]:
    whole, (file, end) = memoryview(content), _opened(content, span)
    storages: dict[int, Storage] = {}
    for key, _, kind in _items(file, end, budget, 3):
        if not isinstance(kind, GlobalName) or kind.name not in STORAGE_DTYPES:
            raise _damaged()
        storage = Storage(STORAGE_DTYPES[kind.name], _counts(file, 1)[0])
        place = file.tell()
        if not 0 <= storage.nbytes <= end - place:
            raise CheckpointError("a storage is declared larger than what the file holds; refused")
        storage.buffer = whole[place : place + storage.nbytes]
        file.seek(place + storage.nbytes)
        storages[_key(key)] = storage
    views = unpickle(file, budget)
    _check_end(file, end)
    for view in views if isinstance(views, list) else [views]:
        budget.probe(len(storages))
        if not isinstance(view, tuple) or len(view) != 4:
            raise _damaged()
        key, root, offset, size = view
        storages[_key(key)] = _part(_of(storages, root), offset, size)
    return storages


def _part(storage: Storage, offset: int, size: int) -> Storage:
    """A storage of some of the elements of another."""
    TorchTensor(storage, storage.dtype, offset, (size,), (1,)).check()
    item = storage.dtype.itemsize
    return Storage(storage.dtype, size, memoryview(storage.buffer)[offset * item : (offset + size) * item])


def _tensors(content: bytes, span: Span, storages: dict[int, Storage], budget: Budget) -> dict[int, TorchTensor]:
    file, end = _opened(content, span)
    tensors: dict[int, TorchTensor] = {}
    for key, storage_key, _ in _items(file, end, budget, 3):
        ndim = _counts(file, 1)[0] % 2**32  # of four bytes; the next four are nothing
        if ndim > 32:
            raise _damaged()
        shape, strides, (offset,) = _counts(file, ndim), _counts(file, ndim), _counts(file, 1)
        storage = _of(storages, storage_key)
        tensor = TorchTensor(storage, storage.dtype, offset, shape, strides)
        tensor.check()
        budget.take(TENSOR + tensor.nbytes)
        tensors[_key(key)] = tensor
    return tensors


def _counts(file: io.BytesIO, count: int) -> tuple[int, ...]:
    raw = file.read(8 * count)
    if len(raw) != 8 * count:
        raise CheckpointError("a member of the tar archive is truncated")
    return struct.unpack(f"<{count}q", raw)


def _key(value: Any) -> int:
    """What a storage or tensor is called: its address in the process that wrote the file, or that as text."""
    if isinstance(value, str) and KEY.fullmatch(value):
        return int(value)
    if type(value) is not int or not 0 <= value < 2**64:
        raise _damaged()
    return value


def _of(table: dict[int, Any], key: Any) -> Any:
    if _key(key) not in table:
        raise CheckpointError("the file refers to a tensor or storage that it does not hold; it is damaged")
    return table[_key(key)]


def _damaged() -> CheckpointError:
    return CheckpointError("the tar archive describes its tensors in a way PyTorch does not write; it is damaged")
