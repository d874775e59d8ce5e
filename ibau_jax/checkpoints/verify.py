"""Compares a checkpoint's Flax model with PyTorch's own forward pass. Needs torch."""

from pathlib import Path

import numpy as np

from ibau_jax.checkpoints.checkpoint import Checkpoint
from ibau_jax.errors import CheckpointError

TOLERANCE = 1e-4
IMAGES, SEED = 64, 0


def verify(checkpoint: Checkpoint, torch_file: Path) -> float:
    """The relative difference ‖a − b‖ / ‖b‖ of the logits of 64 random images, a from Flax and b from PyTorch.

    Args:
        checkpoint: the converted checkpoint.
        torch_file: the PyTorch file that it came from or was written to, read by torch.load(weights_only=True), or
            by safetensors.

    Raises:
        CheckpointError: torch is not installed or can't load the file, or the difference is above TOLERANCE.
    """
    images = np.random.default_rng(SEED).random((IMAGES, *checkpoint.input_shape), np.float32)
    expected = _torch_logits(checkpoint, torch_file, images)
    logits = np.asarray(checkpoint.model()(images))
    difference = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the logits of {torch_file} differ from PyTorch's by {difference:.2e} (relative), "
            f"more than {TOLERANCE:.0e}"
        )
    return difference


def _torch_logits(checkpoint: Checkpoint, file: Path, images: np.ndarray) -> np.ndarray:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError("--verify needs PyTorch, which is not installed: pip install torch") from error
    module = checkpoint.architecture.torch_module(checkpoint.num_classes)
    try:
        module.load_state_dict(_torch_state_dict(checkpoint, file))
    except Exception as error:  # whatever torch raises for a file or names it can't take
        raise CheckpointError(f"PyTorch can't load {file}: {str(error)[:200]}") from error
    module.eval().float()
    with torch.no_grad():
        return module(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()


def _torch_state_dict(checkpoint: Checkpoint, file: Path) -> dict:
    import torch

    envelope = checkpoint.envelope
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state_dict = load_file(file)
    else:
        state_dict = envelope.state_dict_in(torch.load(file, map_location="cpu", weights_only=True))
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix(envelope.prefix): value for name, value in tensors.items()}
