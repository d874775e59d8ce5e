"""Which of several networks with the same names and shapes a checkpoint is, told by clean images without their labels.

Strides, pooling, activations and what a shortcut reads leave no trace in a state dict, but in what BatchNorm recorded:
in the network that was trained, the statistics of each BatchNorm's input on clean images are those that it holds.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.batches import to_unit
from ibau_jax.checkpoints.checkpoint import Checkpoint
from ibau_jax.compilation import compiler_options
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import CheckpointError
from ibau_jax.functional import split_weights, training_copy
from ibau_jax.metrics import predict_where_finite
from ibau_jax.models import Architecture, Normalization
from ibau_jax.models.normalized import normalized_model

IMAGES, PIXELS = 100, 2**20  # to measure the statistics on: at most so many of each, in one batch
LABELLED = 500  # to measure accuracy on, where statistics do not decide
# Of the right network at most 0.006, with another activation or pooling 0.0096 and more: chosen on badnets_8, l0_inv_0,
# gtsrb-wanet-4-1 and cifar-clean-0, the same on ten other models (docs/converting.md).
IMPLAUSIBLE = 0.012
MOVED = 0.25  # share of the layers whose statistics a backdoor or augmentation may have moved far
EPSILON = 1e-5  # PyTorch's default
UNDECIDED = 1.5  # a network whose discrepancy is no more than so many times the smallest may be the right one, too


@dataclass(frozen=True)
class Evidence:
    """What clean images say for an architecture.

    Attributes:
        architecture: which.
        layers: the discrepancy of each BatchNorm layer; see `discrepancies`.
        n_images: how many images it is from.
        accuracy: share of images classified as labelled, where the discrepancies of several do not decide.
    """

    architecture: Architecture
    layers: Float[np.ndarray, " layers"]
    n_images: int
    accuracy: float | None = None

    @property
    def discrepancy(self) -> float:
        """The mean over all layers; 0 without BatchNorm."""
        return float(self.layers.mean()) if len(self.layers) else 0.0

    @property
    def plausibility(self) -> float:
        """The mean without the quarter of the layers that is largest."""
        kept = len(self.layers) - int(MOVED * len(self.layers))
        return float(np.sort(self.layers)[:kept].mean()) if kept else 0.0

    def record(self) -> dict[str, Any]:
        """The evidence as JSON has it."""
        return {
            "model": self.architecture.name,
            "discrepancy": self.discrepancy,
            "plausibility": self.plausibility,
            "accuracy": self.accuracy,
        }

    def __str__(self) -> str:
        statistics = f"{100 * self.discrepancy:.2f} % off" if len(self.layers) else "without BatchNorm"
        accuracy = "" if self.accuracy is None else f", ACC {100 * self.accuracy:.1f} %"
        return f"{self.architecture.name} {statistics}{accuracy}"


def discrepancies(model: nnx.Module, images: Float[Array, "n h w c"]) -> Float[np.ndarray, " layers"]:
    """How far the statistics of each BatchNorm's input on `images` are from those that it holds, in [0, 1].

    The squared Hellinger distance of two normal distributions, one with the held mean and variance of a channel, one
    with those of the images, averaged over channels. The model runs in training mode, as it did when it recorded them.

    Args:
        model: maps images, float32 in [0, 1], to logits.
        images: clean ones.

    Returns:
        A number for each layer that the network uses.
    """
    copy = training_copy(model)
    for _, module in nnx.iter_graph(copy):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0  # what it holds afterwards is of these images alone
    graph, weights = nnx.split(copy)[0], split_weights(copy)
    held = {path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(weights.rest)}
    seen = {
        path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(_run()(graph, *weights, images))
    }
    layers = []
    for path in held:
        variance = (*path[:-1], "var")
        if path[-1] == "mean" and not np.array_equal(held[path], seen[path]):  # else the network does not use it
            distance = _squared_hellinger(held[path], held[variance], seen[path], seen[variance])
            layers.append(np.nan_to_num(distance, nan=1.0).mean())  # what is not finite agrees with nothing
    return np.asarray(layers)


@functools.cache
def _run() -> Callable[..., Any]:
    """What a model in training mode holds beside its weights after a batch; one compilation serves all its weights."""

    def run(graph: nnx.GraphDef, params: Any, rest: Any, images: Float[Array, "n h w c"]) -> Any:
        merged = nnx.merge(graph, params, rest, copy=True)
        merged(images)
        return split_weights(merged).rest

    return jax.jit(run, static_argnums=0, compiler_options=compiler_options())


def _squared_hellinger(
    mean: Float[np.ndarray, " c"],
    variance: Float[np.ndarray, " c"],
    other_mean: Float[np.ndarray, " c"],
    other_variance: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " c"]:
    """Of normal distributions, their variances enlarged as BatchNorm enlarges them."""
    first, second = variance + EPSILON, other_variance + EPSILON
    total = first + second
    with np.errstate(invalid="ignore", over="ignore"):
        return 1 - np.sqrt(2 * np.sqrt(first * second) / total) * np.exp(-((mean - other_mean) ** 2) / (4 * total))


def weigh(
    checkpoint: Checkpoint, images: Dataset, normalization: Normalization | None, *, seed: int = 0
) -> list[Evidence]:
    """What clean images say for each architecture that the checkpoint may be, the likeliest first.

    Args:
        checkpoint: with its `alternatives`.
        images: clean ones; a random hundred of them is looked at, fewer where they are large.
        normalization: of the model's images.
        seed: of their choice.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    height, width = images.images.shape[1:3]
    few = to_unit(jnp.asarray(images.images[order[: min(IMAGES, max(8, PIXELS // (height * width)))]]))

    def model(architecture: Architecture) -> nnx.Module:
        return normalized_model(checkpoint.as_variant(architecture).network(), normalization)

    architectures = (checkpoint.architecture, *checkpoint.alternatives)
    weighed = [Evidence(one, discrepancies(model(one), few), len(few)) for one in architectures]
    weighed.sort(key=lambda one: one.discrepancy)
    close = [one for one in weighed if one.discrepancy <= UNDECIDED * weighed[0].discrepancy]
    if len(close) > 1:
        labelled = images.take(order[:LABELLED])
        for index, one in enumerate(close):
            right = predict_where_finite(model(one.architecture), labelled) == labelled.labels
            weighed[index] = replace(one, accuracy=float(np.mean(right)))
        weighed[: len(close)] = sorted(weighed[: len(close)], key=lambda one: -(one.accuracy or 0.0))
    return weighed


def check_evidence(evidence: Sequence[Evidence]) -> None:
    """Raises CheckpointError where not even the likeliest architecture agrees with clean images.

    Each image is one independent sample at least, so that chance alone makes a discrepancy of 1 / (4 n_images) at most.
    """
    if evidence[0].plausibility <= IMPLAUSIBLE + 1 / (4 * evidence[0].n_images):
        return
    raise CheckpointError(
        "the statistics in the checkpoint's BatchNorm layers are not those of the clean images, so this is another "
        f"network with the same names and shapes, or these are not its images, normalised as it takes them "
        f"({'; '.join(map(str, evidence))}; the right one is mostly below {100 * IMPLAUSIBLE:g} % off)"
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
