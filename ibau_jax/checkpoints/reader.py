"""Reads PyTorch files without torch and without executing anything: zip and older formats, pickle, safetensors."""

import gc
import io
import json
import re
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import ml_dtypes
import numpy as np

from ibau_jax.checkpoints.allowed import is_allowed
from ibau_jax.checkpoints.archive import Archive, damaged
from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.shards import check_part, index_in, located, merged, shards_of
from ibau_jax.checkpoints.tar import read_tar
from ibau_jax.checkpoints.tree import checked_tree
from ibau_jax.checkpoints.two_formats import is_tar, refuse_pickle, refuse_tar
from ibau_jax.checkpoints.unpickle import TEXT, unpickle, unpickle_with_dialect
from ibau_jax.checkpoints.values import (
    OWN_DIALECT,
    STORAGE_DTYPES,
    Dialect,
    GlobalName,
    ModuleClass,
    Storage,
    TorchTensor,
)
from ibau_jax.data.npy import array_of
from ibau_jax.errors import CheckpointError, and_more, quoted, shortened
from ibau_jax.files import open_regular

Format = Literal["zip", "legacy", "pickle", "safetensors", "npz"]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_SAFETENSORS_HEADER = 100 * 2**20
HEADER = 24  # what the parsed header of a safetensors file takes, or an index of files, as a multiple of its bytes
STORAGE = 512  # what a storage takes beside its content
NPY = ".npy"
QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
TORCH_SUFFIXES = (".pth", ".pt", ".th", ".tar", ".pkl", ".bin", ".ckpt", ".t7")  # `.pth.tar` is among them
SAFETENSORS_SUFFIX = ".safetensors"
EXPORTED = ("archive_format", "serialized_exported_program.json")
MAX_KEY = 100  # characters of a storage's key; PyTorch writes numbers
# How pickles of protocols 0 and 1 begin, which do not say what they are: a container, an object, the legacy format's
# number. Text begins so only by chance.
OLD_PICKLE = re.compile(
    rb"\(*(\([dl](p\d\n|\.)|[}\]](q[\0\1]|\.)|c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n(p\d+\n|q[\0-\xff]))|L%dL\n\."
    % LEGACY_MAGIC,
    re.DOTALL,
)

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    **{"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BOOL": np.dtype("?")},
    **{"C64": np.dtype("c8"), "BF16": np.dtype(ml_dtypes.bfloat16)},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
    **{"F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz), "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz)},
}


@dataclass(frozen=True)
class TorchFile:
    """What a file holds: a tree of plain data and `TorchTensor`s, the format it was in, and how its pickle spells it.

    Attributes:
        tree, format: what and how.
        refused: globals outside the allow list that it calls, where it was only inspected: it must not be converted.
        dialect: how its pickle spells things.
    """

    tree: Any
    format: Format
    refused: tuple[GlobalName, ...] = ()
    dialect: Dialect = OWN_DIALECT

    @property
    def unknown(self) -> tuple[GlobalName, ...]:
        """Lists what it names that is not on the allow list: classes of objects that became records, and functions."""
        return tuple(name for name in sorted(self.dialect.names, key=str) if not is_allowed(name))


def read_torch_file(path: Path, *, inspect: bool = False) -> TorchFile:
    """Reads a file of torch.save (zip or older formats), of pickle.dump, or of safetensors; its content tells which.

    Args:
        path: the file, or the index (`model.safetensors.index.json`) of several beside it.
        inspect: note calls outside the allow list instead of refusing the file. Nothing is executed either way.

    Raises:
        CheckpointError: the file is missing, no regular file, damaged, of no known format, or calls a global outside
            the allow list.
    """
    refused: dict[GlobalName, None] | None = {} if inspect else None
    with _refusing(path), _without_collection():
        with open_regular(path) as file:
            index = index_in(file)
            if index is None:
                tree, format, dialect = _read(file, Budget(file.seek(0, 2)), refused)
        if index is not None:
            tree, format, dialect = _read_shards(path.parent, index, refused)
    return TorchFile(tree, format, tuple(refused or ()), dialect)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever reading a file raises becomes an error of one line that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: reading it takes more memory than there is") from error
    except Exception as error:  # parsers of other people's have no common error for what is damaged
        what = f"{type(error).__name__}: {shortened(error)}"
        raise CheckpointError(f"{path}: the file is damaged ({what})") from error


def _read_shards(folder: Path, index: bytes, refused: dict[GlobalName, None] | None) -> tuple[Any, Format, Dialect]:
    """What lies in several files together, within the bounds of one file that is as large as all of them."""
    shards = shards_of(index)
    files = located(folder, shards)
    size = len(index)
    for file in files:
        with _refusing(file):
            size += file.stat().st_size
    budget = Budget(size)
    budget.take(HEADER * len(index))
    parts = []
    for file, names in zip(files, shards.values(), strict=True):
        with _refusing(file), open_regular(file) as stream:
            parts.append(_read(stream, budget, refused))
            check_part(parts[-1][0], names)
    trees, formats, dialects = zip(*parts, strict=True)
    if len(set(formats)) > 1:
        raise CheckpointError("the files that the index names are of several formats: refused")
    together = frozenset[GlobalName]().union(*(dialect.names for dialect in dialects))
    return merged(trees), formats[0], replace(dialects[0], names=together)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's collector looks at every container again and again as they become more; none of them is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(file: IO[bytes], budget: Budget, refused: dict[GlobalName, None] | None) -> tuple[Any, Format, Dialect]:
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        archive = Archive(file, budget)
        if archive.names() and all(name.endswith(NPY) for name in archive.names()):
            return _read_npz(archive, budget), "npz", OWN_DIALECT
        tree, dialect = _read_archive(archive, budget, refused)
        return tree, "zip", dialect
    # Before pickles, which begin with a byte that one in 32 lengths begins with too.
    if head[8:9] == b"{" and 0 < struct.unpack("<Q", head[:8])[0] <= min(size - 8, MAX_SAFETENSORS_HEADER):
        refuse_tar(head)
        budget.take(size)
        refuse_pickle(file)
        return _read_safetensors(file, budget), "safetensors", OWN_DIALECT
    if head[:1] == b"\x80" or OLD_PICKLE.match(head):
        refuse_tar(head)
        budget.take(size)
        return _read_pickles(file.read(), budget, refused)
    if is_tar(head):
        budget.take(size)
        tree, dialect = read_tar(file.read(), budget, refused)
        return tree, "legacy", dialect
    if size == 0:
        raise CheckpointError("the file is empty")
    raise CheckpointError(f"this is no PyTorch checkpoint{_known_by_its_head(head)}")


def _known_by_its_head(head: bytes) -> str:
    """What else a file may be, from its first bytes."""
    archives = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"Rar!": "rar", b"7z\xbc\xaf": "7z"}
    for start, name in archives.items():
        if head.startswith(start):
            return f" but a {name} archive; unpack it first"
    if head.startswith(b"\x89HDF"):
        return " but HDF5, as Keras writes it; only PyTorch's models are converted"
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        if b"'|O'" in head:
            return (
                " but a pickled object in an .npy; save np.load(FILE, allow_pickle=True).item() with torch.save instead"
            )
        return " but a single array (.npy); save all of them by their names, with np.savez"
    if head.startswith(b"GGUF"):
        return " but GGUF, whose weights are quantised; save the model's state_dict() with torch.save instead"
    if head.startswith(b"\x08") and any(word in head for word in (b"onnx", b"torch")):
        return " but ONNX, a program; save the model's state_dict() with torch.save instead"
    if head[:1] == b"<" or head.startswith(b"version https:"):
        return " but text, a web page or a Git LFS pointer; download the file itself"
    return " (neither the zip or legacy format of torch.save, nor a pickle, nor safetensors or npz)"


# The zip format: NAME/data.pkl, one entry NAME/data/KEY a storage.


def _read_archive(archive: Archive, budget: Budget, refused: dict[GlobalName, None] | None) -> tuple[Any, Dialect]:
    pickles = [name for name in archive.names() if name.split("/")[-1] == "data.pkl"]
    if any(name.split("/")[-1] in EXPORTED for name in archive.names()):
        raise CheckpointError(
            "this is a torch.export archive (.pt2), a program; save exported.state_dict with torch.save instead"
        )
    if len(pickles) != 1:
        if packed := [
            archive.original(name) for name in archive.names() if name.endswith((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        ]:
            held = quoted(packed[0]) + and_more(packed, 1)
            raise CheckpointError(f"this is a zip archive that holds {held}; unpack it first")
        raise CheckpointError(
            "this zip archive was not written by torch.save (it has no single data.pkl); arrays of images (.npz) "
            "belong behind --dataset"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = bytes(archive.read(f"{root}byteorder")) if f"{root}byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise damaged("its byte order is neither little nor big")
    storages: dict[str, Storage] = {}

    def load_storage(persistent_id: Any) -> Storage:
        dtype, key, size, _ = _storage_description(persistent_id)
        if key not in storages:
            budget.take(STORAGE)
            storage = Storage(dtype, size, byteorder=">" if order == b"big" else "<")
            name = f"{root}data/{key}"
            if archive.size(name) < storage.nbytes:
                raise CheckpointError(f"storage {key!r} is declared larger than what the archive holds; refused")
            storage.buffer = archive.read(name)
            storages[key] = storage
        _check_same(storages[key], dtype, size, key)
        return storages[key]

    budget.require(TEXT * archive.size(pickles[0]))
    content = bytes(archive.read(pickles[0]))
    tree, dialect = unpickle_with_dialect(io.BytesIO(content), budget, load_storage, refused=refused)
    return tree, replace(dialect, script=_script(archive, root)) if f"{root}constants.pkl" in archive else dialect


def _read_npz(archive: Archive, budget: Budget) -> dict[str, Any]:
    """The arrays of numpy.savez by their names."""
    tensors = dict[str, Any]()
    for member in archive.names():
        name, content = archive.original(member)[: -len(NPY)], archive.read(member)
        try:
            array = array_of(io.BytesIO(content), len(content))
        except ValueError as error:
            raise CheckpointError(f"the array {quoted(name)} is damaged: {shortened(error)}") from error
        budget.take(array.nbytes)
        tensors[name] = TorchTensor.from_numpy(array) if array.dtype.kind in "fiub" else array
    return checked_tree(tensors, budget)


def _script(archive: Archive, root: str) -> dict[str, bytes]:
    """The members of a TorchScript archive beside its pickle and its storages, by their names below its root."""
    members = {}
    for name in archive.names():
        own, lower = archive.original(name)[len(root) :], name[len(root) :]
        if lower.startswith("data/") or lower in ("data.pkl", "byteorder"):  # PyTorch finds them in any case
            continue
        if not name.startswith(root) or not all(part.strip(".") for part in own.split("/")):
            raise CheckpointError(f"the TorchScript archive has a member {quoted(name)}, which PyTorch does not write")
        members[own] = bytes(archive.read(name))
    return members


def _check_same(storage: Storage, dtype: np.dtype, size: int, key: str) -> None:
    if (storage.dtype, storage.size) != (dtype, size):
        raise CheckpointError(f"storage {key!r} is declared twice with different types; the file is damaged")


def _storage_description(persistent_id: Any) -> tuple[Any, str, int, Any]:
    """dtype, key, size in elements and view of `('storage', type, key, location, size[, view])`.

    The location (`cuda:0`) is dropped: everything is read into the host's memory.
    """
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[:1] != ("storage",):
        raise CheckpointError("the pickle refers to something that is no storage; the file is damaged")
    _, kind, key, _, size, *view = persistent_id
    if isinstance(kind, GlobalName) and kind.module == "torch" and kind.name in QUANTISED:
        raise CheckpointError("the file holds quantised tensors; save the model's state_dict() before it is quantised")
    known = isinstance(kind, GlobalName) and kind.name in STORAGE_DTYPES
    # Text of Python 2 beyond ASCII is read in one encoding here, and in another there.
    named = isinstance(key, str) and len(key) <= MAX_KEY and key.isascii()
    if not known or not named or type(size) is not int or not 0 <= size < 2**60:
        raise CheckpointError("a storage is described in a way PyTorch does not write; the file is damaged")
    return STORAGE_DTYPES[kind.name], key, size, view[0] if view else None


# The legacy format: pickles of a magic number, a protocol, system facts, the object and the storages' keys, then the
# storages, each behind its number of elements. A file of pickle.dump has one pickle, and in it, for each tensor, its
# storage in the legacy format.


def _read_pickles(
    content: bytes, budget: Budget, refused: dict[GlobalName, None] | None
) -> tuple[Any, Format, Dialect]:
    def load_nested(nested: Any) -> Storage:
        budget.take(2 * STORAGE)
        file = io.BytesIO(nested if isinstance(nested, bytes) else b"")
        is_legacy = isinstance(nested, bytes) and _is_number(unpickle(file, budget), LEGACY_MAGIC)
        storage = _read_legacy(nested, file, budget, None)[0] if is_legacy else None
        if not isinstance(storage, Storage):
            raise CheckpointError("a tensor's storage is pickled in a way PyTorch does not write; the file is damaged")
        return storage

    file = io.BytesIO(content)
    first, dialect = unpickle_with_dialect(file, budget, load_nested=load_nested, refused=refused)
    if _is_number(first, LEGACY_MAGIC):
        tree, dialect = _read_legacy(content, file, budget, refused)
        return tree, "legacy", dialect
    return first, "pickle", dialect


def _is_number(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _read_legacy(
    content: bytes, file: io.BytesIO, budget: Budget, refused: dict[GlobalName, None] | None
) -> tuple[Any, Dialect]:
    """What follows the magic number in `content`, of which `file` is at the end of that."""
    if not _is_number(unpickle(file, budget), LEGACY_PROTOCOL):
        raise CheckpointError("the legacy format has an unknown protocol number; the file is damaged")
    unpickle(file, budget)  # facts of the system, among them a byte order: whatever it is, the storages' is little
    storages: dict[str, Storage] = {}

    def load_persistent(persistent_id: Any) -> Storage | ModuleClass:
        if isinstance(persistent_id, tuple) and persistent_id[:1] == ("module",):
            return ModuleClass.of(persistent_id[1:])
        dtype, key, size, view = _storage_description(persistent_id)
        if view is not None:
            raise CheckpointError(
                "the file uses storage views, as only PyTorch before 0.4 did; save it again with a newer one"
            )
        if key not in storages:
            budget.take(STORAGE)
            storages[key] = Storage(dtype, size)
        _check_same(storages[key], dtype, size, key)
        if storages[key].nbytes > len(content):
            raise CheckpointError(f"storage {key!r} is declared larger than the file; refused")
        return storages[key]

    tree, dialect = unpickle_with_dialect(file, budget, load_persistent, refused=refused)
    _fill_storages(content, file, unpickle(file, budget), storages)
    return tree, dialect


def _fill_storages(content: bytes, file: io.BytesIO, keys: Any, storages: dict[str, Storage]) -> None:
    # Only text is compared: what else a hostile file puts here may be exponentially large when written out.
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or len(keys) != len(storages) or set(keys) != set(storages):
        raise CheckpointError("the list of storages does not fit the tensors; the file is damaged")
    whole, place = memoryview(content), file.tell()
    for key in keys:
        storage = storages[key]
        header = content[place : place + 8]
        if len(header) != 8 or struct.unpack("<q", header)[0] != storage.size:
            raise CheckpointError(f"storage {key!r} is damaged or truncated")
        storage.buffer = whole[place + 8 : place + 8 + storage.nbytes]  # not a copy
        if len(storage.buffer) != storage.nbytes:
            raise CheckpointError(f"storage {key!r} is truncated")
        place += 8 + storage.nbytes


# safetensors: the library checks the file and cuts it up; which dtypes there are in NumPy is known here.


def _read_safetensors(file: IO[bytes], budget: Budget) -> Any:
    import safetensors

    length = struct.unpack("<Q", file.read(8))[0]
    budget.take(HEADER * length)
    names, metadata = _safetensors_header(file.read(length))
    size = file.seek(0, 2)
    budget.take(2 * size)
    file.seek(0)
    try:
        tensors = safetensors.deserialize(file.read())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"the safetensors file is damaged ({shortened(error)})") from error
    order = {name: place for place, name in enumerate(names)}  # the library has one of its own, another at each call
    tensors.sort(key=lambda pair: order[pair[0]])
    named = OrderedDict((name, _safetensors_tensor(name, tensor)) for name, tensor in tensors)
    return checked_tree({"state_dict": named, "metadata": metadata} if metadata else named, budget)


def _safetensors_header(header: bytes) -> tuple[list[str], Mapping[str, str] | None]:
    """Reads the tensors' names in the file's order, and what it says of itself, which the library does not give."""
    try:
        entries = json.loads(header.decode("utf-8"))  # bytes alone could be UTF-16
        metadata = entries.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the safetensors file is damaged ({shortened(error)})") from error
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return list(entries), metadata if plain and metadata else None


def _safetensors_tensor(name: str, tensor: Mapping[str, Any]) -> TorchTensor:
    if tensor["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"the tensor {quoted(name)} has the dtype {tensor['dtype']}, which is not supported; "
            "save it again as float32, float16 or bfloat16"
        )
    dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
    array = np.frombuffer(tensor["data"], dtype) if tensor["data"] else np.zeros(0, dtype)
    return TorchTensor.from_numpy(array.reshape(tensor["shape"]))
