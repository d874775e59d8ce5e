"""A checkpoint for a model that was trained here: the file that PyTorch would have written."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from ibau_jax.checkpoints.checkpoint import Checkpoint
from ibau_jax.checkpoints.conversion import Leaves, Path, leaves_to_torch, torch_name
from ibau_jax.checkpoints.envelope import Envelope
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.image_size import ImageSize
from ibau_jax.models import Architecture
from ibau_jax.models.windows import relative_position_index, window_side

STATE_DICT = "net"
ORDER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # within a module


def fresh_checkpoint(
    architecture: Architecture, num_classes: int, image_size: ImageSize, model: nnx.Module, metadata: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint of a model: its state dict under `net`, and `metadata` beside it.

    Args:
        architecture: what the model is; `torch_module(num_classes)` loads the state dict, strictly.
        num_classes: of the classifier.
        image_size: height and width of the images.
        model: with its normalisation outside, if it has any.
        metadata: plain values (`acc`, `epoch`, ...).
    """
    leaves: Leaves = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}
    empty = {name: TorchTensor.from_numpy(np.zeros(0, np.float32)) for name in leaves_to_torch(leaves)}
    state_dict = OrderedDict(sorted((empty | _counters(leaves) | _buffers(leaves)).items(), key=_place))
    names = {name: name for name in state_dict}
    envelope = Envelope({STATE_DICT: state_dict, **metadata}, (STATE_DICT,), names, "zip")
    return Checkpoint(architecture, num_classes, image_size, leaves, envelope)


def _counters(leaves: Mapping[Path, np.ndarray]) -> dict[str, TorchTensor]:
    """BatchNorm's counters, which PyTorch wants to find."""
    norms = [path[:-1] for path in leaves if path[-1] == "var"]
    return {torch_name((*norm, "num_batches_tracked")): TorchTensor.from_numpy(np.asarray(0)) for norm in norms}


def _buffers(leaves: Mapping[Path, np.ndarray]) -> dict[str, TorchTensor]:
    """Which positions tokens of a window have to each other, as torchvision's modules save it."""
    tables = {path[:-1]: len(leaf) for path, leaf in leaves.items() if path[-1] == "relative_position_bias_table"}
    return {
        torch_name((*layer, "relative_position_index")): TorchTensor.from_numpy(relative_position_index(side).ravel())
        for layer, positions in tables.items()
        if (side := window_side(positions))
    }


def _place(item: tuple[str, TorchTensor]) -> tuple[Any, ...]:
    *module, leaf = item[0].split(".")
    numbered = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in module)
    return numbered, ORDER.index(leaf) if leaf in ORDER else len(ORDER), leaf
