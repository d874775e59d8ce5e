"""Which registered architecture a state dict belongs to, told by names and shapes."""

import functools
from collections.abc import Mapping

from flax import nnx

from ibau_jax.checkpoints.conversion import Path, leaf_shapes, mismatches
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError
from ibau_jax.models import Architecture, architectures, get_architecture

MAX_CLASSES = 10**6  # a damaged file may name any number


@functools.cache  # recognising and then loading asks twice for the same; callers do not change it
def abstract_shapes(architecture: Architecture, num_classes: int) -> dict[Path, tuple[int, ...]]:
    """Path and shape of every leaf of an architecture, without taking memory for it."""
    return leaf_shapes(nnx.eval_shape(lambda: architecture.build(num_classes, nnx.Rngs(0))))


def recognise(
    tensors: Mapping[str, TorchTensor], model: str | None = None, num_classes: int | None = None
) -> tuple[Architecture, int]:
    """The architecture and the number of classes of a state dict; `model` and `num_classes` overrule.

    Raises:
        CheckpointError: no registered architecture has these names and shapes, or there is none called `model`.
    """
    candidates = [get_architecture(model)] if model else list(architectures())
    for architecture in candidates:
        classes = num_classes or _classes(architecture, tensors)
        if classes is None:
            continue
        if model or not mismatches(abstract_shapes(architecture, classes), tensors):
            return architecture, classes
    if model:
        raise CheckpointError(
            f"the state dict has no {candidates[0].classifier!r} to read the number of classes from; "
            f"is it a {model}? It holds {_keys(tensors)}"
        )
    known = ", ".join(sorted(architecture.name for architecture in candidates))
    closest = _closest(tensors, num_classes)
    raise CheckpointError(
        f"unknown architecture: the state dict holds {_keys(tensors)}. "
        f"Name it by --model if it is one of: {known}{closest}"
    )


def _classes(architecture: Architecture, tensors: Mapping[str, TorchTensor]) -> int | None:
    weight = tensors.get(architecture.classifier)
    classes = weight.shape[0] if weight is not None and weight.shape else 0
    return classes if 0 < classes <= MAX_CLASSES else None


def _keys(tensors: Mapping[str, TorchTensor]) -> str:
    shown = ", ".join(f"{name} {tensor.shape}" for name, tensor in list(tensors.items())[:6])
    return f"{len(tensors)} tensors ({shown}{', ...' if len(tensors) > 6 else ''})"


def _closest(tensors: Mapping[str, TorchTensor], num_classes: int | None) -> str:
    """Says what does not fit where an architecture's classifier is there but something else differs."""
    for architecture in architectures():
        classes = num_classes or _classes(architecture, tensors)
        if classes is not None and architecture.classifier in tensors:
            problems = mismatches(abstract_shapes(architecture, classes), tensors)
            return f". As {architecture.name}: " + "; ".join(problems)
    return ""
