"""Writes PyTorch files without torch: both formats of torch.save, that of pickle.dump, and safetensors."""

import _compat_pickle
import io
import itertools
import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from ibau_jax.checkpoints.allowed import NESTED_STORAGE
from ibau_jax.checkpoints.reader import LEGACY_MAGIC, LEGACY_PROTOCOL, Format
from ibau_jax.checkpoints.values import (
    OWN_DIALECT,
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Dialect,
    GlobalName,
    ModuleClass,
    Record,
    Storage,
    TorchTensor,
    TorchValue,
    contiguous_strides,
)
from ibau_jax.errors import CheckpointError, shortened

ALIGNMENT = 64  # of each storage in the archive, as torch aligns them, so that it can map the file
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_SYSTEM = {
    "protocol_version": LEGACY_PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def write_torch_file(tree: Any, path: Path, format: Format = "zip", dialect: Dialect = OWN_DIALECT) -> None:
    """Writes `tree` as `torch.save(tree, path)` or pickle.dump would, each tensor with a storage of its own.

    Args:
        tree: plain data as `read_torch_file` gives it: containers, scalars, NumPy arrays, `TorchTensor`s.
        path: the file; what was there is replaced.
        format: `legacy` as PyTorch before 1.6 writes it, `pickle` as pickle.dump does; else the zip format.
        dialect: how to spell what NumPy and Python call differently from version to version.

    Raises:
        CheckpointError: the tree holds something that a checkpoint can't.
    """
    try:
        write = {"legacy": _write_legacy, "pickle": _write_pickle}.get(format, _write_zip)
        if dialect.protocol == 0 and write is not _write_pickle:
            dialect = replace(dialect, protocol=2)  # torch.load can't read what torch.save writes in protocol 0
        with open(path, "wb") as file:
            write(tree, file, dialect)
    except (OSError, CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever an object's own way of being pickled raises
        raise CheckpointError(f"can't write {path}: {shortened(error)}") from error


def _write_zip(tree: Any, file: IO[bytes], dialect: Dialect) -> None:
    pickled = io.BytesIO()
    pickler = _TorchPickler(pickled, dialect, _in_archive)
    pickler.dump(tree)
    members = {"version": b"3\n"} if dialect.script is None else dialect.script
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), pickled.getvalue())
        archive.writestr(_entry("byteorder"), b"little")
        for index, array in enumerate(pickler.storages):
            archive.writestr(_aligned_entry(archive, f"data/{index}"), _little_endian_bytes(array))
        for name, content in members.items():
            archive.writestr(_entry(name), content)


def _write_legacy(tree: Any, file: IO[bytes], dialect: Dialect) -> None:
    for value in (LEGACY_MAGIC, LEGACY_PROTOCOL, _SYSTEM):
        pickle.dump(value, file, protocol=dialect.protocol)
    pickler = _TorchPickler(file, dialect, _in_legacy_file)
    pickler.dump(tree)
    pickle.dump([str(index) for index in range(len(pickler.storages))], file, protocol=dialect.protocol)
    for array in pickler.storages:
        file.write(struct.pack("<q", _storage(array)[1]))
        file.write(_little_endian_bytes(array))


def _write_pickle(tree: Any, file: IO[bytes], dialect: Dialect) -> None:
    _TorchPickler(file, dialect, None).dump(tree)


def _in_archive(index: int, array: np.ndarray) -> tuple[Any, ...]:
    """How a pickle in an archive refers to a storage."""
    kind, size = _storage(array)
    return ("storage", kind, str(index), "cpu", size)


def _in_legacy_file(index: int, array: np.ndarray) -> tuple[Any, ...]:
    """How a pickle in a legacy file does; the None is a view of the storage, as PyTorch before 0.4 had them."""
    return (*_in_archive(index, array), None)


def _storage(array: np.ndarray) -> tuple[GlobalName, int]:
    """The class of an array's storage and its number of elements."""
    name = _STORAGE_NAMES.get(array.dtype)
    if name is None:
        return GlobalName("torch.storage", "UntypedStorage"), array.nbytes
    return GlobalName("torch", name), array.size


def write_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None, path: Path) -> None:
    """Writes named tensors as a safetensors file, with its header's metadata (for example `{"format": "pt"}`).

    Raises:
        OSError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"can't write {path}: {error}") from error


def write_npz(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes named arrays as numpy.savez does, in their order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # of 1980: the same content gives the same file


def _aligned_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """An entry whose data begins at a multiple of ALIGNMENT, by an extra field that readers skip."""
    entry = _entry(name)
    assert archive.fp is not None
    header = archive.fp.tell() + 30 + len(entry.filename) + 4
    padding = -header % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return entry


def _little_endian_bytes(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


@dataclass(frozen=True, eq=False)
class _StorageOf:
    """Stands for an array's storage while its tensor is pickled."""

    array: np.ndarray


_PICKLE: Any = pickle  # whose Python side has no types
_PythonPickler: Any = _PICKLE._Pickler
_REBUILD = {
    name: GlobalName("torch._utils", f"_rebuild_{name}")
    for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
}
_REBUILD_FROM_TYPE = GlobalName("torch._tensor", "_rebuild_from_type_v2")


class _TorchPickler(_PythonPickler):
    """Names torch's functions without importing them, which the C pickler can't: it verifies each global.

    `refer` makes a storage's persistent id of its number and array; without one, storages are pickled in the tree.
    """

    dispatch: ClassVar = dict(_PythonPickler.dispatch)

    def __init__(self, file: IO[bytes], dialect: Dialect, refer: Any) -> None:
        super().__init__(file, protocol=dialect.protocol)
        self.dialect = dialect
        self.refer = refer
        self.storages: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, ModuleClass) and self.refer is _in_legacy_file:
            return ("module", obj.name, obj.file, obj.source)
        if not isinstance(obj, _StorageOf) or self.refer is None:
            return None
        self.storages.append(obj.array)
        return self.refer(len(self.storages) - 1, obj.array)

    def save_storage(self, obj: _StorageOf) -> None:
        nested = io.BytesIO()
        _write_legacy(obj, nested, OWN_DIALECT)
        self.save_call(TorchValue(NESTED_STORAGE, (nested.getvalue(),)))

    def save_bare_storage(self, obj: Storage) -> None:
        """A storage that no tensor is made of."""
        self.save(_StorageOf(TorchTensor(obj, obj.dtype, 0, (obj.size,), (1,)).numpy()))

    def save_name(self, obj: GlobalName) -> None:
        if not obj.is_plain():  # what is written is read as lines, and could be opcodes
            raise CheckpointError(f"{shortened(obj)} is no name of a global; the file is damaged")
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        name = name or obj.__qualname__
        spelled = self.spelled(_PICKLE.whichmodule(obj, name), name)
        self.write(pickle.GLOBAL + f"{spelled.module}\n{spelled.name}\n".encode())
        self.memoize(obj)

    def spelled(self, module: str, name: str) -> GlobalName:
        """A global as the file calls it; where the file does not name it, as Python would."""
        for known in _spellings(module, name):
            if known in self.dialect.names:
                return known
        if self.proto < 3:
            module, name = _compat_pickle.REVERSE_NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.REVERSE_IMPORT_MAPPING.get(module, module)
        return GlobalName(module, name)

    def save_bytes(self, obj: bytes) -> None:
        if self.proto >= 3 or self.dialect.bytes_as == "call":
            super().save_bytes(obj)
            return
        opcode = pickle.BINBYTES if self.dialect.bytes_as == "bytes" else pickle.BINSTRING
        self.write(opcode + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    def save_array(self, obj: np.ndarray) -> None:
        """NumPy has a second way for protocol 5, which a file need not have taken."""
        names = self.dialect.names
        old = any(known in names for known in _spellings("numpy._core.multiarray", "_reconstruct"))
        new = any(known in names for known in _spellings("numpy._core.numeric", "_frombuffer"))
        self.save_reduce(*(obj.__reduce__() if old and not new else obj.__reduce_ex__(self.proto)), obj=obj)

    def save_buffer(self, obj: pickle.PickleBuffer) -> None:
        """A NumPy array's content; Python's own way fails for a second empty one, which is the same object."""
        with obj.raw() as content:
            self.save(content.tobytes() if content.readonly else bytearray(content))

    def save_call(self, obj: TorchValue) -> None:
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    def save_module_class(self, obj: ModuleClass) -> None:
        self.save(obj.name)

    def save_record(self, obj: Record) -> None:
        if self.proto < 2 and not obj.is_called and not obj.args:  # protocols 0 and 1 make objects by a call
            self.save(self.spelled("copyreg", "_reconstructor"))
            self.save((obj.kind, self.spelled("builtins", "object"), None))
            self.write(pickle.REDUCE)
        else:
            self.save(obj.kind)
            self.save(obj.args)
            self.write(pickle.REDUCE if obj.is_called else pickle.NEWOBJ)
        if self.dialect.script is None:
            self.memoize(obj)
        for content, opcode in ((obj.items, pickle.APPENDS), (obj.entries, pickle.SETITEMS)):
            if content:
                self.write(pickle.MARK)
                for item in itertools.chain(*content.items()) if isinstance(content, dict) else content:
                    self.save(item)
                self.write(opcode)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)
        if self.dialect.script is not None:  # TorchScript's reader makes an object of its state
            self.memoize(obj)

    def save_tensor(self, obj: TorchTensor) -> None:
        if obj.is_array:
            self.save(obj.numpy().copy())
            self.memoize(obj)
            return
        call = self.rebuilt(obj.numpy(), obj.requires_grad)
        if obj.is_parameter:
            args: tuple[Any, ...] = (call, obj.requires_grad, OrderedDict())
            with_state = obj.attributes is not None and obj.kind is None
            call = TorchValue(
                _REBUILD["parameter_with_state" if with_state else "parameter"],
                (*args, obj.attributes) if with_state else args,
            )
        if obj.kind is not None:
            call = TorchValue(_REBUILD_FROM_TYPE, (call.function, obj.kind, call.args, obj.attributes))
        self.save_call(call)
        self.memoize(obj)

    def rebuilt(self, array: np.ndarray, requires_grad: bool) -> TorchValue:
        """The call by which torch rebuilds a contiguous tensor; the empty OrderedDict is its backward hooks."""
        place = (_StorageOf(array), 0, array.shape, contiguous_strides(array.shape))
        hooks: Any = OrderedDict()
        if array.dtype not in _STORAGE_NAMES:
            dtype = GlobalName("torch", _DTYPE_NAMES[array.dtype])
            return TorchValue(_REBUILD["tensor_v3"], (*place, requires_grad, hooks, dtype))
        if _REBUILD["tensor"] in self.dialect.names and _REBUILD["tensor_v2"] not in self.dialect.names:
            return TorchValue(_REBUILD["tensor"], place)  # as PyTorch before 0.4 has it
        return TorchValue(_REBUILD["tensor_v2"], (*place, requires_grad, hooks))

    dispatch[bytes] = save_bytes
    dispatch[np.ndarray] = save_array
    dispatch[pickle.PickleBuffer] = save_buffer
    dispatch[types.FunctionType] = save_global
    dispatch[GlobalName] = save_name
    dispatch[_StorageOf] = save_storage
    dispatch[Storage] = save_bare_storage
    dispatch[TorchValue] = save_call
    dispatch[ModuleClass] = save_module_class
    dispatch[Record] = save_record
    dispatch[TorchTensor] = save_tensor


def _spellings(module: str, name: str) -> Iterable[GlobalName]:
    """What a global may be called in a file, the oldest first: all of them are read by whoever reads the newest."""
    if module.startswith("numpy._core."):
        yield GlobalName(module.replace("_core", "core", 1), name)
    if module == "builtins":
        yield GlobalName("__builtin__", {"int": "long", "str": "unicode"}.get(name, name))
        yield GlobalName("__builtin__", name)
    yield GlobalName(module, name)
