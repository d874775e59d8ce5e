"""Which architecture a state dict belongs to, told by names and shapes."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import jax
import jax.numpy as jnp
from flax import nnx

from ibau_jax.checkpoints.conversion import COUNTERS, Mismatch, Path, is_counter, leaf_shapes, torch_shapes
from ibau_jax.checkpoints.envelope import rank
from ibau_jax.checkpoints.hints import MAX_CLASSES, Hints
from ibau_jax.checkpoints.naming import (
    Reading,
    StateDict,
    Tensors,
    doubtful,
    find_normalization,
    is_below,
    module_of,
    read_as,
)
from ibau_jax.errors import CheckpointError, shortened
from ibau_jax.image_size import ImageSize
from ibau_jax.models import Architecture, Normalization, architectures, find_architecture, known_kinds, proposed
from ibau_jax.models.derived import grey, head_root, is_headed, told_head, with_head
from ibau_jax.models.layers import ABSTRACT
from ibau_jax.models.registry import altered, unaltered

UNKNOWN_CLASSES = 2  # stands for the number of classes where no classifier tells it
MAX_CANDIDATES = 128  # honest files have dozens, with other heads; a hostile one may have a landmark at every name
PLACES = 4  # sub-trees in which families are looked for
SHOWN = 2  # names of each kind of mismatch, where several architectures are described
RUNNERS_UP = 3
IMAGES = 2  # of which logits are asked for: a network may take the places of one for several


@dataclass(frozen=True)
class Request:
    """What is known of the model; None is to be recognised.

    Attributes:
        model: a registered architecture's name, or FILE.py:CLASS.
        num_classes: of the classifier.
        image_size: height and width of the images.
        hints: what the file says of itself. Its model is tried first, in whatever spelling; its number of classes is
            taken where the architecture does not say which tensor tells, its image size if it fits.
        leave_out: tensors that take no part in what the network computes: their names, or what those begin with.
    """

    model: str | None = None
    num_classes: int | None = None
    image_size: ImageSize | None = None
    hints: Hints = field(default_factory=Hints)
    leave_out: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises CheckpointError unless the number of classes makes sense."""
        if self.num_classes is not None and not 1 < self.num_classes <= MAX_CLASSES:
            raise CheckpointError(f"{self.num_classes} classes make no model; --num-classes is 2 to {MAX_CLASSES}")


@dataclass(frozen=True)
class Candidate:
    """A state dict taken as one architecture.

    Attributes:
        architecture: which.
        num_classes: of the classifier.
        image_size: height and width of the images.
        reading: which tensors are the network's, and what does not fit.
        doubtful: tensors beside the network that may take part in what it computes.
        normalization: of the images, where the state dict holds a layer that does it.
    """

    architecture: Architecture
    num_classes: int
    image_size: ImageSize
    reading: Reading
    doubtful: tuple[str, ...] = ()
    normalization: Normalization | None = None

    @property
    def mismatch(self) -> Mismatch:
        """What does not fit; false if everything does."""
        return self.reading.mismatch

    def described(self) -> str:
        """What does not fit, shortly."""
        return f"as {self.architecture.name}: {self.mismatch.described(SHOWN)}"


@functools.cache  # recognising and then loading asks twice for the same; callers do not change it
def abstract_model(architecture: Architecture, num_classes: int, image_size: ImageSize) -> nnx.Module:
    """An architecture without memory for its weights."""
    return architecture.build(num_classes, image_size, ABSTRACT)


@functools.cache
def abstract_shapes(architecture: Architecture, num_classes: int, image_size: ImageSize) -> dict[Path, tuple[int, ...]]:
    """Path and shape of every leaf of an architecture."""
    return leaf_shapes(abstract_model(architecture, num_classes, image_size))


@functools.cache
def check_logits(architecture: Architecture, num_classes: int, image_size: ImageSize) -> None:
    """Checks that a network takes images of a size and gives a logit for each class, without computing anything.

    Raises:
        CheckpointError: it does not.
    """
    graph, state = nnx.split(abstract_model(architecture, num_classes, image_size))
    images = jax.ShapeDtypeStruct((IMAGES, *image_size, architecture.channels), jnp.float32)
    try:
        logits = jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, images)
    except (TypeError, ValueError) as error:  # as JAX and the layers say that shapes do not fit
        raise CheckpointError(_refusal(architecture, image_size, str(error))) from error
    if logits.shape != (IMAGES, num_classes):
        shape = " x ".join(map(str, logits.shape))
        raise CheckpointError(_refusal(architecture, image_size, f"it gives {shape} numbers for {IMAGES} of them"))


def _refusal(architecture: Architecture, image_size: ImageSize, why: str) -> str:
    return (
        f"{architecture.name} takes no images of {image_size}: {shortened(why)}. --image-size HEIGHTxWIDTH says "
        "another size, --model FILE.py:CLASS another network (see docs/custom_model.md)"
    )


def recognise(tensors: Tensors, request: Request) -> Candidate:
    """What a state dict is. Of several architectures with the same names and shapes it is the most common one.

    Args:
        tensors: the state dict's tensors by their full names.
        request: what is known.

    Raises:
        CheckpointError: no registered architecture has these names and shapes, or the requested one has not; or several
            networks are there.
    """
    request.check()
    state = _state_dict(tensors, request)
    possible = _possible(state, request)
    candidates = islice(_candidates(state, possible, request), MAX_CANDIDATES)
    fitting = [candidate for candidate in candidates if not candidate.mismatch]
    if fitting:
        first = _chosen(_likeliest(fitting))
        if not first.doubtful:
            _check_alone(first, fitting)
            return _with_several_classes(first if request.model else _as_spelled(state, first))
        name, beside = first.architecture.name, ", ".join(first.doubtful)
        raise CheckpointError(
            f"the state dict fits {name}, but tensors beside it may take part in what it computes: {beside}. "
            f"If they do not, --leave-out {first.doubtful[0]} keeps them as they are; else write the network as a "
            "Flax module and name it by --model FILE.py:CLASS (see docs/custom_model.md)"
        )
    closest = _closest(state, possible, request)
    if request.model:
        what = closest[0].mismatch if closest else f"it holds {summary(tensors)}"
        raise CheckpointError(f"the state dict does not fit {request.model}; {what}")
    described = f". Closest, {closest[0].described()}" if closest else ""
    described += "" if request.image_size else ". Of images that are not square --image-size HEIGHTxWIDTH says the size"
    raise CheckpointError(
        f"unknown architecture: the state dict holds {summary(tensors)}{described}. Write it as a Flax module and name "
        f"it by --model FILE.py:CLASS (see docs/custom_model.md). Known, of docs/converting.md: {known_kinds()}"
    )


def _likeliest(candidates: list[Candidate]) -> list[Candidate]:
    """Those of published architectures; if none, those with another head, which take all that may take part; if none,
    those beside which something may take part; if none, those that are guessed.
    """

    def freedom(candidate: Candidate) -> int:
        if candidate.architecture.is_guessed:
            return 4 if candidate.doubtful else 3
        return 2 if candidate.doubtful else 1 if is_headed(candidate.architecture) else 0

    least = min(map(freedom, candidates))
    return [one for one in candidates if freedom(one) == least]


def _chosen(candidates: list[Candidate]) -> Candidate:
    """The one network that is there, or the one whose place is better known than the others'.

    Of several architectures in one place it is the one that takes the most tensors.
    """

    def place(candidate: Candidate) -> tuple[int, ...]:
        return rank(tuple(filter(None, candidate.reading.prefix.split("."))))

    first = min(candidates, key=lambda one: (place(one), len(one.reading.beside), len(one.reading.prefix)))
    own = set(first.reading.names.values())  # with which another is the same one, named otherwise
    apart = [one for one in candidates if set(one.reading.names.values()) != own]
    others = {one.reading.prefix for one in apart if place(one) == place(first)} - {first.reading.prefix}
    if others:
        prefixes = ", ".join(repr(prefix.rstrip(".")) for prefix in sorted({first.reading.prefix, *others}))
        raise CheckpointError(f"the state dict holds several networks, below {prefixes}; choose one by --key")
    return first


def _check_alone(chosen: Candidate, fitting: list[Candidate]) -> None:
    """Raises CheckpointError where the network lies inside another one that fits as well."""
    own, prefix = _weights(chosen), chosen.reading.prefix
    for other in fitting:
        alike = other.architecture.is_guessed == chosen.architecture.is_guessed
        around = alike and prefix.startswith(other.reading.prefix) and own.isdisjoint(_weights(other))
        if around and len(_weights(other)) >= len(own):
            place, inner = other.reading.prefix.rstrip(".") or "its first level", prefix.rstrip(".")
            raise CheckpointError(
                f"the state dict holds several networks, one at {place} and one below {inner!r}; --key chooses the "
                f"second, --leave-out {inner} the first"
            )


def _weights(candidate: Candidate) -> set[str]:
    """The file's names of the network's tensors, counters left out."""
    return {full for own, full in candidate.reading.names.items() if own.rpartition(".")[2] not in COUNTERS}


def _as_spelled(state: StateDict, candidate: Candidate) -> Candidate:
    """A candidate as the code computes it in whose spelling the file has it."""
    base, alterations = unaltered(candidate.architecture)
    return replace(candidate, architecture=altered(base, *alterations, *state.alterations(candidate.reading.names)))


def _with_several_classes(candidate: Candidate) -> Candidate:
    if candidate.num_classes > 1:
        return candidate
    raise CheckpointError(
        f"the {candidate.architecture.name} has one output, as a yes-or-no model with a sigmoid has; a classifier has "
        "an output a class: save it with two, the second one's weights and bias those of the one, the first one's zero"
    )


def runners_up(tensors: Tensors, request: Request) -> list[Candidate]:
    """The architectures that fit in part, best first: by the tensors that fit, then by the names that do not."""
    state = _state_dict(tensors, request)
    return _closest(state, _possible(state, request), request)


def _closest(state: StateDict, possible: list[Architecture], request: Request) -> list[Candidate]:
    def affinity(pair: tuple[Architecture, str]) -> int:
        architecture, prefix = pair
        classified = f"{prefix}{architecture.classifier}" in state.full
        return classified + sum(state.has(prefix + name, shape) for name, shape in architecture.landmarks.items())

    pairs = [(one, prefix) for one in possible for prefix in state.common_prefixes]
    likely = sorted(pairs, key=affinity, reverse=True)[: 2 * RUNNERS_UP]
    found = (one for pair in likely for one in _as_architecture(state, *pair, request))
    partial = [one for one in found if one.mismatch and (one.mismatch.fitting or request.model)]
    partial.sort(key=lambda one: (-one.mismatch.fitting, len(one.mismatch.unexpected) + len(one.mismatch.missing)))
    best: dict[str, Candidate] = {}
    for one in partial:
        best.setdefault(one.architecture.name, one)
    return list(best.values())[:RUNNERS_UP]


def summary(tensors: Tensors) -> str:
    """The number of tensors, and what the first are called."""
    shown = ", ".join(f"{shortened(name, 100)} {tensor.shape}" for name, tensor in list(tensors.items())[:6])
    return f"{len(tensors)} tensors ({shown}{', ...' if len(tensors) > 6 else ''})"


def _state_dict(tensors: Tensors, request: Request) -> StateDict:
    """The tensors without those that the user leaves out."""
    return StateDict({name: value for name, value in tensors.items() if not is_below(name, request.leave_out)})


def _possible(state: StateDict, request: Request) -> list[Architecture]:
    """The requested architecture, or all that are no variants of others, that which the file names first.

    Of families they are those that the names and shapes in each sub-tree propose. Where no convolution has three
    inputs, those of RGB images are taken for grey ones.
    """
    if request.model:
        return [find_architecture(request.model)]
    known = [architecture for architecture in architectures() if architecture.variant_of is None]
    size = request.image_size or request.hints.image_size
    for prefix in state.common_prefixes[:PLACES]:
        inside = [name for name in state.full if name.startswith(prefix) and not is_counter(name, state[name])]
        known += proposed({name.removeprefix(prefix): state[name].shape for name in inside}, size)
    inputs = {state[name].shape[1] for name in state.full if len(state[name].shape) == 4}
    if 1 in inputs and 3 not in inputs:
        known = [grey(one) if one.channels == 3 and not one.is_guessed else one for one in known]

    def unlikely(architecture: Architecture) -> tuple[bool, bool]:
        other_size = architecture.is_guessed and size is not None and size not in architecture.image_sizes
        return not same_name(architecture.name, request.hints.model), other_size

    return sorted(dict.fromkeys(known), key=unlikely)


def same_name(name: str, other: str | None) -> bool:
    """Whether two names of an architecture are the same but for case and separators."""
    return other is not None and _plain(name) == _plain(other)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _candidates(state: StateDict, possible: list[Architecture], request: Request) -> Iterator[Candidate]:
    """The first reading of each sub-tree as an architecture that fits, or else those that do not fit.

    Those with other heads come last, so that none leaves out one that is published.
    """
    unfit = list[tuple[Architecture, str]]()
    for architecture in possible:
        landmarks = architecture.landmarks
        for prefix in state.prefixes_with(landmarks) if landmarks else state.common_prefixes:
            published = list(_as_architecture(state, architecture, prefix, request))
            yield from published
            if all(candidate.mismatch or candidate.doubtful for candidate in published):
                unfit.append((architecture, prefix))
    for architecture, prefix in unfit:
        for headed in _with_other_heads(state, architecture, prefix):
            with contextlib.suppress(CheckpointError):  # what they replace is not linear
                yield from _as_architecture(state, headed, prefix, request)


def _with_other_heads(state: StateDict, architecture: Architecture, prefix: str) -> Iterator[Architecture]:
    """The architecture with the heads that a state dict may have in the place of its own, or elsewhere."""
    base, alterations = unaltered(architecture)
    if base.classifier is None or base.is_guessed:
        return
    layer, around = (prefix + head_root(base.classifier, is_whole) for is_whole in (False, True))
    places = [(layer, False), (around, True), *((place, False) for place in _elsewhere(state, base, prefix))]
    for place, is_whole in dict.fromkeys(places):
        head = told_head(state.shapes_below(place), is_whole)
        if head and (headed := with_head(base, head, "")):
            yield altered(headed, *alterations)


def _elsewhere(state: StateDict, architecture: Architecture, prefix: str) -> Iterator[str]:
    """The modules that may be the network's head, if that lies elsewhere: all matrices beside its body are in them."""
    own = torch_shapes(abstract_shapes(architecture, UNKNOWN_CLASSES, architecture.image_sizes[0]))
    last = head_root(architecture.classifier or "", is_whole=False)
    body = {prefix + name for name in own if not is_below(name, (last,))}
    place = module_of([name for name in state.full if name not in body and len(state[name].shape) > 1])
    if place is not None:
        yield place
        if place.rpartition(".")[2].isdigit():
            yield place.rpartition(".")[0]


def _as_architecture(
    state: StateDict, architecture: Architecture, prefix: str, request: Request
) -> Iterator[Candidate]:
    """The state dict as this architecture, for each image size that it may be of until one fits."""
    likely = (request.hints.image_size,) if request.hints.image_size else ()
    for image_size in (request.image_size,) if request.image_size else (*likely, *architecture.image_sizes):
        candidate = _of_size(state, architecture, prefix, request, image_size)
        yield candidate
        if not candidate.mismatch:
            return


def _of_size(
    state: StateDict, architecture: Architecture, prefix: str, request: Request, image_size: ImageSize
) -> Candidate:
    def read(classes: int) -> Reading:
        shapes = torch_shapes(abstract_shapes(architecture, classes, image_size))
        # A guess is of the names that are there: none of them is moved.
        classifier = None if architecture.is_guessed else architecture.classifier
        return read_as(state, prefix, shapes, classifier, architecture.unused)

    num_classes = request.num_classes or _classes(architecture, state, prefix, request.hints.num_classes)
    reading = read(num_classes or UNKNOWN_CLASSES)
    moved = reading.names.get(architecture.classifier or "")
    if num_classes is None and moved is not None and state.tensors[moved].shape:
        num_classes = state.tensors[moved].shape[0]
        reading = read(num_classes)
    candidate = Candidate(architecture, num_classes or UNKNOWN_CLASSES, image_size, reading)
    if reading.mismatch:
        return candidate
    normalization, explained = find_normalization(state, reading.beside, architecture.channels) or (None, set())
    if architecture.is_guessed:
        beside = [name for name in reading.beside if state.tensors[name].dtype.kind not in "biu"]
    else:
        beside = doubtful(state, reading, architecture.channels, num_classes or 0)
    unexplained = tuple(name for name in beside if name not in explained)
    return replace(candidate, doubtful=unexplained, normalization=normalization)


def _classes(architecture: Architecture, state: StateDict, prefix: str, likely: int | None) -> int | None:
    if architecture.classifier:
        name = prefix + architecture.classifier
        weight = state[name] if name in state.full else None
    else:
        matrices = [name for name in state.full if name.startswith(prefix) and len(state[name].shape) == 2]
        weight = state[matrices[-1]] if matrices else None
    told = weight.shape[0] if weight is not None and weight.shape else 0
    classes = told if architecture.classifier else likely or told
    return classes if 0 < classes <= MAX_CLASSES else None
