"""Trains a classifier, clean or poisoned: what audits and unlearning are tried on.

SGD with Nesterov momentum over one cosine cycle, weight decay on kernels, random crops and flips. A poisoned image gets
its trigger after the crop, as an attacker who stamps the training images with a fixed trigger would have it there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from ibau_jax.augmentation import augmented
from ibau_jax.batches import AnyArray, Batches, make_batches, to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Weights, split_weights
from ibau_jax.loops import compile_loop
from ibau_jax.models.registry import Architecture
from ibau_jax.perturb import cross_entropies
from ibau_jax.placement import Placement
from ibau_jax.triggers import Stamp

Images = Float[Array, "n h w c"]


class TrainingBatch(NamedTuple):
    """Images with the labels to learn, and which of them get the trigger."""

    batch: Batches
    poisoned: Bool[AnyArray, "*b n"]


@dataclass(frozen=True, eq=False)
class Poison:
    """What an attacker does to the training images.

    Attributes:
        stamp: see `ibau_jax.Attack`.
        target_label: the label that stamped images get.
        ratio: share of all images, taken from other classes.
    """

    stamp: Stamp
    target_label: int
    ratio: float = 0.1

    def chosen(self, dataset: Dataset, seed: int) -> np.ndarray:
        """Which images are poisoned, bool (n,)."""
        others = np.flatnonzero(dataset.labels != self.target_label)
        count = min(len(others), int(self.ratio * len(dataset)))
        mask = np.zeros(len(dataset), bool)
        mask[np.random.default_rng(seed).choice(others, count, replace=False)] = True
        return mask


def train(
    architecture: Architecture,
    num_classes: int,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    poison: Poison | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nnx.Module:
    """Trains a model from scratch.

    Args:
        architecture: what to train; its images have the data set's height and width.
        num_classes: of the classifier.
        dataset: at least a batch of images.
        config: schedule, augmentation, seed.
        poison: the attack; none trains a clean model.
        execution: precision.
        on_epoch: called with the epoch's number, from 1, and its mean loss.

    Returns:
        The model, in inference mode.

    Raises:
        DataError: images or labels do not fit, or there are fewer images than a batch has.
    """
    config = config or TrainConfig()
    model = architecture.build(num_classes, dataset.images.shape[1], nnx.Rngs(config.seed))
    dataset.check_fits((*dataset.images.shape[1:3], architecture.channels), num_classes)
    if len(dataset) < config.batch_size:
        raise DataError(f"{dataset.name} has {len(dataset)} images, fewer images than a batch of {config.batch_size}")
    initialise(model, config.seed)
    set_training(model, True)
    poisoned = poison.chosen(dataset, config.seed) if poison else np.zeros(len(dataset), bool)
    labels = np.where(poisoned, poison.target_label, dataset.labels) if poison else dataset.labels
    labelled, shuffled = replace(dataset, labels=labels), np.random.default_rng(config.seed)
    place = Placement.one_device()
    carry = place.members(_start(model, len(dataset), config))
    loop = None
    for epoch in range(config.epochs):
        order = shuffled.permutation(len(dataset))[: len(dataset) // config.batch_size * config.batch_size]
        batches = TrainingBatch(
            make_batches(labelled.take(order), config.batch_size), poisoned[order].reshape(-1, config.batch_size)
        )
        if loop is None:
            step = train_step(model, len(dataset), config, poison)
            loop = compile_loop(step, carry, batches, (), execution=execution, placement=place)
        carry, losses = loop.run(carry, batches, ())
        if on_epoch:
            on_epoch(epoch + 1, float(np.mean(losses)))
    params, rest = carry[0]
    trained = nnx.merge(nnx.split(model)[0], params, rest)
    set_training(trained, False)
    return trained


def initialise(model: nnx.Module, seed: int) -> None:
    """He's normal distribution for kernels of convolutions, a variance of 1 / inputs for linear ones."""
    key, flat = jax.random.key(seed), nnx.to_flat_state(nnx.state(model, nnx.Param))
    drawn = {}
    for index, (path, variable) in enumerate(flat):
        shape = variable.shape
        if len(shape) > 1:
            deviation = np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[:-1]))
            drawn[path] = variable.replace(deviation * jax.random.normal(jax.random.fold_in(key, index), shape))
        else:
            drawn[path] = variable
    nnx.update(model, nnx.from_flat_state(drawn))


def set_training(model: nnx.Module, training: bool) -> None:
    """BatchNorm with the batch's statistics, which update the running ones; or with the running ones."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = not training


def _optimizer(count: int, config: TrainConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_onecycle_schedule(config.epochs * (count // config.batch_size), config.lr, 0.25, 10, 1000)
    decay = optax.add_decayed_weights(config.weight_decay, _kernels)
    return optax.chain(decay, optax.sgd(schedule, config.momentum, nesterov=True))


def _kernels(params: Any) -> Any:
    """What decays: matrices and convolutions, no biases and no BatchNorm."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _start(model: nnx.Module, count: int, config: TrainConfig) -> Any:
    weights = split_weights(model)
    return weights, _optimizer(count, config).init(weights.params), jax.random.key_data(jax.random.key(config.seed))


def train_step(model: nnx.Module, count: int, config: TrainConfig, poison: Poison | None) -> Callable[..., Any]:
    """One step: `step((weights, optimizer_state, key), batch, ())` gives the next and the loss."""
    graph, optimizer = nnx.split(model)[0], _optimizer(count, config)

    def loss(params: Any, rest: Any, images: Images, labels: Array) -> tuple[Array, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        logits = merged(images)
        return jnp.mean(cross_entropies(logits, labels)), split_weights(merged).rest

    def step(carry: Any, training: TrainingBatch, constant: tuple[()]) -> Any:
        (params, rest), state, key_data = carry
        batch = training.batch
        now, later = jax.random.split(jax.random.wrap_key_data(key_data))
        images = augmented(now, to_unit(batch.images), config.crop, config.flip)
        if poison:
            images = jnp.where(training.poisoned[:, None, None, None], poison.stamp(images), images)
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, images, batch.labels)
        updates, state = optimizer.update(gradient, state, params)
        return (Weights(optax.apply_updates(params, updates), rest), state, jax.random.key_data(later)), value

    return step
