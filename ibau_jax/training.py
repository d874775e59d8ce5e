"""Trains a classifier, clean or poisoned: what audits and unlearning are tried on.

SGD with Nesterov momentum over one cosine cycle, weight decay on kernels, random crops and flips. A poisoned image gets
its trigger after the crop, as an attacker who stamps the training images with a fixed trigger would have it there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ibau_jax.augmentation import augmented
from ibau_jax.batches import AnyArray, Batches, make_batches, to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError, DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Params, Rest, Weights, split_weights
from ibau_jax.loops import compile_loop
from ibau_jax.models.registry import Architecture
from ibau_jax.perturb import cross_entropies
from ibau_jax.placement import Placement
from ibau_jax.poisoning import CLEAN, Poison

Images = Float[Array, "n h w c"]
PyTree = Any
Run = Callable[[Params, Rest, Images], tuple[Float[Array, "n classes"], Rest]]


class TrainingBatch(NamedTuple):
    """Images with the labels to learn, and which attack's trigger each gets, or CLEAN, or a decoy."""

    batch: Batches
    planted: Int[AnyArray, "*b n"]


@dataclass(frozen=True)
class TrainState:
    """Where training stands between two epochs: all it takes to go on.

    Attributes:
        weights: parameters and BatchNorm's statistics.
        optimizer_state: of SGD.
        key_data: of the random numbers to come.
        losses: the mean loss of each epoch done.
    """

    weights: Weights
    optimizer_state: Any = field(repr=False)
    key_data: Array = field(repr=False)
    losses: tuple[float, ...] = ()


def train(
    architecture: Architecture,
    num_classes: int,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    poison: Poison | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    state: TrainState | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> nnx.Module:
    """Trains a model from scratch.

    Args:
        architecture: what to train; its images have the data set's height and width.
        num_classes: of the classifier.
        dataset: at least a batch of images.
        config: schedule, augmentation, seed.
        poison: the attack; none trains a clean model.
        execution: precision.
        state: where to go on, as `on_epoch` got it.
        on_epoch: called after every epoch.
        on_batch: called with the epoch's number, from 1, the batches done and how many there are.

    Returns:
        The model, in inference mode.

    Raises:
        DataError: images or labels do not fit, or there are fewer images than a batch has, or too few to poison.
        ConfigError: the loss became NaN or infinite.
    """
    config = config or TrainConfig()
    model = untrained(architecture, num_classes, dataset, config)
    planted, labelled = planned(dataset, num_classes, poison, config.seed)
    state = state or start(model, len(dataset), config)
    step, done = train_step(model, len(dataset), config, poison), len(state.losses)
    carry = (state.weights, state.optimizer_state, state.key_data)
    for (weights, optimizer_state, key_data), loss in run_epochs(
        step, carry, labelled, config, planted=planted, done=done, execution=execution, on_batch=on_batch
    ):
        state = TrainState(weights, optimizer_state, key_data, (*state.losses, loss))
        if on_epoch:
            on_epoch(state)
    return trained(model, state.weights)


def run_epochs(
    step: Callable[..., Any],
    carry: PyTree,
    dataset: Dataset,
    config: TrainConfig,
    *,
    constant: PyTree = (),
    planted: Int[np.ndarray, " n"] | None = None,
    done: int = 0,
    execution: Execution = DEFAULT_EXECUTION,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> Iterator[tuple[PyTree, float]]:
    """Runs `carry, loss = step(carry, batch, constant)` over all batches of the epochs, but the first `done` ones.

    Yields:
        The carry after each epoch, and the mean loss.

    Raises:
        ConfigError: a loss became NaN or infinite.
    """
    place, loop = Placement.one_device(), None
    carry, constant = place.members(carry), place.members(constant)
    planted = np.full(len(dataset), CLEAN, np.int32) if planted is None else planted
    orders = np.random.default_rng(config.seed)
    for _ in range(done):
        orders.permutation(len(dataset))
    for epoch in range(done + 1, config.epochs + 1):
        batches = shuffled_batches(dataset, planted, config, orders)
        loop = loop or compile_loop(step, carry, batches, constant, execution=execution, placement=place)
        carry, losses = loop.run(carry, batches, constant, _counted(on_batch, epoch, len(batches.planted)))
        if not np.isfinite(losses).all():
            raise ConfigError(f"the loss became NaN or infinite in epoch {epoch}; try a smaller learning rate")
        yield carry, float(np.mean(losses))


def untrained(architecture: Architecture, num_classes: int, dataset: Dataset, config: TrainConfig) -> nnx.Module:
    """A model with random weights, in training mode; raises DataError where the images do not fit it."""
    dataset.check_fits((*dataset.images.shape[1:3], architecture.channels), num_classes)
    if len(dataset) < config.batch_size:
        raise DataError(f"{dataset.name} has {len(dataset)} images, fewer images than a batch of {config.batch_size}")
    model = architecture.build(num_classes, dataset.images.shape[1], nnx.Rngs(config.seed))
    initialise(model, config.seed)
    set_training(model, True)
    return model


def planned(
    dataset: Dataset, num_classes: int, poison: Poison | None, seed: int
) -> tuple[Int[np.ndarray, " n"], Dataset]:
    """What each image gets, and the images with the labels that they are learnt as."""
    if poison is None:
        return np.full(len(dataset), CLEAN, np.int32), dataset
    chosen = poison.chosen(dataset.labels, num_classes, seed)
    return chosen, replace(dataset, labels=poison.labels(dataset.labels, chosen, num_classes))


def shuffled_batches(
    dataset: Dataset, planted: np.ndarray, config: TrainConfig, orders: np.random.Generator
) -> TrainingBatch:
    """The next epoch's batches in an order of its own; a remainder smaller than a batch is left out."""
    order = orders.permutation(len(dataset))
    order = order[: len(dataset) // config.batch_size * config.batch_size]
    batches = make_batches(dataset.take(order), config.batch_size)
    return TrainingBatch(batches, planted[order].reshape(-1, config.batch_size))


def trained(model: nnx.Module, weights: Weights) -> nnx.Module:
    """A model with other weights, in inference mode."""
    merged: nnx.Module = nnx.merge(nnx.split(model)[0], *weights)
    set_training(merged, False)
    return merged


def _counted(on_batch: Callable[[int, int, int], None] | None, epoch: int, count: int) -> Callable[[int], None] | None:
    return (lambda done: on_batch(epoch, done, count)) if on_batch else None


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


def start(model: nnx.Module, count: int, config: TrainConfig) -> TrainState:
    """The state before the first epoch."""
    weights, key = split_weights(model), jax.random.key(config.seed)
    return TrainState(weights, _optimizer(count, config).init(weights.params), jax.random.key_data(key))


def make_run(model: nnx.Module) -> Run:
    """The model as a function of its weights and images that gives logits and what else it then holds."""
    graph = nnx.split(model)[0]

    def run(params: Params, rest: Rest, images: Images) -> tuple[Float[Array, "n classes"], Rest]:
        merged = nnx.merge(graph, params, rest, copy=True)
        logits = merged(images)
        return logits, split_weights(merged).rest

    return run


def train_step(model: nnx.Module, count: int, config: TrainConfig, poison: Poison | None) -> Callable[..., Any]:
    """One step: `step((weights, optimizer_state, key), batch, ())` gives the next and the loss."""
    run, optimizer = make_run(model), _optimizer(count, config)

    def loss(params: Any, rest: Any, images: Images, labels: Array) -> tuple[Array, Any]:
        logits, rest = run(params, rest, images)
        return jnp.mean(cross_entropies(logits, labels)), rest

    def step(carry: Any, training: TrainingBatch, constant: tuple[()]) -> Any:
        (params, rest), state, key_data = carry
        batch = training.batch
        now, later = jax.random.split(jax.random.wrap_key_data(key_data))
        images = augmented(now, to_unit(batch.images), config.crop, config.flip)
        if poison:
            images = poison.stamped(jax.random.fold_in(now, 0), images, training.planted)
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, images, batch.labels)
        updates, state = optimizer.update(gradient, state, params)
        return (Weights(optax.apply_updates(params, updates), rest), state, jax.random.key_data(later)), value

    return step
