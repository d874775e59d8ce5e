"""The allow list: every global that a checkpoint's pickle may name, and what each call means.

The calls are ours. Nothing is looked up in the named modules, so a name can't reach code that we did not write here.
"""

import math
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from ibau_jax.checkpoints.values import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    GlobalName,
    Record,
    Storage,
    TorchTensor,
    TorchValue,
)
from ibau_jax.errors import CheckpointError, quoted, shortened

BUILTIN_MODULES = ("builtins", "__builtin__")
NUMPY_CORES = ("numpy.core", "numpy._core")
FACTORIES = {
    **{"list": list, "dict": dict, "int": int, "float": float, "set": set, "str": str, "bool": bool, "tuple": tuple},
    **{"bytes": bytes, "complex": complex, "frozenset": frozenset, "bytearray": bytearray},
    **{"long": int, "unicode": str},  # as Python 3 calls int and str where Python 2 shall read it too
}
NUMPY_KINDS = "biufcSU"
NUMPY_NAME = re.compile(r"[<>|=]?[A-Za-z?][A-Za-z0-9_]{0,15}")
# A tensor is hashed as an object; the state of a whole optimiser has its parameters for keys.
KEY_TYPES = (str, bytes, int, float, type(None), np.integer, np.floating, np.bool_, TorchTensor, GlobalName)
MAX_KEY_LENGTH, MAX_KEY_PARTS, MAX_KEY_BITS = 4096, 64, 64

# PyTorch's own attributes of a tensor that can be set.
TENSOR_ATTRIBUTES = frozenset(
    """data real imag grad _grad grad_dtype requires_grad names volatile H T mH mT _base _backward_hooks
    _post_accumulate_grad_hooks _python_dispatch _cdata _version""".split()  # noqa: SIM905
)


def checked_key(key: Any) -> Any:
    """`key` if it may be a dict's key or a set's item: a scalar, or a tuple of scalars; else CheckpointError.

    A deeply nested tuple would overflow the C stack when it is hashed. Integers of more than 64 bits, and complex and
    extended numbers, are easily made to collide, and checkpoints do not have them for keys.
    """
    if isinstance(key, (str, bytes)) and len(key) > MAX_KEY_LENGTH:
        raise CheckpointError(f"a dict's key or a set's item has {len(key):,} characters: {quoted(key)}: refused")
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > MAX_KEY_PARTS or not all(_is_plain_key(part) for part in parts):
        raise CheckpointError(
            "a dict's key or a set's item is neither a scalar nor a tuple of scalars, or is very large: refused"
        )
    return key


def _is_plain_key(key: Any) -> bool:
    if not isinstance(key, KEY_TYPES) or isinstance(key, np.longdouble):
        return False
    if isinstance(key, (str, bytes)):
        return len(key) <= MAX_KEY_LENGTH
    return not isinstance(key, int) or key.bit_length() <= MAX_KEY_BITS


def _described(value: Any) -> str:
    return shortened(value) if isinstance(value, GlobalName) else f"a {type(value).__name__}"


def _tensor(storage: Any, dtype: np.dtype, offset: Any, size: Any, stride: Any, requires_grad: Any) -> TorchTensor:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("a tensor is described in a way PyTorch does not write; the file is damaged")
    tensor = TorchTensor(storage, dtype, offset, size, stride, requires_grad is True)
    tensor.check()
    return tensor


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> TorchTensor:
    return _rebuild_tensor_v2(storage, offset, size, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, meta: Any = None
) -> TorchTensor:
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor has no storage; the file is damaged")
    _refuse_marks(meta)
    return _tensor(storage, storage.dtype, offset, size, stride, requires_grad)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, meta: Any = None
) -> TorchTensor:
    if not isinstance(dtype, GlobalName) or dtype.module != "torch" or dtype.name not in TORCH_DTYPES:
        raise CheckpointError(f"a tensor has the unknown dtype {_described(dtype)}; the file is damaged")
    _refuse_marks(meta)
    if isinstance(storage, Storage) and storage.dtype.itemsize not in (1, TORCH_DTYPES[dtype.name].itemsize):
        raise CheckpointError("a tensor has another dtype than its storage, in a way PyTorch does not write: refused")
    return _tensor(storage, TORCH_DTYPES[dtype.name], offset, size, stride, requires_grad)


def _refuse_marks(meta: Any) -> None:
    """Raises CheckpointError where PyTorch reads a tensor's numbers with another sign, or conjugated."""
    if meta:
        raise CheckpointError(
            "a tensor is marked as negated or conjugated beside its numbers; save it resolved: "
            "tensor.resolve_neg().resolve_conj()"
        )


def _rebuild_parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> TorchTensor:
    if not isinstance(data, TorchTensor):
        raise CheckpointError("a parameter is no tensor; the file is damaged")
    t = data
    return TorchTensor(t.storage, t.dtype, t.offset, t.shape, t.strides, requires_grad is True, True)


def _attributes(state: Any) -> Any:
    """What PyTorch sets on a tensor, if that leaves alone what the tensor itself is; else CheckpointError."""
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if state is not None and (not named or any(name in TENSOR_ATTRIBUTES or name[:2] == "__" for name in state)):
        raise CheckpointError("a tensor's attributes are not its user's own, and could replace what it holds: refused")
    return state


def _rebuild_parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> TorchTensor:
    return replace(_rebuild_parameter(data, requires_grad), attributes=_attributes(state))


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> TorchTensor:
    if not isinstance(function, GlobalName) or function.module != "torch._utils":
        raise CheckpointError(f"a tensor subclass is rebuilt by {_described(function)}, which is not allowed")
    if not isinstance(kind, GlobalName):
        raise CheckpointError("a tensor's class has no name; the file is damaged")
    return replace(call(function, args), kind=kind, attributes=_attributes(state))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes are stored in an unknown encoding; the file is damaged")
    return text.encode("latin1")


def _numpy_dtype(name: Any, align: Any = False, copy: Any = True) -> np.dtype:
    if isinstance(name, GlobalName):
        name = name.name
    if not isinstance(name, str) or not NUMPY_NAME.fullmatch(name):
        raise CheckpointError("a NumPy dtype has no plain name; the file is damaged")
    # A copy, since its byte order may be set by the pickle and the original is shared by the whole process.
    return checked_dtype(np.dtype(np.dtype(name), copy=True))


def checked_dtype(dtype: Any) -> np.dtype:
    """`dtype` if it is plain data (no objects, no fields), else CheckpointError."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in NUMPY_KINDS:
        raise CheckpointError("a NumPy array's dtype is not plain data (numbers or text): refused")
    return dtype


def raw_bytes(content: Any) -> Any:
    """An array's bytes; Python 2 wrote them as text. What is no bytes is given back for `checked_shape` to refuse."""
    if isinstance(content, str):
        return content.encode("latin1")
    return bytes(content) if isinstance(content, bytearray) else content


def checked_shape(shape: Any, dtype: np.dtype, raw: Any) -> tuple[int, ...]:
    """`shape` if `raw` holds exactly that many elements of `dtype`, else CheckpointError."""
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError("a NumPy array has an impossible shape; the file is damaged")
    count = math.prod(shape)
    if not isinstance(raw, (bytes, bytearray)) or len(raw) != count * dtype.itemsize or count > max(1, len(raw)):
        raise CheckpointError(
            "a NumPy array's data does not have the size that its shape asks for; the file is damaged"
        )
    return shape


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    dtype, raw = checked_dtype(dtype), raw_bytes(raw)
    checked_shape((), dtype, raw)
    return np.frombuffer(raw, dtype)[0] if dtype.itemsize else dtype.type()


def _numpy_reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    return np.zeros((0,), np.uint8)  # filled by the BUILD that follows


def _numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = checked_dtype(dtype)
    shape = checked_shape(shape, dtype, raw)
    flat = np.frombuffer(raw, dtype) if len(raw) else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if isinstance(order, str) and order == "F" else "C")


def _defaultdict(factory: Any = None) -> defaultdict:
    if factory is None:
        return defaultdict(None)
    if not isinstance(factory, GlobalName) or factory.module not in BUILTIN_MODULES or factory.name not in FACTORIES:
        raise CheckpointError(f"a defaultdict makes its values with {_described(factory)}, which is not allowed")
    return defaultdict(FACTORIES[factory.name])


def _bytearray(raw: Any = b"", encoding: Any = None) -> bytearray:
    if encoding is not None:
        raw = _encode(raw, encoding)
    if not isinstance(raw, bytes):  # a number would ask for that much memory
        raise CheckpointError("a bytearray is built from something that is no bytes; the file is damaged")
    return bytearray(raw)


def _namespace() -> Namespace:
    return Namespace()


def _complex(real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise CheckpointError("a complex number is built from something that is no number; the file is damaged")
    return complex(real, imag)


_PYTHON: dict[GlobalName, Callable[..., Any]] = {
    GlobalName("collections", "defaultdict"): _defaultdict,
    GlobalName("argparse", "Namespace"): _namespace,
    GlobalName("_codecs", "encode"): _encode,
    **{GlobalName(module, "bytearray"): _bytearray for module in BUILTIN_MODULES},
    **{GlobalName(module, "bytes"): lambda: b"" for module in BUILTIN_MODULES},
    **{GlobalName(module, "complex"): _complex for module in BUILTIN_MODULES},
}
_TORCH: dict[GlobalName, Callable[..., Any]] = {
    GlobalName("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    GlobalName("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    GlobalName("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    GlobalName("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    GlobalName("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    GlobalName("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
# Plain values that cargo holds and we need not understand: the call stays undone, and is written back as it was.
_UNDONE = [
    *(GlobalName("torch.jit._pickle", f"build_{kind}list") for kind in ("int", "double", "bool", "tensor")),
    *(GlobalName("torch", name) for name in ("Size", "device")),
    GlobalName("torch.serialization", "_get_layout"),
    *(GlobalName("torch._utils", f"_rebuild_{kind}") for kind in ("sparse_tensor", "meta_tensor_no_storage")),
    *(GlobalName("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(GlobalName("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(GlobalName("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
]
_DTYPE_CLASSES = {
    f"{name}DType": code
    for name, code in {
        **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)},
        **{"Float16": "f2", "Float32": "f4", "Float64": "f8", "LongDouble": "g", "Bool": "?", "Str": "U", "Bytes": "S"},
        **{"Complex64": "c8", "Complex128": "c16", "CLongDouble": "G", "LongLong": "q", "ULongLong": "Q"},
        **{"Byte": "b", "UByte": "B", "Short": "h", "UShort": "H", "Int": "i", "UInt": "I", "Long": "l", "ULong": "L"},
    }.items()
}
_NUMPY: dict[GlobalName, Callable[..., Any]] = {
    GlobalName("numpy", "dtype"): _numpy_dtype,
    **{GlobalName(f"{core}.multiarray", "_reconstruct"): _numpy_reconstruct for core in NUMPY_CORES},
    **{GlobalName(f"{core}.multiarray", "scalar"): _numpy_scalar for core in NUMPY_CORES},
    **{GlobalName(f"{core}.numeric", "_frombuffer"): _numpy_frombuffer for core in NUMPY_CORES},
    **{
        GlobalName("numpy.dtypes", name): lambda *args, code=code: _numpy_dtype(code)
        for name, code in _DTYPE_CLASSES.items()
    },
}
_KEPT = {name: lambda *args, name=name: TorchValue(name, args) for name in _UNDONE}
CALLS: dict[GlobalName, Callable[..., Any]] = {**_PYTHON, **_TORCH, **_NUMPY, **_KEPT}

ENCODE = GlobalName("_codecs", "encode")
# Calls that make a dict or a set of the items of their argument, and what they begin with. A frozenset is made last.
FILLED: dict[GlobalName, Callable[[], Any]] = {
    GlobalName("collections", "OrderedDict"): OrderedDict,
    GlobalName("collections", "Counter"): Counter,
    **{GlobalName(module, name): set for module in BUILTIN_MODULES for name in ("set", "frozenset")},
}

# What `pickle.dump` of a tensor wraps its storage's bytes in; the reader reads them as it reads a file.
NESTED_STORAGE = GlobalName("torch.storage", "_load_from_bytes")

# Named as values, never called.
NAMES: frozenset[GlobalName] = frozenset(
    [NESTED_STORAGE]
    + [GlobalName("torch", name) for name in (*TORCH_DTYPES, *STORAGE_DTYPES, "Tensor", "strided")]
    + [GlobalName("torch.cuda", name) for name in STORAGE_DTYPES]
    + [GlobalName("torch.storage", "UntypedStorage"), GlobalName("torch.nn.parameter", "Parameter")]
    + [GlobalName(module, name) for module in BUILTIN_MODULES for name in FACTORIES]
    + [GlobalName(module, "Ellipsis") for module in BUILTIN_MODULES]
    + [GlobalName("numpy", "ndarray")]
    + [GlobalName("numpy", name) for name in ("float16", "float32", "float64", "int64", "int32", "uint8", "bool_")]
)


RECONSTRUCTORS = tuple(GlobalName(module, "_reconstructor") for module in ("copy_reg", "copyreg"))  # protocols 0 and 1
OBJECTS = frozenset(GlobalName(module, "object") for module in BUILTIN_MODULES)
_RANDOM = "numpy.random._pickle"
# What makes NumPy's generators is given what to call: only its own generators and their makers.
GENERATORS = frozenset(
    [GlobalName(_RANDOM, f"__{kind}_ctor") for kind in ("generator", "bit_generator", "randomstate")]
    + [
        GlobalName(f"numpy.random.{module}", "__pyx_unpickle_SeedSequence")
        for module in ("bit_generator", "_bit_generator")
    ]
)
GENERATOR_CLASSES = frozenset({"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64", "SeedSequence"})
# Calls that make an object and do nothing else: it becomes a `Record`.
RECORDS: frozenset[GlobalName] = frozenset(
    [GlobalName("functools", "partial"), GlobalName("torchvision.transforms.functional", "InterpolationMode")]
    + [GlobalName("timm.layers.format", "Format"), *RECONSTRUCTORS, *GENERATORS]
    + [GlobalName("types", "SimpleNamespace"), GlobalName("decimal", "Decimal")]
    + [GlobalName("collections", "deque"), GlobalName("uuid", "UUID"), GlobalName("random", "Random")]
    + [GlobalName(module, name) for module in BUILTIN_MODULES for name in ("slice", "range", "xrange")]
)

_KNOWN = frozenset((*CALLS, *FILLED, *NAMES, *RECORDS, *OBJECTS))


def is_allowed(name: GlobalName) -> bool:
    """Whether a global is on the allow list."""
    return name in _KNOWN


def may_be_class(name: GlobalName) -> bool:
    """Whether a global may be the class of an object that is kept as a record.

    Not what Python itself has, beyond the allow list, nor what is reached through something else: those are what
    attacks need, and models are of other classes.
    """
    module = IMPORT_MAPPING.get(name.module, name.module)  # as Python 3 calls it
    return module.partition(".")[0] not in sys.stdlib_module_names and "." not in name.name


def is_plain_object(function: GlobalName, args: tuple[Any, ...]) -> bool:
    """Whether a call of `RECORDS` is what protocols 0 and 1 have for an object of a class of no base but `object`."""
    return function in RECONSTRUCTORS and len(args) == 3 and args[1] in OBJECTS and args[2] is None


def check_record(function: GlobalName, args: tuple[Any, ...]) -> None:
    """Raises CheckpointError where one of `RECORDS` is given something to call that may do more than make an object."""
    if function in GENERATORS and not all(_makes_generator(part) for part in args):
        raise CheckpointError(f"the pickle calls {function} with other things than NumPy's generators: refused")


def _makes_generator(part: Any) -> bool:
    name = part.kind if isinstance(part, Record) else part
    if not isinstance(name, GlobalName):
        return isinstance(name, str | int | None)
    return name in GENERATORS or (name.module.startswith("numpy.random.") and name.name in GENERATOR_CLASSES)


def refuse_global(name: GlobalName) -> NoReturn:
    """Raises CheckpointError that names a global which is not on the allow list."""
    raise CheckpointError(
        f"the pickle names or calls {quoted(str(name))}, which is not on the allow list: refused without running it. "
        "A checkpoint needs only tensors and plain data; whoever made the file can save its state_dict() alone"
    )


def call(function: Any, args: Any) -> Any:
    """What the pickle's call of an allowed global gives.

    Raises:
        CheckpointError: `function` is no callable name of the allow list, or the arguments are not those it takes.
    """
    if not isinstance(function, GlobalName) or function not in CALLS or not isinstance(args, tuple):
        raise CheckpointError(f"the pickle calls {_described(function)}, which is not allowed")
    try:
        return CALLS[function](*args)
    except (TypeError, ValueError, OverflowError, UnicodeError) as error:
        raise CheckpointError(f"the pickle calls {function} with wrong arguments; the file is damaged") from error
