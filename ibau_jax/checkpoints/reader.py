"""Reads PyTorch files without torch and without executing anything: zip and legacy format, pickle, safetensors."""

import io
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.unpickle import unpickle
from ibau_jax.checkpoints.values import STORAGE_DTYPES, GlobalName, Storage, TorchTensor
from ibau_jax.errors import CheckpointError

Format = Literal["zip", "legacy", "pickle", "safetensors"]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_SAFETENSORS_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TorchFile:
    """What a file holds: a tree of plain data and `TorchTensor`s, and the format it was in.

    `refused` are the globals outside the allow list, where the file was only inspected: it must not be converted then.
    """

    tree: Any
    format: Format
    refused: tuple[GlobalName, ...] = ()


def read_torch_file(path: Path, *, inspect: bool = False) -> TorchFile:
    """Reads a file of torch.save (zip or pre-1.6 format), of pickle.dump, or of safetensors; its content tells which.

    Args:
        path: the file.
        inspect: note globals outside the allow list instead of refusing the file. Nothing is executed either way.

    Raises:
        CheckpointError: the file is missing, damaged, of no known format, or holds a global outside the allow list.
    """
    refused: dict[GlobalName, None] | None = {} if inspect else None
    try:
        with open(path, "rb") as file:
            tree, format = _read(file, path, refused)
        return TorchFile(tree, format, tuple(refused or ()))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(file: IO[bytes], path: Path, refused: dict[GlobalName, None] | None) -> tuple[Any, Format]:
    head = file.read(16)
    size = file.seek(0, 2)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file, Budget(size), refused), "zip"
    if head[:1] == b"\x80":
        return _read_pickles(file, Budget(size), size, refused)
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_SAFETENSORS_HEADER:
        return _read_safetensors(path), "safetensors"
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
    if head[:1] == b"<" or head.startswith(b"version https:"):
        return " but text, a web page or a Git LFS pointer; download the file itself"
    return " (neither the zip or legacy format of torch.save, nor a pickle of protocol 2 or later, nor safetensors)"


# The zip format: NAME/data.pkl, one entry NAME/data/KEY a storage.


def _read_zip(file: IO[bytes], budget: Budget, refused: dict[GlobalName, None] | None) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, budget, refused)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"the zip archive is damaged or truncated ({str(error)[:120]})") from error


def _read_archive(archive: zipfile.ZipFile, budget: Budget, refused: dict[GlobalName, None] | None) -> Any:
    names = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.split("/")[-1] == "constants.pkl" for name in names):
        raise CheckpointError("this is a TorchScript archive; save the model's state_dict() with torch.save instead")
    if len(pickles) != 1:
        raise CheckpointError("this zip archive was not written by torch.save (it has no single data.pkl)")
    root = pickles[0].removesuffix("data.pkl")

    def entry_bytes(name: str) -> bytes:
        if name not in names:
            raise CheckpointError(f"the archive lacks {name!r}; the file is damaged")
        budget.take(names[name].file_size)
        return archive.read(names[name])

    order = entry_bytes(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
    storages: dict[str, Storage] = {}

    def load_storage(persistent_id: Any) -> Storage:
        dtype, key, size, _ = _storage_description(persistent_id)
        if key not in storages:
            storage = Storage(dtype, size, byteorder=">" if order == b"big" else "<")
            name = f"{root}data/{key}"
            if name in names and names[name].file_size < storage.nbytes:
                raise CheckpointError(f"storage {key[:40]!r} is declared larger than what the archive holds; refused")
            storage.buffer = entry_bytes(name)
            storages[key] = storage
        if (storages[key].dtype, storages[key].size) != (dtype, size):
            raise CheckpointError(f"storage {key[:40]!r} is declared twice with different types; the file is damaged")
        return storages[key]

    return unpickle(io.BytesIO(entry_bytes(pickles[0])), budget, load_storage, refused=refused)


def _storage_description(persistent_id: Any) -> tuple[Any, str, int, Any]:
    """dtype, key, size in elements and view of `('storage', type, key, location, size[, view])`.

    The location (`cuda:0`) is dropped: everything is read into the host's memory.
    """
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise CheckpointError("the pickle refers to something that is no storage; the file is damaged")
    _, kind, key, _, size, *view = persistent_id
    known = isinstance(kind, GlobalName) and kind.name in STORAGE_DTYPES
    if not known or not isinstance(key, str) or type(size) is not int or not 0 <= size < 2**60:
        raise CheckpointError("a storage is described in a way PyTorch does not write; the file is damaged")
    return STORAGE_DTYPES[kind.name], key, size, view[0] if view else None


# The legacy format: pickles of a magic number, a protocol, system facts, the object and the storages' keys, then the
# storages, each behind its number of elements. A file of pickle.dump has one pickle, and in it, for each tensor, its
# storage in the legacy format.


def _read_pickles(
    file: IO[bytes], budget: Budget, file_size: int, refused: dict[GlobalName, None] | None
) -> tuple[Any, Format]:
    def load_nested(content: Any) -> Storage:
        size = len(content) if isinstance(content, bytes) else 0
        nested = io.BytesIO(content if isinstance(content, bytes) else b"")
        is_legacy = size and unpickle(nested, budget) == LEGACY_MAGIC
        storage = _read_legacy(nested, budget, size, None) if is_legacy else None
        if not isinstance(storage, Storage):
            raise CheckpointError("a tensor's storage is pickled in a way PyTorch does not write; the file is damaged")
        return storage

    first = unpickle(file, budget, load_nested=load_nested, refused=refused)
    if type(first) is int and first == LEGACY_MAGIC:
        return _read_legacy(file, budget, file_size, refused), "legacy"
    return first, "pickle"


def _read_legacy(file: IO[bytes], budget: Budget, file_size: int, refused: dict[GlobalName, None] | None) -> Any:
    """What follows the magic number."""
    if unpickle(file, budget) != LEGACY_PROTOCOL:
        raise CheckpointError("the legacy format has an unknown protocol number; the file is damaged")
    system = unpickle(file, budget)
    byteorder = ">" if isinstance(system, dict) and system.get("little_endian") is False else "<"
    storages: dict[str, Storage] = {}

    def load_storage(persistent_id: Any) -> Storage:
        dtype, key, size, view = _storage_description(persistent_id)
        if view is not None:
            raise CheckpointError(
                "the file uses storage views, as only PyTorch before 0.4 did; save it again with a newer one"
            )
        storage = storages.setdefault(key, Storage(dtype, size, byteorder=byteorder))
        if (storage.dtype, storage.size) != (dtype, size):
            raise CheckpointError(f"storage {key[:40]!r} is declared twice with different types; the file is damaged")
        if storage.nbytes > file_size:
            raise CheckpointError(f"storage {key[:40]!r} is declared larger than the file; refused")
        return storage

    tree = unpickle(file, budget, load_storage, refused=refused)
    _fill_storages(file, unpickle(file, budget), storages, budget, byteorder)
    return tree


def _fill_storages(file: IO[bytes], keys: Any, storages: dict[str, Storage], budget: Budget, byteorder: str) -> None:
    # Only text is compared: what else a hostile file puts here may be exponentially large when written out.
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or len(keys) != len(storages) or set(keys) != set(storages):
        raise CheckpointError("the list of storages does not fit the tensors; the file is damaged")
    for key in keys:
        storage = storages[key]
        header = file.read(8)
        if len(header) != 8 or struct.unpack(f"{byteorder}q", header)[0] != storage.size:
            raise CheckpointError(f"storage {key[:40]!r} is damaged or truncated")
        budget.take(storage.nbytes)
        storage.buffer = file.read(storage.nbytes)
        if len(storage.buffer) != storage.nbytes:
            raise CheckpointError(f"storage {key[:40]!r} is truncated")


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = OrderedDict((name, TorchTensor.from_numpy(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118
            metadata = file.metadata()
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the safetensors file is damaged ({str(error)[:120]})") from error
    return {"state_dict": tensors, "metadata": metadata} if metadata else tensors
