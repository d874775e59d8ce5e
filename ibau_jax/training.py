"""Trains a classifier, clean or poisoned: what audits and unlearning are tried on.

SGD with Nesterov momentum over one cosine cycle, weight decay on kernels, random crops and flips. A poisoned image gets
its trigger after the crop, as an attacker who stamps the training images with a fixed trigger would have it there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.batches import Batches, make_batches, to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.loops import compile_loop
from ibau_jax.models.registry import Architecture
from ibau_jax.perturb import cross_entropies
from ibau_jax.placement import Placement, make_mesh
from ibau_jax.triggers import Stamp

Images = Float[Array, "n h w c"]


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
    shuffled = np.random.default_rng(config.seed)
    carry, place = _start(model, len(dataset), config), Placement(make_mesh(1, 1))
    loop = None
    for epoch in range(config.epochs):
        order = shuffled.permutation(len(dataset))[: len(dataset) // config.batch_size * config.batch_size]
        marked = Dataset(dataset.images[order], labels[order])
        batches = make_batches(marked, config.batch_size)._replace(
            weights=poisoned[order].reshape(-1, config.batch_size).astype(np.float32)
        )
        if loop is None:
            step = train_step(model, len(dataset), config, poison)
            loop = compile_loop(step, carry, batches, (), execution=execution, placement=place)
        carry, losses = loop.run(carry, batches, ())
        if on_epoch:
            on_epoch(epoch + 1, float(np.mean(losses)))
    params, rest, _, _ = carry
    trained = nnx.merge(nnx.split(model, nnx.Param, ...)[0], params, rest)
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
    _, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    start = (params, rest, _optimizer(count, config).init(params), jax.random.key_data(jax.random.key(config.seed)))
    return Placement(make_mesh(1, 1)).members(start)


def train_step(model: nnx.Module, count: int, config: TrainConfig, poison: Poison | None) -> Callable[..., Any]:
    """One step: `step((params, rest, optimizer_state, key), batch, ())`; a batch's weights say which are poisoned."""
    graph, _, _ = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    optimizer = _optimizer(count, config)

    def loss(params: Any, rest: Any, images: Images, labels: Array) -> tuple[Array, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        logits = merged(images)
        return jnp.mean(cross_entropies(logits, labels)), nnx.split(merged, nnx.Param, ...)[2]  # type: ignore[misc]

    def step(carry: Any, batch: Batches, constant: tuple[()]) -> Any:
        params, rest, state, key_data = carry
        now, later = jax.random.split(jax.random.wrap_key_data(key_data))
        images = augmented(now, to_unit(batch.images), config)
        if poison:
            images = jnp.where(batch.weights[:, None, None, None] > 0, poison.stamp(images), images)
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, images, batch.labels)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), rest, state, jax.random.key_data(later)), value

    return step


def augmented(key: Array, images: Images, config: TrainConfig) -> Images:
    """Each image moved by up to `crop` pixels, its border repeated, and mirrored half of the time if `flip`."""
    move_key, flip_key = jax.random.split(key)
    border = config.crop
    padded = jnp.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")
    corners = jax.random.randint(move_key, (len(images), 2), 0, 2 * border + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    moved = cut(padded, corners)
    mirrored = jax.random.bernoulli(flip_key, 0.5 if config.flip else 0.0, (len(images),))
    return jnp.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)
