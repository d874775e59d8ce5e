"""Passes over images in shuffled batches: the loop of all training, from scratch and by other defences."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ibau_jax.batches import AnyArray, Batches, make_batches
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.loops import compile_loop
from ibau_jax.placement import Placement
from ibau_jax.poisoning import CLEAN

PyTree = Any


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
    for epoch, order in enumerate(batch_orders(len(dataset), config), start=1):
        if epoch <= done:
            continue
        batches = TrainingBatch(make_batches(dataset.take(order.ravel()), config.batch_size), planted[order])
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


def most_in_a_batch(chosen: Bool[np.ndarray, " n"], config: TrainConfig) -> int:
    """How many of these images a batch has at most."""
    return max(int(chosen[order].sum(axis=1).max()) for order in batch_orders(len(chosen), config))


def _counted(on_batch: Callable[[int, int, int], None] | None, epoch: int, count: int) -> Callable[[int], None] | None:
    return (lambda done: on_batch(epoch, done, count)) if on_batch else None
