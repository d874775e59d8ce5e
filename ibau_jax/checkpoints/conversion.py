"""The one rule that turns PyTorch's state dict into Flax's leaves and back, for every architecture.

A Flax leaf's path is the PyTorch module path, since models mirror the module tree; its last part and its number of
dimensions say how PyTorch calls it and lays it out:

    Flax leaf             PyTorch           layout
    kernel                weight            ...IO <-> OI...: HWIO <-> OIHW, IO <-> OI
    scale, embedding      weight            as is
    mean, var             running_mean/var  as is
    anything else         its own name      as is

Beside the leaves a state dict may have counters, and buffers that the network computes itself
(`ibau_jax.models.windows`). They are no leaves and stay in the file as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from flax import nnx

from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError
from ibau_jax.models.windows import BUFFERS

Path: TypeAlias = tuple[Any, ...]  # of str and int
Leaves: TypeAlias = dict[Path, np.ndarray]

_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
FOREIGN_COUNTERS = ("n_averaged", "total_ops", "total_params")  # of weight averaging and of thop's profiler
# What inference does not use and Flax does not have. They stay in the file as they are.
COUNTERS = ("num_batches_tracked", *FOREIGN_COUNTERS)


# Weights compute in float32, which holds all of the narrower ones, and are written in the dtype that they came in.
WEIGHT_DTYPES = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
SHOWN, NAME = 3, 100  # tensors in a message, and characters of their names


def torch_name(path: Path) -> str:
    """PyTorch's name of a Flax leaf: `("features", 0, "kernel")` is `features.0.weight`."""
    *module, leaf = path
    return ".".join(map(str, (*module, _NAMES.get(str(leaf), leaf))))


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives a Flax leaf of `shape`."""
    return tuple(shape[axis] for axis in _torch_axes(path, len(shape)))


def to_flax(path: Path, tensor: np.ndarray) -> np.ndarray:
    """PyTorch's tensor in Flax's layout, dtype unchanged."""
    axes = range(tensor.ndim)
    return tensor.transpose((*axes[2:], 1, 0) if _is_kernel(path, tensor.ndim) else axes)


def to_torch(path: Path, leaf: np.ndarray) -> np.ndarray:
    """Flax's leaf in PyTorch's layout, dtype unchanged: the inverse of `to_flax`."""
    return leaf.transpose(_torch_axes(path, leaf.ndim))


def _torch_axes(path: Path, ndim: int) -> tuple[int, ...]:
    axes = tuple(range(ndim))
    return (ndim - 1, ndim - 2, *axes[:-2]) if _is_kernel(path, ndim) else axes


def _is_kernel(path: Path, ndim: int) -> bool:
    return path[-1] == "kernel" and ndim >= 2


def leaf_shapes(model: nnx.Module) -> dict[Path, tuple[int, ...]]:
    """Path and shape of every leaf of a model, which may be abstract."""
    return {path: tuple(variable.shape) for path, variable in nnx.to_flat_state(nnx.state(model))}


@dataclass(frozen=True)
class Mismatch:
    """What keeps tensors from being exactly the weights of a model, by PyTorch's names.

    Attributes:
        missing: leaves of the model without a tensor.
        unexpected: tensors without a leaf.
        misshapen: tensors of another shape, with that shape and the model's.
        fitting: how many leaves have their tensor.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    fitting: int

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        return self.described(limit=None)

    def described(self, limit: int | None) -> str:
        """One text, with at most `limit` names of each kind."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return "; ".join(f"{len(names)} {kind}: {_listed(names, limit)}" for kind, names in kinds.items() if names)


def _listed(names: tuple[str, ...], limit: int | None) -> str:
    return ", ".join(names[:limit]) + (", ..." if limit is not None and len(names) > limit else "")


def torch_shapes(shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's leaves in PyTorch, by PyTorch's names."""
    return {torch_name(path): torch_shape(path, shape) for path, shape in shapes.items()}


def mismatch(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TorchTensor]) -> Mismatch:
    """What keeps `tensors` from being exactly those that a model has by PyTorch's names and shapes.

    Every one must be there in its shape, and every tensor must be used, but for counters and for buffers that hold
    what the network computes.
    """
    there = [name for name in wanted if name in tensors]
    misshapen = [name for name in there if tensors[name].shape != wanted[name]]
    beside = [name for name in tensors if name not in wanted and not is_counter(name, tensors[name])]
    return Mismatch(
        missing=tuple(name for name in wanted if name not in tensors),
        unexpected=tuple(name for name in beside if not _is_computed(name, tensors[name], wanted)),
        misshapen=tuple(f"{name} {tensors[name].shape} instead of {wanted[name]}" for name in misshapen),
        fitting=len(there) - len(misshapen),
    )


def is_counter(name: str, tensor: TorchTensor) -> bool:
    """Whether a tensor is one of `COUNTERS`: a single number beside the weights."""
    return name.rpartition(".")[2] in COUNTERS and tensor.shape in ((), (1,))


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name holds what the network computes itself."""
    return name.rpartition(".")[2] in BUFFERS


def _is_computed(name: str, tensor: TorchTensor, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor is a buffer that holds exactly what a network with tensors of these shapes computes."""
    if not is_buffer(name):
        return False
    stem, leaf = name[: name.rfind(".") + 1], name.rpartition(".")[2]
    source, compute = BUFFERS[leaf]
    shape = wanted.get(stem + source, ())
    expected = compute(shape[0], tensor.shape) if shape else None
    return expected is not None and expected.shape == tensor.shape and np.array_equal(tensor.numpy(), expected)


def leaves_from_torch(shapes: Mapping[Path, tuple[int, ...]], tensors: Mapping[str, TorchTensor]) -> Leaves:
    """The model's leaves in Flax's layout and the file's dtypes, contiguous, so that the file's storages can go.

    Raises:
        CheckpointError: names or shapes do not fit, and the message lists all of them; or see `check_dtypes`.
    """
    problems = mismatch(torch_shapes(shapes), tensors)
    if problems:
        raise CheckpointError(f"the state dict does not fit the model; {problems}")
    check_dtypes({name: tensors[name].dtype for name in map(torch_name, shapes)})
    return {path: np.asarray(to_flax(path, tensors[torch_name(path)].numpy()), order="C") for path in shapes}


def not_finite(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many values of which arrays no network can compute with, by PyTorch's names; those without any are left out.

    They are NaN and infinity, also of float64 values that float32 does not hold, and variances of BatchNorm below 0.
    """
    counts = {name: _count_not_finite(name, array) for name, array in arrays.items() if array.dtype.kind not in "biu"}
    return {name: count for name, count in counts.items() if count}


def _count_not_finite(name: str, array: np.ndarray) -> int:
    with np.errstate(over="ignore"):
        usable = np.isfinite(array.astype(np.float32)) if array.dtype.kind == "f" else np.isfinite(array)
    if name.rpartition(".")[2] == _NAMES["var"] and array.dtype.kind != "c":
        usable[usable] = array[usable] >= 0
    return int(np.sum(~usable))


def described_not_finite(counts: Mapping[str, int]) -> str:
    """The tensors of `not_finite` in a few words."""
    listed = [f"{count} in {name[:NAME]}{'...' * (len(name) > NAME)}" for name, count in counts.items()]
    more = f" and more in {len(listed) - SHOWN} others" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def check_dtypes(dtypes: Mapping[str, np.dtype]) -> None:
    """Raises CheckpointError unless the weights of these names have one of `WEIGHT_DTYPES`.

    Integers and float8 are mostly quantised, by scales that lie elsewhere: their values alone are another network.
    """
    others = {name: dtype for name, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES}
    if others:
        shown = ", ".join(f"{name[:NAME]} {dtype}" for name, dtype in list(others.items())[:SHOWN])
        more = ", ..." if len(others) > SHOWN else ""
        raise CheckpointError(
            f"{len(others)} weights have a dtype that is not converted: {shown}{more}. "
            "Dequantise them, or save the model after .float(); "
            f"{', '.join(map(str, WEIGHT_DTYPES))} are taken"
        )


def leaves_to_torch(leaves: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves under PyTorch's names, in PyTorch's layout."""
    return {torch_name(path): to_torch(path, leaf) for path, leaf in leaves.items()}
