"""Compares a checkpoint's Flax model with PyTorch's own forward pass. Needs torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from ibau_jax.checkpoints.checkpoint import Checkpoint
from ibau_jax.checkpoints.conversion import FOREIGN_COUNTERS
from ibau_jax.checkpoints.naming import common_prefix
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.shards import files_of, merged
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError
from ibau_jax.models.normalized import normalized_model
from ibau_jax.models.registry import is_torchvision

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
IMAGES, SEED, BATCH = 64, 0, 32


def random_images(checkpoint: Checkpoint, count: int = IMAGES) -> Float[np.ndarray, "n h w c"]:
    """The same `count` random images at each call, float32 in [0, 1]."""
    return np.random.default_rng(SEED).random((count, *checkpoint.input_shape), np.float32)


def verify(
    checkpoint: Checkpoint,
    torch_file: Path,
    images: Float[np.ndarray, "n h w c"] | None = None,
    torch_module: "Callable[[int], torch.nn.Module] | None" = None,
) -> float:
    """The relative difference ‖a − b‖ / ‖b‖ of the logits of some images, a from Flax and b from PyTorch.

    Args:
        checkpoint: the converted checkpoint.
        torch_file: the PyTorch file that it came from or was written to, read by torch.load(weights_only=True), or
            by safetensors.
        images: float32 in [0, 1]; by default 64 random ones.
        torch_module: makes the PyTorch module for a number of classes, with or without the file's other layers (a
            normalisation); by default the architecture's own.

    Raises:
        CheckpointError: torch or the module is not there or can't load the file, or the difference is above TOLERANCE;
            or the architecture is assumed, and its own module would share the assumption.
    """
    if checkpoint.alternatives and torch_module is None:
        raise CheckpointError(
            f"a module chosen by names would share the assumption that this is {checkpoint.architecture.name}, "
            f"though {', '.join(one.name for one in checkpoint.alternatives)} have the same names and shapes. Name "
            "your module by --torch-module FILE.py:NAME, the network by --model NAME, or clean images by --dataset"
        )
    images = random_images(checkpoint) if images is None else images
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    module, whole = _loaded_module(checkpoint, torch_file, torch_module or checkpoint.architecture.torch_module)
    expected = np.concatenate([_torch_logits(module, batch) for batch in batches])
    with jax.default_matmul_precision("highest"):
        model = normalized_model(checkpoint.network(), checkpoint.stored_normalization if whole else None)
        logits = np.concatenate([np.asarray(model(batch)) for batch in batches])
    if logits.shape != expected.shape:
        raise CheckpointError(f"PyTorch's logits have the shape {expected.shape}, Flax's {logits.shape}")
    difference = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the logits of {torch_file} differ from PyTorch's by {difference:.2e} (relative), "
            f"more than {TOLERANCE:.0e}"
        )
    return difference


def compared_module(checkpoint: Checkpoint) -> str:
    """Whose PyTorch module a checkpoint is compared with, where the user names none."""
    name, make = checkpoint.architecture.name, checkpoint.architecture.torch_module
    return f"torchvision's {name}" if is_torchvision(make) else f"this program's own PyTorch module of {name}"


def _torch_logits(module: "torch.nn.Module", images: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return module(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()


def _loaded_module(
    checkpoint: Checkpoint, file: Path, make: "Callable[[int], torch.nn.Module] | None"
) -> "tuple[torch.nn.Module, bool]":
    """The module with the file's weights, and whether it takes all of the state dict, not the network's part alone."""
    try:
        import torch  # noqa: F401 - asked for before anything else, to say so where it is missing
    except ImportError as error:
        raise CheckpointError("--verify needs PyTorch, which is not installed: pip install torch") from error
    name = checkpoint.architecture.name
    if make is None:
        raise CheckpointError(
            f"only the code that {name} came from has its PyTorch module; name it by --torch-module FILE.py:NAME"
        )
    try:
        module = make(checkpoint.num_classes)
    except (ImportError, RuntimeError) as error:  # torchvision is missing, or was built for another torch
        raise CheckpointError(f"can't build {name} in PyTorch: {str(error)[:200]}") from error
    try:
        tensors = _tensors_by_torch(checkpoint, file)
        whole = set(module.state_dict()) == set(tensors) != set(checkpoint.envelope.names)
        module.load_state_dict(tensors if whole else _of_network(checkpoint, tensors, module.state_dict()))
    except Exception as error:  # whatever torch raises for a file or names it can't take
        raise CheckpointError(f"PyTorch can't load {file}: {str(error)[:200]}") from error
    return module.eval().float(), whole


def _of_network(checkpoint: Checkpoint, tensors: dict[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """The network's tensors under its own names, without what belongs to training alone.

    With them are those that a module wants beside them, as of heads that it has for training, where the file has them.
    """
    tensors = tensors | _folded_by_torch(checkpoint, tensors)
    names = checkpoint.envelope.names
    prefix = common_prefix(names)
    full_names = {name: f"{prefix}{name}" for name in wanted} | dict(names)
    own = {name: tensors[full] for name, full in full_names.items() if full in tensors}
    return {name: value for name, value in own.items() if not name.endswith(FOREIGN_COUNTERS)}


def _folded_by_torch(checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {
        name: torch.as_tensor(fold.form.fold([tensors[part].double().numpy() for part in fold.parts]))
        for name, fold in checkpoint.envelope.folds.items()
        if tensors.keys() >= set(fold.parts)
    }


def _tensors_by_torch(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    import torch

    envelope = checkpoint.envelope
    source = read_torch_file(file)
    parts = files_of(file)[1:] or [file]
    if source.format == "safetensors":
        from safetensors.torch import load_file

        return {name: tensor for part in parts for name, tensor in load_file(part).items()}
    # torch.load takes neither what pickle.dump wrote nor, without importing classes, whole modules and old protocols.
    if source.format == "pickle" or source.unknown or source.dialect.protocol < 2:
        tensors = envelope.state_dict_in(source.tree).items()
        return {
            name: torch.from_numpy(value.numpy().copy()) for name, value in tensors if isinstance(value, TorchTensor)
        }
    with torch.serialization.safe_globals(_numpy_globals()):
        trees = [torch.load(part, map_location="cpu", weights_only=True) for part in parts]
    state_dict = envelope.state_dict_in(merged(trees) if trees[1:] else trees[0])
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def _numpy_globals() -> list[Any]:
    """NumPy's arrays and scalars, which checkpoints hold beside the weights, for torch.load's allow list."""
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    old_names = [(reconstruct, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return [reconstruct, scalar, np.ndarray, np.dtype, *old_names, *dtypes]
