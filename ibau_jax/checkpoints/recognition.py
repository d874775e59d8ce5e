"""Which architecture a state dict belongs to, told by names and shapes."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flax import nnx

from ibau_jax.checkpoints.conversion import Mismatch, Path, leaf_shapes, mismatch
from ibau_jax.checkpoints.hints import MAX_CLASSES, MAX_IMAGE_SIZE, Hints
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError
from ibau_jax.models import Architecture, architectures, find_architecture, name_patterns
from ibau_jax.models.layers import ABSTRACT

SHOWN = 2  # names of each kind of mismatch, where several architectures are described
RUNNERS_UP = 3

Tensors = Mapping[str, TorchTensor]


@dataclass(frozen=True)
class Request:
    """What is known of the model; None is to be recognised.

    Attributes:
        model: a registered architecture's name, or FILE.py:CLASS.
        num_classes: of the classifier.
        image_size: height and width of the images.
        hints: what the file says of itself. Its model is tried first, in whatever spelling; its number of classes is
            taken where the architecture does not say which tensor tells, its image size if it fits.
    """

    model: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    hints: Hints = field(default_factory=Hints)

    def check(self) -> None:
        """Raises CheckpointError unless the numbers make sense."""
        if self.num_classes is not None and not 0 < self.num_classes <= MAX_CLASSES:
            raise CheckpointError(f"{self.num_classes} classes make no model; --num-classes is 1 to {MAX_CLASSES}")
        if self.image_size is not None and not 0 < self.image_size <= MAX_IMAGE_SIZE:
            raise CheckpointError(
                f"images of size {self.image_size} do not exist; --image-size is 1 to {MAX_IMAGE_SIZE}"
            )


@dataclass(frozen=True)
class Candidate:
    """A state dict taken as one architecture.

    Attributes:
        architecture: which.
        num_classes: of the classifier.
        image_size: height and width of the images.
        prefix: what every tensor's name begins with beside the architecture's own names.
        mismatch: what does not fit; false if everything does.
    """

    architecture: Architecture
    num_classes: int
    image_size: int
    prefix: str
    mismatch: Mismatch = field(repr=False)

    def described(self) -> str:
        """What does not fit, shortly."""
        return f"as {self.architecture.name}: {self.mismatch.described(SHOWN)}"


@functools.cache  # recognising and then loading asks twice for the same; callers do not change it
def abstract_model(architecture: Architecture, num_classes: int, image_size: int) -> nnx.Module:
    """An architecture without memory for its weights."""
    return architecture.build(num_classes, image_size, ABSTRACT)


@functools.cache
def abstract_shapes(architecture: Architecture, num_classes: int, image_size: int) -> dict[Path, tuple[int, ...]]:
    """Path and shape of every leaf of an architecture."""
    return leaf_shapes(abstract_model(architecture, num_classes, image_size))


def recognise(tensors: Tensors, prefixes: Sequence[str], request: Request) -> Candidate:
    """What a state dict is.

    Args:
        tensors: its tensors by their full names.
        prefixes: what the names may begin with beside the architecture's own, in the order to try.
        request: what is known.

    Raises:
        CheckpointError: no registered architecture has these names and shapes, or the requested one has not.
    """
    request.check()
    for candidate in _candidates(tensors, prefixes, request):
        if not candidate.mismatch:
            return candidate
    closest = runners_up(tensors, prefixes, request)
    if request.model:
        if not closest:
            wanted = find_architecture(request.model).classifier or "matrix"
            raise CheckpointError(
                f"the state dict has no {wanted!r} to read the number of classes from; "
                f"is it a {request.model}? It holds {summary(tensors)}"
            )
        raise CheckpointError(f"the state dict does not fit {request.model}; {closest[0].mismatch}")
    described = f". Closest, {closest[0].described()}" if closest else ""
    raise CheckpointError(
        f"unknown architecture: the state dict holds {summary(tensors)}{described}. Write it as a Flax module and name "
        f"it by --model FILE.py:CLASS (see docs/custom_model.md). Known are {name_patterns()}"
    )


def runners_up(tensors: Tensors, prefixes: Sequence[str], request: Request) -> list[Candidate]:
    """The architectures that fit in part, best first: by the tensors that fit, then by the names that do not."""

    def affinity(pair: tuple[Architecture, str]) -> int:
        architecture, prefix = pair
        landmarks = architecture.landmarks.items()
        classified = f"{prefix}{architecture.classifier}" in tensors
        return classified + sum(_fits(tensors, prefix, name, shape) for name, shape in landmarks)

    pairs = [(architecture, prefix) for architecture in _possible(request) for prefix in prefixes]
    likely = sorted(pairs, key=affinity, reverse=True)[: 2 * RUNNERS_UP]
    found = [one for pair in likely for one in _as_architecture(tensors, *pair, request)]
    partial = [one for one in found if one.mismatch and (one.mismatch.fitting or request.model)]
    partial.sort(key=lambda one: (-one.mismatch.fitting, len(one.mismatch.unexpected) + len(one.mismatch.missing)))
    best: dict[str, Candidate] = {}
    for one in partial:
        best.setdefault(one.architecture.name, one)
    return list(best.values())[:RUNNERS_UP]


def summary(tensors: Tensors) -> str:
    """The number of tensors, and what the first are called."""
    shown = ", ".join(f"{name} {tensor.shape}" for name, tensor in list(tensors.items())[:6])
    return f"{len(tensors)} tensors ({shown}{', ...' if len(tensors) > 6 else ''})"


def _possible(request: Request) -> list[Architecture]:
    """The requested architecture, or all of them, that which the file names first."""
    if request.model:
        return [find_architecture(request.model)]
    return sorted(architectures(), key=lambda one: _plain(one.name) != _plain(request.hints.model or ""))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _candidates(tensors: Tensors, prefixes: Sequence[str], request: Request) -> Iterator[Candidate]:
    for prefix in prefixes:
        for architecture in _possible(request):
            landmarks = architecture.landmarks.items()
            if all(_fits(tensors, prefix, name, shape) for name, shape in landmarks):
                yield from _as_architecture(tensors, architecture, prefix, request)


def _as_architecture(
    tensors: Tensors, architecture: Architecture, prefix: str, request: Request
) -> Iterator[Candidate]:
    """The state dict as this architecture, for each image size that it may be of."""
    own = stripped(tensors, prefix)
    num_classes = request.num_classes or _classes(architecture, own, request.hints.num_classes)
    if num_classes is None:
        return
    likely = (request.hints.image_size,) if request.hints.image_size else ()
    for image_size in (request.image_size,) if request.image_size else (*likely, *architecture.image_sizes):
        shapes = abstract_shapes(architecture, num_classes, image_size)
        yield Candidate(architecture, num_classes, image_size, prefix, mismatch(shapes, own))


def stripped(tensors: Tensors, prefix: str) -> dict[str, TorchTensor]:
    """The tensors by their names without `prefix`."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _fits(tensors: Tensors, prefix: str, name: str, shape: tuple[int, ...]) -> bool:
    return prefix + name in tensors and tensors[prefix + name].shape == shape


def _classes(architecture: Architecture, tensors: dict[str, TorchTensor], likely: int | None) -> int | None:
    if architecture.classifier:
        weight = tensors.get(architecture.classifier)
    else:
        weight = next((tensor for tensor in reversed(tensors.values()) if len(tensor.shape) == 2), None)
    told = weight.shape[0] if weight is not None and weight.shape else 0
    classes = told if architecture.classifier else likely or told
    return classes if 0 < classes <= MAX_CLASSES else None
