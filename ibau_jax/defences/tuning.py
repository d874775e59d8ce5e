"""Fine-tuning on clean images: the loop that most defences are a variant of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ibau_jax.augmentation import augmented, may_mirror
from ibau_jax.batches import to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.epochs import TrainingBatch, run_epochs
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Params, Rest, Run, Weights, make_run, split_weights, training_copy, with_weights

OnEpoch = Callable[[int, int], None]
Images = Float[Array, "n h w c"]
Config = TypeVar("Config", bound="TuneConfig")


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """How BackdoorBench fine-tunes: SGD with momentum, the rate falling along a cosine, weight decay on everything.

    Raises:
        ConfigError: a value makes no sense.
    """

    epochs: int = 100
    """passes over the clean images"""
    batch_size: int = 256
    """images in a step, at most all; a remainder smaller than that is left out of each epoch"""
    lr: float = 0.01
    """learning rate at first"""
    seed: int = 2
    """seed of everything random"""

    def shortened(self, epochs: int) -> Self:
        """The same for so many passes."""
        return replace(self, epochs=epochs)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Of so many steps."""
        decay = optax.add_decayed_weights(self.weight_decay)
        return optax.chain(decay, optax.sgd(optax.cosine_decay_schedule(self.lr, steps), self.momentum))


class Sample(NamedTuple):
    """What a step sees: moved and mirrored images in [0, 1], their labels, and a key for what else is random."""

    images: Images
    labels: Int[Array, " n"]
    key: Array


class Slope(NamedTuple):
    """A loss, its gradient, and what else the model then holds."""

    loss: Float[Array, ""]
    gradient: Params
    rest: Rest


Gradient = Callable[[Weights, Sample, Weights], Slope]  # the last is the model as it came


def cross_entropy_gradient(run: Run, smoothing: float = 0.0) -> Gradient:
    """That of the mean cross-entropy, where the label's probability is 1 − `smoothing`."""

    def loss(params: Params, rest: Rest, sample: Sample) -> tuple[Array, Rest]:
        logits, rest = run(params, rest, sample.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, sample.labels)
        wrong = jnp.mean(losses)
        if smoothing:  # the other classes share it evenly
            others = -jnp.sum(jax.nn.log_softmax(logits), axis=1) - losses
            wrong = (1 - smoothing) * wrong + smoothing * jnp.mean(others) / (logits.shape[1] - 1)
        return wrong, rest

    def gradient(weights: Weights, sample: Sample, before: Weights) -> Slope:
        (value, rest), found = jax.value_and_grad(loss, has_aux=True)(*weights, sample)
        return Slope(value, found, rest)

    return gradient


def fitted(config: Config, model: nnx.Module, clean_set: Dataset) -> Config:
    """The configuration for these images: a batch has at most all; mirrored where the model tolerates it."""
    flip = config.flip or may_mirror("tolerated", model, clean_set)
    return replace(config, batch_size=min(config.batch_size, len(clean_set)), flip=flip)


def tuned(
    model: nnx.Module,
    clean_set: Dataset,
    config: TuneConfig,
    make_gradient: Callable[[Run], Gradient] = cross_entropy_gradient,
    execution: Execution = DEFAULT_EXECUTION,
    on_epoch: OnEpoch | None = None,
    *,
    training: bool = True,
    reference: nnx.Module | None = None,
) -> nnx.Module:
    """Fine-tunes a model.

    Args:
        model: not changed.
        clean_set: images and labels.
        config: the schedule.
        make_gradient: gives the gradient to follow, of the model as a function of its weights.
        execution: precision.
        on_epoch: see `Defence`.
        training: whether BatchNorm takes each batch's statistics.
        reference: the model whose weights the gradient sees beside; by default `model` as it came.
    """
    config = fitted(config, model, clean_set)
    copy = training_copy(model) if training else model
    weights, gradient = split_weights(copy), make_gradient(make_run(copy))
    optimizer = config.optimizer(config.epochs * (len(clean_set) // config.batch_size))
    carry = (weights, optimizer.init(weights.params), jax.random.key_data(jax.random.key(config.seed)))

    def step(carry: Any, batch: TrainingBatch, before: Weights) -> Any:
        weights, state, key_data = carry
        now, rest, later = jax.random.split(jax.random.wrap_key_data(key_data), 3)
        images = augmented(now, to_unit(batch.batch.images), config.crop, config.flip)
        slope = gradient(weights, Sample(images, batch.batch.labels, rest), before)
        updates, state = optimizer.update(slope.gradient, state, weights.params)
        params = optax.apply_updates(weights.params, updates)
        return (Weights(params, slope.rest), state, jax.random.key_data(later)), slope.loss

    before = split_weights(reference or model)
    epochs = run_epochs(step, carry, clean_set, config, constant=before, execution=execution)
    weights, *_ = last_of(epochs, config, on_epoch)
    return with_weights(copy, weights)


def last_of(epochs: Iterable[tuple[Any, float]], config: TuneConfig, on_epoch: OnEpoch | None) -> Any:
    """What `run_epochs` gives after the last epoch, of at least one."""
    last: Any = None
    for epoch, (carry, _) in enumerate(epochs, 1):
        last = carry
        if on_epoch:
            on_epoch(epoch, config.epochs)
    return last
