"""What a PyTorch file holds, as plain data: tensors over storages, and names of globals that nobody imports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ibau_jax.errors import CheckpointError

STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "UntypedStorage": np.dtype(np.uint8),
}

TORCH_DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")},
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64", "bool", "complex128", "complex64")},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    },
}


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True, slots=True)
class GlobalName:
    """The name of a global in a pickle. It is a name: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def is_plain(self) -> bool:
        """Whether it is as Python writes names; any other text could be more than a name where it is written."""
        return str(self).isascii() and all(part.isidentifier() for part in (*self.module.split("."), self.name))


@dataclass(frozen=True, slots=True)
class TorchValue:
    """A call in a pickle that stays undone: `torch.Size`, `pathlib.PosixPath`."""

    function: GlobalName
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ModuleClass:
    """A class of `torch.nn.Module`s as the legacy format has it, with its source code. It is a text: nothing is run."""

    name: GlobalName
    file: str | None = field(repr=False)
    source: str | None = field(repr=False)

    @classmethod
    def of(cls, description: tuple[Any, ...]) -> "ModuleClass":
        """The class that a file describes by its name, its source's file and its source.

        Raises:
            CheckpointError: they are something else.
        """
        if len(description) != 3 or not isinstance(description[0], GlobalName):
            raise CheckpointError("a module's class is described in a way PyTorch does not write; the file is damaged")
        if not all(isinstance(text, (str, type(None))) for text in description[1:]):
            raise CheckpointError("a module's source code is no text; the file is damaged")
        return cls(*description)

    def __str__(self) -> str:
        return str(self.name)


@dataclass(eq=False, slots=True)
class Record:
    """An object of a class that nobody imports: what its pickle says of it, as data.

    Attributes:
        kind: the class, or a function that is known to make nothing but an object.
        args: of the call that makes it.
        is_called: whether the pickle calls `kind` itself, or else `kind.__new__`.
        items: what is appended to it, where its class is a list's.
        entries: what is set in it, where its class is a dict's.
        state: its attributes by name, or whatever else its class takes; None where the pickle sets none.
    """

    kind: GlobalName | ModuleClass
    args: tuple[Any, ...] = ()
    is_called: bool = False
    items: list[Any] = field(default_factory=list, repr=False)
    entries: dict[Any, Any] = field(default_factory=dict, repr=False)
    state: Any = field(default=None, repr=False)

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes by name; none where its state is something else."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class Dialect:
    """How a file spells what it holds, so that what is written back loads where the file did.

    Attributes:
        protocol: of pickle, 0 to 5.
        names: every global that the pickle names, in its spelling: NumPy 1 writes `numpy.core.multiarray`, NumPy 2
            `numpy._core.multiarray`, and neither has both for certain.
        bytes_as: how bytes are written before protocol 3: by a `call` of `_codecs.encode`, as Python 3 does, as
            `bytes`, whose opcode is protocol 3's, or as the `text` of Python 2.
        script: of a TorchScript archive, the members beside the pickle and its storages: code that nobody runs here.
    """

    protocol: int = 2
    names: frozenset[GlobalName] = frozenset()
    bytes_as: Literal["call", "bytes", "text"] = "call"
    script: Mapping[str, bytes] | None = field(default=None, repr=False)


OWN_DIALECT = Dialect()  # of a file that this program makes


@dataclass(eq=False, slots=True)
class Storage:
    """A flat, typed buffer that tensors are views of; `buffer` may be filled after the tensors are made."""

    dtype: np.dtype
    size: int
    buffer: bytes | bytearray | memoryview = field(default=b"", repr=False)
    byteorder: str = "<"

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, eq=False, slots=True)
class TorchTensor:
    """A tensor of a PyTorch file: a strided view of a storage.

    `dtype` is the view's (it differs from the storage's for untyped storages). Counts are in elements of `dtype`.
    `is_array` tells that the file has a NumPy array there.
    `kind` is the class of a tensor with attributes of its own, `attributes` what they are; None where it has none.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool = False
    is_parameter: bool = False
    kind: GlobalName | None = None
    attributes: Any = None
    is_array: bool = False

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> "TorchTensor":
        """A tensor with a storage of its own that shares `array`'s memory where its axes are in any order without gaps.

        Transposed weights are so copied one at a time, when they are written.
        """
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        base = np.asarray(array.transpose(order), order="C")
        strides = dict(zip(order, contiguous_strides(base.shape), strict=True))
        storage = Storage(array.dtype, array.size, base.reshape(-1).view(np.uint8).data)
        in_order = tuple(strides[axis] for axis in range(array.ndim))
        return cls(storage, array.dtype, 0, array.shape, in_order)

    def holding(self, array: np.ndarray) -> "TorchTensor":
        """A tensor of the same dtype and kind (parameter, requires_grad, attributes) that holds `array`."""
        new = TorchTensor.from_numpy(array.astype(self.dtype, copy=False))
        return replace(self, storage=new.storage, offset=0, shape=new.shape, strides=new.strides)

    @property
    def nbytes(self) -> int:
        """Bytes that a contiguous copy takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Raises CheckpointError unless every element lies within the storage."""
        if len(self.shape) != len(self.strides) or len(self.shape) > 32:
            raise CheckpointError("a tensor's sizes and strides do not fit together; the file is damaged")
        counts = (self.offset, *self.shape, *self.strides)
        if any(type(count) is not int or not 0 <= count < 2**63 for count in counts):
            raise CheckpointError("a tensor has a negative or non-integer offset, size or stride; the file is damaged")
        if math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize >= 2**62:
            raise CheckpointError("a tensor has more elements than any memory holds; the file is damaged")
        if 0 in self.shape:
            return
        if (self.offset + self._reach()) * self.dtype.itemsize > self.storage.nbytes:
            raise CheckpointError("a tensor reaches beyond the end of its storage; the file is damaged")

    def _reach(self) -> int:
        """How many elements there are from its first to its last, where it has any."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def numpy(self) -> np.ndarray:
        """The tensor as a read-only array of its shape and dtype, without a copy where the byte order allows it."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        item = self.dtype.itemsize
        buffer = memoryview(self.storage.buffer)[self.offset * item : (self.offset + self._reach()) * item]
        # PyTorch swaps the bytes of the storage's elements, whose type an untyped one does not know.
        is_swapped = self.storage.byteorder == ">" and self.storage.dtype.itemsize > 1
        data: Any = np.frombuffer(buffer, self.dtype).byteswap() if is_swapped else buffer
        array: np.ndarray = np.ndarray(self.shape, self.dtype, data, 0, tuple(stride * item for stride in self.strides))
        array.flags.writeable = False
        return array
