"""Which of several networks with the same names and shapes a checkpoint is, told by clean images without their labels.

Strides, pooling, activations and what a shortcut reads leave no trace in a state dict, but in what BatchNorm recorded:
in the network that was trained, the statistics of each BatchNorm's input on clean images are those that it holds.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ibau_jax.batches import to_unit
from ibau_jax.checkpoints.checkpoint import Checkpoint
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import CheckpointError
from ibau_jax.metrics import predict_where_finite
from ibau_jax.models import Architecture, Normalization
from ibau_jax.models.alterations import ALTERATIONS
from ibau_jax.models.custom import is_own
from ibau_jax.models.layers import ABSTRACT
from ibau_jax.models.normalized import normalized_model
from ibau_jax.models.registry import altered, neighbours, unaltered
from ibau_jax.models.running_statistics import DiscrepancyExceeded, Statistics, discrepancies, distances
from ibau_jax.plausibility import EXPLAINED, SUBSTANTIAL, SURE, agreement

IMAGES, PIXELS = 100, 2**20  # to measure the statistics on: at most so many of each, in one batch
LABELLED = 500  # to measure accuracy on, where statistics do not decide
SMALL, SMALL_PIXELS = 2000, 2**21  # of small networks without statistics more, of at most so many pixels
# Of the right network at most 0.006, with another activation or pooling 0.0096 and more: chosen on badnets_8, l0_inv_0,
# gtsrb-wanet-4-1 and cifar-clean-0, the same on ten other models (docs/converting.md).
IMPLAUSIBLE = 0.012
MOVED = 0.25  # share of the layers whose statistics a backdoor or augmentation may have moved far
CLIMBED = 3  # of altered networks, the likeliest that are altered further
NEGLIGIBLE = 0.1  # networks are not told apart whose distance is less than so much of the discrepancy
DECIDED = 1 / 3  # part of the way from one network to another that clean images have to be past the middle


@dataclass(frozen=True)
class Evidence:
    """What clean images say for an architecture.

    Attributes:
        architecture: which.
        layers: the discrepancy of each BatchNorm layer; see `discrepancies`.
        seen: the statistics of each BatchNorm's input on the images.
        n_images: how many images it is from.
        hits: which images are classified as labelled, where the discrepancies of several do not decide.
        classifies_well: the images are classified as labelled far more often than not; None where nobody asked.
    """

    architecture: Architecture
    layers: Float[np.ndarray, " layers"]
    seen: Statistics = field(repr=False)
    n_images: int
    hits: Bool[np.ndarray, " n"] | None = field(default=None, repr=False)
    classifies_well: bool | None = None

    @property
    def accuracy(self) -> float | None:
        """The share of images classified as labelled, where labels were asked."""
        return None if self.hits is None else float(np.mean(self.hits))

    @property
    def discrepancy(self) -> float:
        """The mean over all layers; 0 without BatchNorm."""
        return float(self.layers.mean()) if len(self.layers) else 0.0

    @property
    def plausibility(self) -> float:
        """The mean without the quarter of the layers that is largest."""
        kept = len(self.layers) - int(MOVED * len(self.layers))
        return float(np.sort(self.layers)[:kept].mean()) if kept else 0.0

    @property
    def is_plausible(self) -> bool:
        """Whether this may be the network. Each image is one independent sample at least, so that chance alone makes a
        discrepancy of 1 / (4 n_images) at most.
        """
        return self.plausibility <= IMPLAUSIBLE + 1 / (4 * self.n_images)

    @property
    def is_changed(self) -> bool:
        """Whether it may be the network all the same, its weights changed after BatchNorm recorded.

        Fine-tuning with frozen statistics does that, and unlearning, which leaves what is recorded as it was.
        """
        return not self.is_plausible and bool(self.classifies_well)

    def beats(self, other: "Evidence") -> bool:
        """Whether it is the network, if it is one of the two.

        Held statistics h, seen a and b, and squared distances: if a is right, |h - b|² is |h - a|² + |a - b|², since
        what separates h from a has nothing to do with b; if b is right, the other way round. So their difference,
        divided by |a - b|², lies between 1 and -1.
        """
        apart = float(distances(self.seen, other.seen).mean()) if self.seen else 0.0
        gain = other.discrepancy - self.discrepancy
        return apart > NEGLIGIBLE * other.discrepancy and gain > DECIDED * apart

    def hits_more(self, other: "Evidence") -> bool:
        """Whether it classifies far more of the same images as labelled, not by chance (McNemar, 1947).

        A little more is no sign: what is pooled behind the last BatchNorm, say, may help by accident.
        """
        if self.hits is None or other.hits is None:
            return False
        gains = self.hits.astype(int) - other.hits
        return bool(np.sum(gains) > max(EXPLAINED * np.sum(~other.hits), SURE * np.sqrt(np.sum(gains**2))))

    def record(self) -> dict[str, Any]:
        """The evidence as JSON has it."""
        return {
            "model": self.architecture.name,
            "discrepancy": self.discrepancy,
            "plausibility": self.plausibility,
            "accuracy": self.accuracy,
            "classifies_well": self.classifies_well,
        }

    def __str__(self) -> str:
        statistics = f"{100 * self.discrepancy:.2f} % off" if len(self.layers) else "without BatchNorm"
        accuracy = "" if self.accuracy is None else f", ACC {100 * self.accuracy:.1f} %"
        return f"{self.architecture.name} {statistics}{accuracy}"


def weigh(
    checkpoint: Checkpoint, images: Dataset, normalization: Normalization | None, *, seed: int = 0
) -> list[Evidence]:
    """What clean images say for each architecture that the checkpoint may be, the likeliest first.

    It may be one of its `alternatives`, or one of them altered (`ibau_jax.models.alterations`) where images agree with
    that far better.

    Args:
        checkpoint: with its `alternatives`.
        images: clean ones; a random hundred of them is looked at, fewer where they are large.
        normalization: of the model's images.
        seed: of their choice.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    height, width = images.images.shape[1:3]
    few = to_unit(jnp.asarray(images.images[order[: min(IMAGES, max(8, PIXELS // (height * width)))]]))
    labelled = LABELLED
    if checkpoint.architecture.is_guessed:
        labelled = max(LABELLED, min(SMALL, SMALL_PIXELS // (height * width)))
    witness = _Witness(checkpoint, normalization, few, images.take(order[:labelled]))
    architectures = (checkpoint.architecture, *checkpoint.alternatives)
    known = list(witness.evidence_of(architectures, math.inf)) or [witness.evidence(checkpoint.architecture)]
    weighed = _with_alterations(witness, sorted(known, key=_discrepancy))
    first = weighed[0]  # where not even this is plausible, statistics decide nothing
    undecided = [one for one in weighed if one is first or not (first.is_plausible and first.beats(one))]
    by_labels_alone = first.architecture.is_guessed and not len(first.layers)
    if len(undecided) > 1 or by_labels_alone:
        counted = sorted(map(witness.counted, undecided), key=_misses)
        others = [one for one in weighed if one not in undecided]
        weighed = [*(_with_alterations_by_labels(witness, counted) if by_labels_alone else counted), *others]
    best, *rest = weighed
    if by_labels_alone:
        return [replace(best, classifies_well=witness.agrees(best.architecture, 0.0)), *rest]
    return weighed if best.is_plausible else [replace(best, classifies_well=witness.agrees(best.architecture)), *rest]


@dataclass(frozen=True)
class _Witness:
    """Clean images that are asked about a checkpoint: a few without their labels, and some with them."""

    checkpoint: Checkpoint
    normalization: Normalization | None
    few: Float[Array, "n h w c"]
    labelled: Dataset
    computed: dict[str, Evidence] = field(default_factory=dict)  # by the architecture's name
    exceeded: dict[str, float] = field(default_factory=dict)  # by the architecture's name, a limit that it exceeds
    classes: dict[str, Int[np.ndarray, " n"]] = field(default_factory=dict)  # predicted, by the architecture's name
    networks: dict[str, nnx.Module] = field(default_factory=dict)  # not altered, by the architecture's name

    def model(self, architecture: Architecture) -> nnx.Module:
        base, alterations = unaltered(architecture)
        if base.name not in self.networks:
            self.networks[base.name] = self.checkpoint.as_variant(base).network()
        network = nnx.clone(self.networks[base.name])
        for name in alterations:
            ALTERATIONS[name](network)
        return normalized_model(network, self.normalization)

    def evidence(self, architecture: Architecture, limit: float = math.inf) -> Evidence:
        """What the few images say of an architecture, computed once.

        Raises:
            DiscrepancyExceeded: the discrepancy exceeds `limit`, and was not computed before.
            TypeError, ValueError: the maps of the architecture have another size than its last layer takes, or are too
                small to be pooled.
        """
        name = architecture.name
        if limit <= self.exceeded.get(name, -math.inf):
            raise DiscrepancyExceeded
        if name not in self.computed:
            try:
                layers, statistics = discrepancies(self.model(architecture), self.few, limit)
            except DiscrepancyExceeded:
                self.exceeded[name] = limit
                raise
            self.computed[name] = Evidence(architecture, layers, statistics, len(self.few))
        return self.computed[name]

    def counted(self, evidence: Evidence) -> Evidence:
        """The evidence with what the labels say."""
        return replace(evidence, hits=self.predicted(evidence.architecture) == self.labelled.labels)

    def agrees(self, architecture: Architecture, least: float = SUBSTANTIAL) -> bool:
        """Says whether an architecture's classes and the labels agree by more than `least`, and not by chance."""
        return agreement(self.predicted(architecture), self.labelled.labels, -SURE) > least

    def predicted(self, architecture: Architecture) -> Int[np.ndarray, " n"]:
        """Predicts the class of each of the labelled images, once for each architecture."""
        if architecture.name not in self.classes:
            self.classes[architecture.name] = predict_where_finite(self.model(architecture), self.labelled)
        return self.classes[architecture.name]

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """What is altered in one way more, less or otherwise than an architecture."""
        if is_own(architecture.name):
            return []
        return neighbours(architecture, self.checkpoint.num_classes, self.checkpoint.image_size, ABSTRACT)

    def altered(self, evidence: Evidence) -> Iterator[Evidence]:
        """What the labels say of the neighbours of an architecture without BatchNorm."""
        for one in self.neighbours(evidence.architecture):
            with contextlib.suppress(TypeError, ValueError):  # its maps have another size than its last layer takes
                yield self.counted(Evidence(one, evidence.layers, evidence.seen, evidence.n_images))

    def better(self, than: Evidence, best: Evidence) -> Iterator[Evidence]:
        """The neighbours of an architecture that beat it, and the best one."""
        least = min(than.discrepancy, best.discrepancy)
        for one in self.evidence_of(self.neighbours(than.architecture), least) if least else ():
            if one.beats(than) and one.beats(best):
                yield one

    def evidence_of(self, architectures: Iterable[Architecture], limit: float) -> Iterator[Evidence]:
        """What the few images say of the architectures that do not exceed a discrepancy."""
        for one in architectures:
            try:
                evidence = self.evidence(one, limit)
            except (DiscrepancyExceeded, TypeError, ValueError):
                continue
            yield evidence


def _with_alterations(witness: _Witness, known: list[Evidence]) -> list[Evidence]:
    """What is known, and before it an architecture that is altered, where one beats all of it and is plausible.

    A hill climb: the alterations of all that may be the network, then those of what was the best of them, and of its
    relatives altered likewise, until nothing is better.
    """
    best, possible = known[0], [one for one in known if one is known[0] or one.is_plausible]
    while found := [other for one in possible for other in witness.better(one, best)]:
        least = min(found, key=_discrepancy)
        best = next(one for one in found if not least.beats(one))  # of what can't be told apart, the more common
        _, names = unaltered(best.architecture)
        likewise = witness.evidence_of(_altered_likewise(witness, names), best.discrepancy)
        best = min([*likewise, best], key=_discrepancy)
        possible = [best, *(one for one in sorted(found, key=_discrepancy)[:CLIMBED] if one is not best)]
    return [best, *known] if best is not known[0] and best.is_plausible else known


def _with_alterations_by_labels(witness: _Witness, counted: list[Evidence]) -> list[Evidence]:
    """What the labels say of networks without BatchNorm, the best first, which may be altered.

    A hill climb from the best, and from those that are hardly worse: an alteration is taken where it classifies far
    more images as labelled. Averages in place of maximums are kept beside the best one where they are hardly worse.
    """
    best = counted[0]
    possible = [one for one in counted if not best.hits_more(one)][:CLIMBED]
    while found := [other for one in possible for other in witness.altered(one) if other.hits_more(best)]:
        best = min(found, key=_misses)
        possible = [best]
    pooled = [one for one in witness.altered(best) if _averages(one) != _averages(best) and not best.hits_more(one)]
    return [best, *pooled, *(one for one in counted if one is not best)]


def _averages(evidence: Evidence) -> bool:
    """Whether an architecture is altered to average where it took maximums."""
    return "avg_pool" in unaltered(evidence.architecture)[1]


def _misses(evidence: Evidence) -> float:
    return 1 - (evidence.accuracy or 0.0)


def _altered_likewise(witness: _Witness, names: tuple[str, ...]) -> Iterator[Architecture]:
    """The checkpoint's possible architectures altered by the same names, where these change something of them."""
    for one in (witness.checkpoint.architecture, *witness.checkpoint.alternatives):
        candidate = altered(unaltered(one)[0], *names)
        with contextlib.suppress(CheckpointError):
            candidate.build(witness.checkpoint.num_classes, witness.checkpoint.image_size, ABSTRACT)
            yield candidate


def _discrepancy(evidence: Evidence) -> float:
    return evidence.discrepancy


def check_evidence(evidence: Sequence[Evidence]) -> None:
    """Raises CheckpointError where not even the likeliest architecture agrees with clean images or their labels.

    One that is made up from names and shapes also has to agree far better than the others.
    """
    if evidence[0].architecture.is_guessed:
        _check_guess(*evidence)
    if evidence[0].is_plausible or evidence[0].is_changed:
        return
    raise CheckpointError(
        "the statistics in the checkpoint's BatchNorm layers are not those of the clean images, so this is another "
        f"network with the same names and shapes, or these are not its images, normalised as it takes them "
        f"({'; '.join(map(str, evidence))}; the right one is mostly below {100 * IMPLAUSIBLE:g} % off)"
    )


def _check_guess(best: Evidence, *others: Evidence) -> None:
    """Raises CheckpointError where labels have to decide and do not."""
    if best.hits is None:
        return
    if not len(best.layers) and not best.classifies_well:
        raise CheckpointError(
            "no network that was tried for these names and shapes classifies the clean images better than chance "
            f"({'; '.join(map(str, (best, *others)))}): it is another one, these are not its images, normalised as it "
            "takes them, or they are too few"
        )
    if rivals := [one for one in others if one.hits is not None and not best.hits_more(one)]:
        raise CheckpointError(
            f"several networks have these names and shapes, and {len(best.hits)} clean images do not tell them apart "
            f"({'; '.join(map(str, (best, *rivals)))}). More images may; --model NAME says which it is"
        )


def settle(checkpoint: Checkpoint, images: Dataset) -> Checkpoint:
    """The checkpoint as the architecture that clean images agree with best, of all that have its names and shapes.

    Args:
        checkpoint: as `ibau_jax.load` gives it, which assumes the most common of several architectures.
        images: clean images of the model's size.

    Raises:
        CheckpointError: none agrees with them.
    """
    evidence = weigh(checkpoint, images, checkpoint.normalization)
    check_evidence(evidence)
    return checkpoint.as_variant(evidence[0].architecture)
