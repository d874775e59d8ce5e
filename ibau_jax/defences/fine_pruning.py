"""FP: fine-pruning (Liu et al., RAID 2018).

The channels of the last convolution that clean images leave dormant are pruned, as many as clean accuracy allows; then
the model is fine-tuned.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from ibau_jax.batches import make_batches, to_unit
from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import OnEpoch, TuneConfig, tuned
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.metrics import predict
from ibau_jax.models.taps import tapped

Path = tuple[Any, ...]


@dataclass(frozen=True)
class PruneConfig(TuneConfig):
    """BackdoorBench's constants."""

    max_acc_drop: float = 0.1
    """accuracy that pruning may cost on the clean images"""
    step: float = 0.01
    """share of the channels that is pruned at a time"""


class Last(NamedTuple):
    """The last convolution: its place, that of the BatchNorm behind it, and its channels' mean activation."""

    conv: Path
    norm: Path | None
    activity: Float[np.ndarray, " c"]


def last_convolution(model: nnx.Module, clean_set: Dataset) -> Last:
    """Finds it by running the model; the activation is what is positive, as ReLU leaves it.

    Raises:
        ConfigError: the model has no convolution.
    """
    graph, state = nnx.split(model)
    places: list[tuple[Path, Path | None]] = []

    @jax.jit
    def activity(state: Any, images: Any) -> Any:
        merged = nnx.merge(graph, state)
        with tapped() as taps:
            merged(to_unit(images))
        if not taps.convolutions:
            raise ConfigError("fp prunes the last convolution, and this model has none")
        conv, norm, output = taps.convolutions[-1]
        paths = {id(module): path for path, module in nnx.iter_graph(merged)}
        places.append((paths[id(conv)], paths[id(norm)] if norm is not None else None))
        return jnp.mean(jax.nn.relu(output), axis=(1, 2))

    batches = make_batches(clean_set, 200)
    each = [np.asarray(activity(state, images)) for images in batches.images]
    return Last(*places[0], np.concatenate(each)[: len(clean_set)].mean(axis=0))


def without(model: nnx.Module, last: Last, channels: np.ndarray) -> nnx.Module:
    """The model with those channels of the last convolution, and of the BatchNorm behind it, set to zero."""
    copy: nnx.Module = nnx.clone(model)
    kept = np.ones(len(last.activity), np.float32)
    kept[channels] = 0
    for path, module in nnx.iter_graph(copy):
        if path in (last.conv, last.norm) and isinstance(module, nnx.Module):
            for name in ("kernel", "bias", "scale"):
                leaf = getattr(module, name, None)
                if leaf is not None:
                    leaf[...] = leaf[...] * jnp.asarray(kept).reshape((1,) * (leaf.ndim - 1) + (-1,))
    return copy


def prune(model: nnx.Module, clean_set: Dataset, config: PruneConfig) -> nnx.Module:
    """Prunes the most dormant channels, more and more, until accuracy on the clean images falls too far."""
    last = last_convolution(model, clean_set)
    order, count = np.argsort(last.activity, kind="stable"), len(last.activity)
    least = np.mean(predict(model, clean_set) == clean_set.labels) - config.max_acc_drop
    kept, stride = model, max(1, round(config.step * count))
    for number in range(stride, count, stride):
        candidate = without(model, last, order[:number])
        if np.mean(predict(candidate, clean_set) == clean_set.labels) < least:
            break
        kept = candidate
    return kept


@defence("fp", "Liu et al., Fine-Pruning, RAID 2018", PruneConfig)
def fine_prune(
    model: nnx.Module, clean_set: Dataset, config: PruneConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Prunes, then fine-tunes."""
    return tuned(prune(model, clean_set, config), clean_set, config, execution=execution, on_epoch=on_epoch)
