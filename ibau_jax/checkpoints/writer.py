"""Writes PyTorch files without torch: the zip format of torch.save, and safetensors."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ibau_jax.checkpoints.values import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    GlobalName,
    TorchTensor,
    TorchValue,
    contiguous_strides,
)
from ibau_jax.errors import CheckpointError

ALIGNMENT = 64  # of each storage in the archive, as torch aligns them, so that it can map the file
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def write_torch_file(tree: Any, path: Path) -> None:
    """Writes `tree` as `torch.save(tree, path)` would, each tensor with a storage of its own.

    Args:
        tree: plain data as `read_torch_file` gives it: containers, scalars, NumPy arrays, `TorchTensor`s.
        path: the file; what was there is replaced.

    Raises:
        CheckpointError: the tree holds something that a checkpoint can't.
    """
    pickled = io.BytesIO()
    pickler = _TorchPickler(pickled, protocol=2)
    try:
        pickler.dump(tree)
    except (pickle.PicklingError, TypeError, RecursionError) as error:
        raise CheckpointError(f"can't write {path}: {error}") from error
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), pickled.getvalue())
        archive.writestr(_entry("byteorder"), b"little")
        for index, array in enumerate(pickler.storages):
            archive.writestr(_aligned_entry(archive, f"data/{index}"), _little_endian_bytes(array))
        archive.writestr(_entry("version"), b"3\n")


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


_PythonPickler: Any = pickle._Pickler


class _TorchPickler(_PythonPickler):
    """Names torch's functions without importing them, which the C pickler can't: it verifies each global."""

    dispatch: ClassVar = dict(_PythonPickler.dispatch)

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageOf):
            return None
        self.storages.append(obj.array)
        name = _STORAGE_NAMES.get(obj.array.dtype, "UntypedStorage")
        size = obj.array.nbytes if name == "UntypedStorage" else obj.array.size
        module = "torch.storage" if name == "UntypedStorage" else "torch"
        return ("storage", GlobalName(module, name), str(len(self.storages) - 1), "cpu", size)

    def save_name(self, obj: GlobalName) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_call(self, obj: TorchValue) -> None:
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    def save_tensor(self, obj: TorchTensor) -> None:
        call = _rebuild_call(obj.numpy(), obj.requires_grad)
        if obj.is_parameter:
            parameter = GlobalName("torch._utils", "_rebuild_parameter")
            call = TorchValue(parameter, (call, obj.requires_grad, OrderedDict()))
        self.save_call(call)
        self.memoize(obj)

    dispatch[GlobalName] = save_name
    dispatch[TorchValue] = save_call
    dispatch[TorchTensor] = save_tensor


def _rebuild_call(array: np.ndarray, requires_grad: bool) -> TorchValue:
    """The call by which torch rebuilds a contiguous tensor; the empty OrderedDict is its backward hooks."""
    args: tuple[Any, ...] = (
        _StorageOf(array),
        0,
        array.shape,
        contiguous_strides(array.shape),
        requires_grad,
        OrderedDict(),
    )
    if array.dtype in _STORAGE_NAMES:
        return TorchValue(GlobalName("torch._utils", "_rebuild_tensor_v2"), args)
    dtype = GlobalName("torch", _DTYPE_NAMES[array.dtype])
    return TorchValue(GlobalName("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))
