"""Passes over images in shuffled batches: the loop of all training, from scratch and by other defences."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from ibau_jax.batches import AnyArray, Batches, make_batches
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.loops import compile_loop
from ibau_jax.placement import Placement
from ibau_jax.poisoning import CLEAN

PyTree = Any


class Planted(NamedTuple):
    """Of all images of an epoch: which attack's trigger each gets, or CLEAN, or a decoy; and what it is learnt as."""

    what: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


Plan: TypeAlias = Callable[[int], Planted]  # of an epoch, by its number from 1


class TrainingBatch(NamedTuple):
    """Images with the labels to learn, and which attack's trigger each gets, or CLEAN, or a decoy."""

    batch: Batches
    planted: Int[AnyArray, "*b n"]


def run_epochs(
    step: Callable[..., Any],
    carry: PyTree,
    dataset: Dataset,
    config: TrainConfig,
    *,
    constant: PyTree = (),
    plan: Plan | None = None,
    done: int = 0,
    execution: Execution = DEFAULT_EXECUTION,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> Iterator[tuple[PyTree, float]]:
    """Runs `carry, loss = step(carry, batch, constant)` over all batches of the epochs, but the first `done` ones.

    `plan` says what images get in each epoch, and what they are learnt as; without one nothing, and their labels.

    Yields:
        The carry after each epoch, and the mean loss.

    Raises:
        ConfigError: a loss became NaN or infinite.
    """
    place, loop = Placement.one_device(), None
    carry, constant = place.members(carry), place.members(constant)
    clean = Planted(np.full(len(dataset), CLEAN, np.int32), dataset.labels)
    for epoch, order in enumerate(batch_orders(len(dataset), config), start=1):
        if epoch <= done:
            continue
        planted = plan(epoch) if plan else clean
        images = replace(dataset, labels=planted.labels).take(order.ravel())
        batches = TrainingBatch(make_batches(images, config.batch_size), planted.what[order])
        loop = loop or compile_loop(step, carry, batches, constant, execution=execution, placement=place)
        carry, losses = loop.run(carry, batches, constant, _counted(on_batch, epoch, len(batches.planted)))
        if not np.isfinite(losses).all():
            raise ConfigError(f"the loss became NaN or infinite in epoch {epoch}; try a smaller learning rate")
        yield carry, float(np.mean(losses))


def batch_orders(count: int, config: TrainConfig) -> Iterator[Int[np.ndarray, "batches n"]]:
    """Which images are in each batch, epoch after epoch; a remainder smaller than a batch is left out of each."""
    rng = np.random.default_rng(config.seed)
    for _ in range(config.epochs):
        order = rng.permutation(count)
        yield order[: count // config.batch_size * config.batch_size].reshape(-1, config.batch_size)


def most_in_a_batch(what: int, plan: Plan, count: int, config: TrainConfig) -> int:
    """How many of `count` images get the same, such as an attack's trigger, in a batch at most."""
    orders = enumerate(batch_orders(count, config), start=1)
    return max(int((plan(epoch).what[order] == what).sum(axis=1).max()) for epoch, order in orders)


def _counted(on_batch: Callable[[int, int, int], None] | None, epoch: int, count: int) -> Callable[[int], None] | None:
    return (lambda done: on_batch(epoch, done, count)) if on_batch else None
