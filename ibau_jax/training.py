"""Trains a classifier, clean or poisoned: what audits and unlearning are tried on.

SGD with Nesterov momentum over one cosine cycle, weight decay on kernels, random crops and flips. A poisoned image gets
its trigger after the crop, as an attacker who stamps the training images with a fixed trigger would have it there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.augmentation import augmented
from ibau_jax.batches import to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.epochs import Plan, Planted, TrainingBatch, run_epochs
from ibau_jax.errors import DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Weights, make_run, set_training, split_weights, with_weights
from ibau_jax.image_size import ImageSize
from ibau_jax.models.registry import Architecture
from ibau_jax.poisoning import CLEAN, Poison
from ibau_jax.trigger_learning import Learner, Learning, learn_mask, learners_of
from ibau_jax.triggers import Attack, Stamp

Images = Float[Array, "n h w c"]


class Carry(NamedTuple):
    """What a step of training changes.

    Attributes:
        weights: parameters and BatchNorm's statistics.
        optimizer_state: of SGD.
        key_data: of the random numbers to come.
        learning: how far the triggers that are learnt are, by the attack's number.
    """

    weights: Weights
    optimizer_state: Any
    key_data: Array
    learning: dict[int, Learning]


@dataclass(frozen=True)
class TrainState:
    """Where training stands between two epochs: all it takes to go on, and the mean loss of each epoch done."""

    carry: Carry = field(repr=False)
    losses: tuple[float, ...] = ()


class Trained(NamedTuple):
    """A model in inference mode, and the attacks that open it; those whose trigger is learnt have it now."""

    model: nnx.Module
    attacks: tuple[Attack, ...]


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
) -> Trained:
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
        on_batch: called with the epoch's number, from 1, the batches done and how many there are; with epoch 0 while
            masks of triggers are learnt.

    Returns:
        The model and the attacks of `poison`.

    Raises:
        DataError: images or labels do not fit, or there are fewer images than a batch has, or too few to poison.
        ConfigError: the loss became NaN or infinite.
    """
    config = config or TrainConfig()
    model, plan, learners = _prepared(architecture, num_classes, dataset, config, poison)
    state = state or with_masks(
        start(model, len(dataset), config, learners), learners, dataset, config, execution, on_batch
    )
    epochs = run_epochs(
        train_step(model, len(dataset), config, poison, learners),
        state.carry,
        dataset,
        config,
        plan=plan,
        done=len(state.losses),
        execution=execution,
        on_batch=on_batch,
    )
    for carry, loss in epochs:
        state = TrainState(carry, (*state.losses, loss))
        if on_epoch:
            on_epoch(state)
    return Trained(with_weights(model, state.carry.weights), learnt_attacks(poison, learners, state))


def fresh_state(
    architecture: Architecture, num_classes: int, dataset: Dataset, config: TrainConfig, poison: Poison | None
) -> TrainState:
    """What `train` would start from, for its structure and shapes: masks of triggers that are learnt have yet to be."""
    model, _, learners = _prepared(architecture, num_classes, dataset, config, poison)
    return start(model, len(dataset), config, learners)


def _prepared(
    architecture: Architecture, num_classes: int, dataset: Dataset, config: TrainConfig, poison: Poison | None
) -> tuple[nnx.Module, Plan, dict[int, Learner]]:
    """The untrained model, what is planted, and what learns triggers."""
    model = untrained(architecture, num_classes, dataset, config)
    plan = planned(dataset, num_classes, poison, config.seed)
    return model, plan, learners_of(poison.learnt if poison else {}, plan, len(dataset), config)


def with_masks(
    state: TrainState,
    learners: dict[int, Learner],
    dataset: Dataset,
    config: TrainConfig,
    execution: Execution,
    on_batch: Callable[[int, int, int], None] | None,
) -> TrainState:
    """The state with the masks of triggers that are learnt, which learn first."""
    on_step = partial(on_batch, 0) if on_batch else None
    learning = dict(state.carry.learning)
    for number, learner in learners.items():
        mask = learn_mask(learner.stamp.mask, dataset, config, execution, on_step)
        learning[number] = learning[number]._replace(mask=mask)
    return replace(state, carry=state.carry._replace(learning=learning))


def learnt_attacks(poison: Poison | None, learners: dict[int, Learner], state: TrainState) -> tuple[Attack, ...]:
    """The attacks of a poison, those whose trigger is learnt with the one that they have now."""
    stamps: dict[int, Stamp] = {
        number: learner.learnt(state.carry.learning[number]) for number, learner in learners.items()
    }
    attacks = poison.attacks if poison else ()
    return tuple(replace(attack, stamp=stamps.get(number, attack.stamp)) for number, attack in enumerate(attacks))


def untrained(architecture: Architecture, num_classes: int, dataset: Dataset, config: TrainConfig) -> nnx.Module:
    """A model with random weights, in training mode; raises DataError where the images do not fit it."""
    dataset.check_fits((*dataset.images.shape[1:3], architecture.channels), num_classes)
    if len(dataset) < config.batch_size:
        raise DataError(f"{dataset.name} has {len(dataset)} images, fewer images than a batch of {config.batch_size}")
    model = architecture.build(num_classes, ImageSize(*dataset.images.shape[1:3]), nnx.Rngs(config.seed))
    initialise(model, config.seed)
    set_training(model, True)
    return model


def planned(dataset: Dataset, num_classes: int, poison: Poison | None, seed: int) -> Plan:
    """What each image gets: the same in all epochs, but for triggers that are learnt."""

    def drawn(seed: int | Sequence[int]) -> Planted:
        if poison is None:
            return Planted(np.full(len(dataset), CLEAN, np.int32), dataset.labels)
        chosen = poison.chosen(dataset.labels, num_classes, seed)
        return Planted(chosen, poison.labels(dataset.labels, chosen, num_classes))

    if poison and poison.learnt:  # its attacker trains the model, and draws images anew
        return lambda epoch: drawn((seed, epoch))
    always = drawn(seed)
    return lambda epoch: always


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


def _optimizer(count: int, config: TrainConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_onecycle_schedule(config.epochs * (count // config.batch_size), config.lr, 0.25, 10, 1000)
    decay = optax.add_decayed_weights(config.weight_decay, _kernels)
    return optax.chain(decay, optax.sgd(schedule, config.momentum, nesterov=True))


def _kernels(params: Any) -> Any:
    """What decays: matrices and convolutions, no biases and no BatchNorm."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def start(model: nnx.Module, count: int, config: TrainConfig, learners: dict[int, Learner]) -> TrainState:
    """The state before the first epoch; masks of triggers that are learnt have yet to be."""
    weights, key = split_weights(model), jax.random.key(config.seed)
    learning = {number: learner.begin() for number, learner in learners.items()}
    optimizer_state = _optimizer(count, config).init(weights.params)
    return TrainState(Carry(weights, optimizer_state, jax.random.key_data(key), learning))


def train_step(
    model: nnx.Module, count: int, config: TrainConfig, poison: Poison | None, learners: dict[int, Learner]
) -> Callable[[Carry, TrainingBatch, tuple[()]], tuple[Carry, Array]]:
    """One step: the next carry, and the loss before it."""
    run, optimizer = make_run(model), _optimizer(count, config)

    def loss(theta: Any, carry: Carry, images: Images, training: TrainingBatch, key: Array) -> tuple[Array, Any]:
        params, of_patterns = theta
        drawn = {
            number: learner.drawn(of_patterns[number], carry.learning[number], images, training.planted == number)
            for number, learner in learners.items()
        }
        if poison:
            images = poison.stamped(
                key, images, training.planted, {number: found[0] for number, found in drawn.items()}
            )
        logits, rest = run(params, carry.weights.rest, images)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, training.batch.labels))
        value += sum(diversity for _, _, diversity in drawn.values())
        return value, (rest, {number: rest for number, (_, rest, _) in drawn.items()})

    def step(carry: Carry, training: TrainingBatch, constant: tuple[()]) -> tuple[Carry, Array]:
        now, later = jax.random.split(jax.random.wrap_key_data(carry.key_data))
        images = augmented(now, to_unit(training.batch.images), config.crop, config.flip)
        theta = carry.weights.params, {number: found.pattern.params for number, found in carry.learning.items()}
        differentiated = jax.value_and_grad(loss, has_aux=True)
        (value, (rest, rests)), (slope, slopes) = differentiated(
            theta, carry, images, training, jax.random.fold_in(now, 0)
        )
        updates, state = optimizer.update(slope, carry.optimizer_state, carry.weights.params)
        weights = Weights(optax.apply_updates(carry.weights.params, updates), rest)
        learning = {
            number: learner.stepped(carry.learning[number], slopes[number], rests[number])
            for number, learner in learners.items()
        }
        return Carry(weights, state, jax.random.key_data(later), learning), value

    return step
