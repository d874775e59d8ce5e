"""PyTorch checkpoints in, Flax models out, and back: `load`, `save`, `Checkpoint`."""

from ibau_jax.checkpoints.checkpoint import Checkpoint, load, save
from ibau_jax.checkpoints.fresh import fresh_checkpoint
from ibau_jax.checkpoints.hints import Hints, read_hints
from ibau_jax.checkpoints.reader import TorchFile, read_torch_file

__all__ = ["Checkpoint", "Hints", "TorchFile", "fresh_checkpoint", "load", "read_hints", "read_torch_file", "save"]
