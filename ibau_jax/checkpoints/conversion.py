"""The one rule that turns PyTorch's state dict into Flax's leaves and back, for every architecture.

A Flax leaf's path is the PyTorch module path, since models mirror the module tree; its last part and its number of
dimensions say how PyTorch calls it and lays it out:

    Flax leaf             PyTorch           layout
    kernel, 4 dimensions  weight            HWIO <-> OIHW
    kernel, 2 dimensions  weight            IO <-> OI
    scale                 weight            as is
    mean, var             running_mean/var  as is
    anything else         its own name      as is
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from flax import nnx

from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError

Path: TypeAlias = tuple[Any, ...]  # of str and int
Leaves: TypeAlias = dict[Path, np.ndarray]

_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
COUNTER = "num_batches_tracked"  # BatchNorm's, which inference does not use and Flax does not have


def torch_name(path: Path) -> str:
    """PyTorch's name of a Flax leaf: `("features", 0, "kernel")` is `features.0.weight`."""
    *module, leaf = path
    return ".".join(map(str, (*module, _NAMES.get(str(leaf), leaf))))


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives a Flax leaf of `shape`."""
    return tuple(shape[axis] for axis in _axes(path, len(shape), _TO_TORCH))


def to_flax(path: Path, tensor: np.ndarray) -> np.ndarray:
    """PyTorch's tensor in Flax's layout, dtype unchanged."""
    return tensor.transpose(_axes(path, tensor.ndim, _TO_FLAX))


def to_torch(path: Path, leaf: np.ndarray) -> np.ndarray:
    """Flax's leaf in PyTorch's layout, dtype unchanged: the inverse of `to_flax`."""
    return leaf.transpose(_axes(path, leaf.ndim, _TO_TORCH))


def _axes(path: Path, ndim: int, permutations: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    identity = tuple(range(ndim))
    return permutations.get(ndim, identity) if path[-1] == "kernel" else identity


def leaf_shapes(model: nnx.Module) -> dict[Path, tuple[int, ...]]:
    """Path and shape of every leaf of a model, which may be abstract (`nnx.eval_shape`)."""
    return {path: tuple(variable.shape) for path, variable in nnx.to_flat_state(nnx.state(model))}


def mismatches(shapes: Mapping[Path, tuple[int, ...]], tensors: Mapping[str, TorchTensor]) -> list[str]:
    """What keeps `tensors` from being exactly the weights of a model with leaves `shapes`: one text a kind.

    Every leaf must be there in its shape, and every tensor must be used, but for BatchNorm's counters.
    """
    wanted = {torch_name(path): torch_shape(path, shape) for path, shape in shapes.items()}
    missing = [name for name in wanted if name not in tensors]
    unused = [name for name in tensors if name not in wanted]
    unexpected = [name for name in unused if not _is_counter(name, shapes, tensors[name])]
    misshapen = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _is_counter(name: str, shapes: Mapping[Path, Any], tensor: TorchTensor) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf != COUNTER or tensor.shape not in ((), (1,)):
        return False
    return any(path[-1] == "mean" and ".".join(map(str, path[:-1])) == module for path in shapes)


def leaves_from_torch(shapes: Mapping[Path, tuple[int, ...]], tensors: Mapping[str, TorchTensor]) -> Leaves:
    """The model's leaves in Flax's layout and the file's dtypes.

    Raises:
        CheckpointError: names or shapes do not fit; the message lists all of them.
    """
    problems = mismatches(shapes, tensors)
    if problems:
        raise CheckpointError("the state dict does not fit the model; " + "; ".join(problems))
    return {path: to_flax(path, tensors[torch_name(path)].numpy()) for path in shapes}


def leaves_to_torch(leaves: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves under PyTorch's names, in PyTorch's layout."""
    return {torch_name(path): to_torch(path, leaf) for path, leaf in leaves.items()}
