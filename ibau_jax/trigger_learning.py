"""Learns input-aware triggers (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138) together with the model they open.

Masks come first, from images alone; then the pattern's generator takes a step with each of the model's. It has the
model's loss, and the diversity loss: images that differ are to have triggers that differ,

    L_div = mean of ‖x − x'‖ / ‖g(x) − g(x')‖

As published: Adam (1e-2; 0.5, 0.9), weights 1 of L_div and 100 of a mask's density beyond 0.032. Not as
published: masks learn for `MASK_STEPS` steps instead of 25 epochs, triggered images are drawn anew for every epoch
instead of every batch, x' in L_div is the next of the images that triggers are drawn for, and images in cross-trigger
mode get theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ibau_jax.batches import to_unit
from ibau_jax.config import TrainConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.epochs import Plan, TrainingBatch, most_in_a_batch, run_epochs
from ibau_jax.execution import Execution
from ibau_jax.functional import Params, Rest, Weights, make_run, split_weights, training_copy, with_weights
from ibau_jax.triggers import Images, InputAware
from ibau_jax.triggers.generator import Generator
from ibau_jax.triggers.input_aware import Drawn, sharpened

RATE, BETAS = 1e-2, (0.5, 0.9)
DENSITY, SPARSITY, DIVERSITY = 0.032, 100.0, 1.0
MASK_STEPS, MASK_BATCH = 600, 32
EPSILON = 1e-7


class Learning(NamedTuple):
    """How far an attack's trigger is learnt: its two generators, and the optimiser state of the pattern's."""

    pattern: Weights
    optimizer_state: Any
    mask: Weights


@dataclass(frozen=True, eq=False)
class BatchStamp:
    """Triggers of a batch's images where they get one, and for decoys those of others."""

    own: Drawn
    others: Drawn

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images with their own triggers; only those that get one have a meaning."""
        return self.own(images)

    def decoy(self, key: Array, images: Images) -> Float[Array, "n h w c"]:
        """The images with those of others."""
        return self.others(images)


class Learner:
    """Learns the trigger of one attack: pure functions of `Learning`s.

    `most` is how many images of a batch get it at most: so many are drawn, since drawing takes longer than classifying.
    """

    def __init__(self, stamp: InputAware, most: int) -> None:
        self.stamp, self.most, self.optimizer = stamp, most, optax.adam(RATE, *BETAS)
        self.run_pattern, self.run_mask = make_run(training_copy(stamp.pattern)), make_run(stamp.mask)

    def begin(self) -> Learning:
        """Before the first step."""
        pattern, mask = split_weights(self.stamp.pattern), split_weights(self.stamp.mask)
        return Learning(pattern, self.optimizer.init(pattern.params), mask)

    def drawn(
        self, params: Params, learning: Learning, images: Images, triggered: Bool[Array, " n"]
    ) -> tuple[BatchStamp, Rest, Float[Array, ""]]:
        """The triggers of a batch by the pattern's `params`, what else its generator then holds, and L_div."""
        slots = jnp.argsort(~triggered, stable=True)[: self.most]
        some = images[slots]
        patterns, rest = self.run_pattern(params, learning.pattern.rest, some)
        masks, _ = self.run_mask(*learning.mask, some)
        found, everyone, count = Drawn(patterns, sharpened(masks)), jnp.arange(len(images)), jnp.sum(triggered)
        slot = jnp.zeros(len(images), jnp.int32).at[slots].set(jnp.arange(self.most))
        other = jnp.where(count > 0, everyone % jnp.maximum(count, 1), (everyone + 1) % self.most)
        return BatchStamp(found.taken(slot), found.taken(other)), rest, DIVERSITY * diversity(some, patterns)

    def stepped(self, learning: Learning, gradient: Params, rest: Rest) -> Learning:
        """After a step of the pattern's generator."""
        params = learning.pattern.params
        updates, state = self.optimizer.update(gradient, learning.optimizer_state, params)
        return learning._replace(pattern=Weights(optax.apply_updates(params, updates), rest), optimizer_state=state)

    def learnt(self, learning: Learning) -> InputAware:
        """The stamp as it is learnt."""
        return InputAware(
            with_weights(self.stamp.pattern, learning.pattern), with_weights(self.stamp.mask, learning.mask)
        )


def learners_of(stamps: Mapping[int, InputAware], plan: Plan, count: int, config: TrainConfig) -> dict[int, Learner]:
    """One for each trigger that is learnt, by its attack's number; `plan` is for `count` images."""
    return {
        number: Learner(stamp, max(2, most_in_a_batch(number, plan, count, config))) for number, stamp in stamps.items()
    }


def diversity(images: Images, drawn: Images) -> Float[Array, ""]:
    """L_div of each image and the next one."""

    def distance(of: Images) -> Float[Array, " n"]:
        return jnp.sqrt(jnp.mean((of - jnp.roll(of, 1, axis=0)) ** 2, axis=(1, 2, 3)) + EPSILON**2)

    return jnp.mean(distance(images) / (distance(drawn) + EPSILON))


def learn_mask(
    generator: Generator,
    dataset: Dataset,
    config: TrainConfig,
    execution: Execution,
    on_step: Callable[[int, int], None] | None = None,
) -> Weights:
    """The weights of a mask's generator that draws small masks, each image another.

    Its learning rate falls to a tenth after two fifths of the steps, and again after four fifths. `on_step` is called
    with the steps done and how many there are.
    """
    schedule = optax.piecewise_constant_schedule(RATE, {int(share * MASK_STEPS): 0.1 for share in (0.4, 0.8)})
    run, optimizer, weights = make_run(training_copy(generator)), optax.adam(schedule, *BETAS), split_weights(generator)

    def loss(params: Params, rest: Rest, images: Array) -> tuple[Array, Rest]:
        drawn, rest = run(params, rest, images)
        masks = sharpened(drawn)
        excess = jnp.mean(jnp.maximum(masks - DENSITY, 0))
        return SPARSITY * excess + DIVERSITY * diversity(images, masks), rest

    def step(carry: Any, training: TrainingBatch, constant: tuple[()]) -> Any:
        (params, rest), state = carry
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, to_unit(training.batch.images))
        updates, state = optimizer.update(gradient, state, params)
        return (Weights(optax.apply_updates(params, updates), rest), state), value

    size = min(MASK_BATCH, config.batch_size)
    passes = replace(config, batch_size=size, epochs=-(-MASK_STEPS // (len(dataset) // size)))

    def report(epoch: int, done: int, count: int) -> None:
        if on_step:
            on_step((epoch - 1) * count + done, passes.epochs * count)

    start = (weights, optimizer.init(weights.params))
    for carry, _ in run_epochs(step, start, dataset, passes, execution=execution, on_batch=report):
        weights = carry[0]
    return weights
