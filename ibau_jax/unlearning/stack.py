"""Models of one architecture as arrays with a leading axis: what their rounds start from and go through."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ibau_jax.augmentation import Mixture, augmented, mixed
from ibau_jax.batches import Batches, assigned_images, filled_size, make_batches
from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.functional import split_weights
from ibau_jax.optimizers import make_optimizer
from ibau_jax.placement import DATA, Placement, make_mesh
from ibau_jax.unlearning.outer import OuterBatch, OuterCarry, OuterConstants, Turn
from ibau_jax.unlearning.players import AT_REST
from ibau_jax.unlearning.state import State, Status

PyTree = Any
# Added to the number of a round, so that these keys differ from those that choose the images to perturb.
AUGMENTATION, SHUFFLE, PLAYERS, ORDER = 2**30, 2**29, 2**28, 2**27


@dataclass
class Stack:
    """Members with equal shapes: `states[i]` unlearns on `clean_sets[i]` with `configs[i]`.

    `originals` are the original models, by default those of `states`. `configs` differ in seed and learning rate only.
    """

    states: list[State]
    clean_sets: list[Dataset]
    configs: list[UnlearnConfig]
    execution: Execution
    originals: Sequence[nnx.Module] = ()
    stopped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        mesh = make_mesh(self.execution.devices, len(self.states))
        self.placement = Placement(mesh, self.execution.shard_params)
        n_images = len(self.clean_sets[0])
        spread, size = mesh.shape[DATA], min(self.configs[0].batch_size, n_images)
        # The more images say what is right, the less the original model has to, which knows the backdoor as well.
        self.config = replace(self.configs[0], distillation=self.configs[0].distillation * (size / n_images) ** 0.5)
        if self.execution.microbatch:  # parts are spread over the devices too
            self.execution = replace(self.execution, microbatch=-(-self.execution.microbatch // spread) * spread)
        filled = filled_size(size, self.execution.microbatch, spread)
        in_order = [in_batches(*of_member, size) for of_member in zip(self.clean_sets, self.configs, strict=True)]
        made = [make_batches(images, size, filled=filled) for images in in_order]
        self.batch_size, self.batches = size, jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *made)
        self.count = len(self.batches.labels)
        self.graph = nnx.split(self.states[0].model)[0]
        originals = self.originals or [state.model for state in self.states]
        held = self.config.distillation or self.config.consistency
        reference = [split_weights(model).params for model in originals] if held else None
        self.reference_params = self.placement.weights(_stacked(reference)) if reference else None
        self.rest = self.placement.members(_stacked([split_weights(state.model).rest for state in self.states]))

    def status(self, index: int) -> Status:
        """How a member ended."""
        return "diverged" if index in self.stopped else "completed"

    def over(self) -> set[int]:
        """Members that do not go on: stopped, or with all rounds done."""
        return self.stopped | {i for i, state in enumerate(self.states) if len(state.rounds) >= self.config.n_rounds}

    def carry(self) -> OuterCarry:
        """Parameters, optimiser states and players, placed."""
        params = _stacked([split_weights(state.model).params for state in self.states])
        params, optimizer_state = self.placement.weights(
            (params, _stacked([state.optimizer_state for state in self.states]))
        )
        players = _stacked([state.players for state in self.states])  # None where there are none
        return OuterCarry(params, optimizer_state, self.placement.members(players))

    def assigned(self, number: int) -> Int[np.ndarray, "b members n"]:
        """Which perturbation each image of a round gets; -1 for none.

        The first `perturbations` are untargeted ones. Where there are players, as many images go to them, marked by
        larger numbers.
        """
        kinds = self.config.perturbations * (2 if self.config.spaces else 1)
        chosen = np.full(self.batches.weights.shape, -1, np.int32)
        for index, config in enumerate(self.configs):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            weights = self.batches.weights[:, index, : self.batch_size]
            chosen[:, index, : self.batch_size] = assigned_images(key, weights, config.portion, kinds)
        return chosen

    def outer_batches(self, number: int) -> OuterBatch:
        """The batches of a round with their perturbed images; each member has its own (batches, members, images)."""
        config, chosen = self.config, self.assigned(number)
        batches, mixture = self.augmented(number, chosen < 0)
        untargeted = (chosen >= 0) & (chosen < config.perturbations)
        which = self.put(np.where(untargeted, chosen, 0)) if config.perturbations > 1 else None
        rates = np.stack([learning_rates(config, number, self.count) for config in self.configs], axis=1)
        outer = OuterBatch(batches, self.put(rates), self.put(untargeted.astype(np.float32)), which, self.put(mixture))
        if not config.spaces:
            return outer
        seeds, seen = zip(*(self._for_players(index, number) for index in range(len(self.states))), strict=True)
        aimed = (chosen >= config.perturbations).astype(np.float32)
        turn = Turn(aimed, np.stack(seeds, axis=1), jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *seen))
        return outer._replace(turn=self.put(turn))

    def _for_players(self, index: int, number: int) -> tuple[Int[np.ndarray, " b"], Batches]:
        """A member's seeds and images for the players of a round."""
        rng = np.random.default_rng((self.configs[index].seed, PLAYERS + number))
        clean_set, size = self.clean_sets[index], min(AT_REST.batch_size, len(self.clean_sets[index]))
        spread = self.placement.mesh.shape[DATA]
        chosen = np.concatenate([rng.choice(len(clean_set), size, replace=False) for _ in range(self.count)])
        seen = make_batches(clean_set.take(chosen), size, filled=filled_size(size, None, spread))
        return rng.integers(2**31, size=self.count, dtype=np.int32), seen

    def augmented(self, number: int, clean: Bool[np.ndarray, "b members n"]) -> tuple[Batches, Mixture | None]:
        """The batches of a round with images moved and mirrored anew, and `clean` ones mixed, where configured."""
        config = self.config
        if not config.crop and not config.mix and config.mirror == "never":
            return self.put(self.batches), None
        images, labels = self.batches.images.copy(), self.batches.labels
        mixture = Mixture(labels.copy(), np.zeros(labels.shape, np.float32)) if config.mix else None
        for index, (of_member, state) in enumerate(zip(self.configs, self.states, strict=True)):
            key = jax.random.fold_in(jax.random.key(of_member.seed), AUGMENTATION + number)
            real = self.batches.weights[:, index] > 0
            moved = np.asarray(augmented(key, images[:, index][real], config.crop, state.mirrored))
            if mixture is not None:
                again, some = jax.random.fold_in(key, 0), clean[:, index][real]
                both, (others, shares) = mixed(again, moved, labels[:, index][real], config.mix)
                moved = np.where(some[:, None, None, None], both, moved)
                mixture.labels[:, index][real], mixture.shares[:, index][real] = others, np.where(some, shares, 0)
            images[:, index][real] = moved
        return self.put(self.batches._replace(images=images)), mixture

    def inner_batches(self, number: int) -> Batches:
        """The batches of a round's inner maximisation, in a new order where the configuration says so."""
        if not self.config.shuffle:
            return self.put(self.batches)
        arrays = [self.batches.images.copy(), self.batches.labels.copy()]
        for index, config in enumerate(self.configs):
            key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE + number)
            real = self.batches.weights[:, index] > 0
            order = np.asarray(jax.random.permutation(key, int(real.sum())))
            for array in arrays:
                array[:, index][real] = array[:, index][real][order]
        return self.put(self.batches._replace(images=arrays[0], labels=arrays[1]))

    def put(self, batches: PyTree) -> PyTree:
        """Batches as the loop wants them: all on the devices to be scanned, or here, to go there one at a time."""
        return self.placement.batches(batches) if self.execution.loop_form == "scan" else batches

    def zero(self) -> tuple[PyTree, PyTree]:
        """δ = 0 of every member at the beginning of a round, and its optimiser's state."""
        delta = jnp.zeros((self.config.perturbations, *self.batches.images.shape[3:]), jnp.float32)
        optimizer = make_optimizer(self.config.inner_optim, self.config.inner_lr)
        return self.placement.members(_stacked([(delta, optimizer.init(delta))] * len(self.states)))

    def found(self) -> tuple[Float[Array, "members k h w c"], Float[np.ndarray, " members"]]:
        """The members' untargeted perturbations of the last round, in their own unit, and their inner losses.

        Those of a member without a good round are 0.
        """
        zero = np.zeros((self.config.perturbations, *self.batches.images.shape[3:]), np.float32)
        unit = np.asarray(self.config.unit or 1.0, np.float32)
        last = [state.rounds[-1:] for state in self.states]
        deltas = [done[0].perturbation / unit if done else zero for done in last]
        return jnp.asarray(np.stack(deltas)), np.asarray([done[0].inner_loss if done else 0.0 for done in last])

    def constants(self, delta: PyTree) -> OuterConstants:
        """What the outer steps of a round see."""
        first = self.placement.batch(jax.tree.map(lambda array: array[0], self.batches))
        return OuterConstants(self.placement.members(delta), first, self.rest, self.reference_params)


def in_batches(clean_set: Dataset, config: UnlearnConfig, size: int) -> Dataset:
    """The images of a round's batches of `size`: once in order where `min_batches` is 1, as published.

    Else there are at least so many batches, and all are full: images are drawn anew each time they are used up. Image i
    belongs to the untargeted perturbation i mod k each time; perturbations that answer the same images become alike.
    """
    batches = max(config.min_batches, -(-len(clean_set) // size))
    if config.min_batches == 1 or len(clean_set) == batches * size:
        return clean_set
    rng, count = np.random.default_rng((config.seed, ORDER)), config.perturbations
    place = np.tile(np.arange(size) % count, batches)
    order = np.empty(len(place), np.int64)
    for which in range(count):
        own, places = np.arange(which, len(clean_set), count), np.flatnonzero(place == which)
        passes = [rng.permutation(own) for _ in range(-(-len(places) // len(own)))]
        order[places] = np.concatenate(passes)[: len(places)]
    return clean_set.take(order)


def learning_rates(config: UnlearnConfig, number: int, count: int) -> Float[np.ndarray, " b"]:
    """Of the `count` outer steps of a round."""
    steps = (number - 1 + np.arange(count) / count) / config.n_rounds
    falling = 0.5 * (1 + np.cos(np.pi * steps)) if config.schedule == "cosine" else np.ones(count)
    return (config.lr * falling).astype(np.float32)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
