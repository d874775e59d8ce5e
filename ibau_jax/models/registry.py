"""The architectures that can be converted. One file per family registers what it defines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flax import nnx

from ibau_jax.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Architecture:
    """How to build a model and how to tell it from its state dict.

    Attributes:
        name: what `--model` calls it.
        build: `build(num_classes, rngs)`, the Flax NNX module, its attribute names mirroring PyTorch's.
        classifier: PyTorch's name of the last layer's weight, whose first dimension is the number of classes.
        input_shape: height, width and channels of an image.
        torch_module: `torch_module(num_classes)`, the same network in PyTorch, imported only when called.
    """

    name: str
    build: Callable[[int, nnx.Rngs], nnx.Module]
    classifier: str
    input_shape: tuple[int, int, int]
    torch_module: "Callable[[int], torch.nn.Module]"


_ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Makes an architecture known; its name must be new."""
    if architecture.name in _ARCHITECTURES:
        raise ValueError(f"architecture {architecture.name!r} is registered twice")
    _ARCHITECTURES[architecture.name] = architecture


def architectures() -> tuple[Architecture, ...]:
    """All registered architectures."""
    return tuple(_ARCHITECTURES.values())


def get_architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        CheckpointError: there is none; the message lists those there are.
    """
    if name not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(f"there is no model {name!r}; --model takes one of: {known}")
    return _ARCHITECTURES[name]
