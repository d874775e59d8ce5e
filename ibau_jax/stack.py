"""Models of one architecture as arrays with a leading axis: what their rounds start from and go through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.aims import aims_of_round
from ibau_jax.augmentation import Mixture, augmented, mixed
from ibau_jax.batches import Batches, assigned_images, filled_size, make_batches
from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.functional import split_weights
from ibau_jax.outer import OuterBatch, OuterConstants
from ibau_jax.perturb import inner_optimizer
from ibau_jax.placement import DATA, Placement, make_mesh
from ibau_jax.result import State, Status
from ibau_jax.selection import is_over

PyTree = Any
# Keys for these are others than those for the images that are perturbed, and for norms.
AUGMENTATION, SHUFFLE = 2**30, 2**29


@dataclass
class Stack:
    """Members with equal shapes: `states[i]` unlearns on `clean_sets[i]` with `configs[i]`, `held_out[i]` measures.

    `originals` are the models as they came, by default those of `states`. `configs` differ in seed and learning rate
    only.
    """

    states: list[State]
    clean_sets: list[Dataset]
    configs: list[UnlearnConfig]
    execution: Execution
    held_out: Sequence[Dataset | None] = ()
    originals: Sequence[nnx.Module] = ()
    stopped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.held_out = self.held_out or [None] * len(self.states)
        mesh = make_mesh(self.execution.devices, len(self.states))
        self.placement = Placement(mesh, self.execution.shard_params)
        self.config = self.configs[0]
        spread, size = mesh.shape[DATA], min(self.config.batch_size, len(self.clean_sets[0]))
        if self.execution.microbatch:  # parts are spread over the devices too
            self.execution = replace(self.execution, microbatch=-(-self.execution.microbatch // spread) * spread)
        filled = filled_size(size, self.execution.microbatch, spread)
        made = [make_batches(images, self.config.batch_size, filled=filled) for images in self.clean_sets]
        self.batch_size, self.batches = size, jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *made)
        passes = -(-self.config.min_batches // len(self.batches.labels))
        self.batches = jax.tree.map(lambda array: np.concatenate([array] * passes), self.batches)
        self.count = len(self.batches.labels)
        self.graph = nnx.split(self.states[0].model)[0]
        originals = self.originals or [state.model for state in self.states]
        before = _stacked([split_weights(model).params for model in originals]) if self.config.distillation else None
        self.before = self.placement.weights(before)
        self.rest = self.placement.members(_stacked([split_weights(state.model).rest for state in self.states]))

    def status(self, index: int) -> Status:
        """How a member ended."""
        return "diverged" if index in self.stopped else "completed"

    def over(self) -> set[int]:
        """Members that do not go on: stopped, or with nothing left to do."""
        return self.stopped | {index for index, state in enumerate(self.states) if is_over(state, self.configs[index])}

    def carry(self) -> tuple[PyTree, PyTree]:
        """Parameters and optimiser states, placed."""
        params = _stacked([split_weights(state.model).params for state in self.states])
        return self.placement.weights((params, _stacked([state.optimizer_state for state in self.states])))

    @property
    def unmixed(self) -> Mixture | None:
        """Where images are to be mixed: with nothing yet."""
        labels = self.batches.labels
        return Mixture(labels.copy(), np.zeros(labels.shape, np.float32)) if self.config.mix else None

    def augmented(self, number: int, batches: Batches) -> tuple[Batches, Mixture | None]:
        """The batches of a round with images moved, mirrored and mixed anew, where the configuration says so."""
        config, mixture = self.config, self.unmixed
        if not config.crop and mixture is None and config.mirror == "never":
            return batches, None
        images = self.batches.images.copy()
        for index, (of_member, state) in enumerate(zip(self.configs, self.states, strict=True)):
            key = jax.random.fold_in(jax.random.key(of_member.seed), AUGMENTATION + number)
            real = self.batches.weights[:, index] > 0
            moved = augmented(key, images[:, index][real], config.crop, state.mirrored)
            if mixture is not None:
                labels, again = self.batches.labels[:, index][real], jax.random.fold_in(key, 0)
                moved, (others, shares) = mixed(again, moved, labels, config.mix)
                mixture.labels[:, index][real], mixture.shares[:, index][real] = others, shares
            images[:, index][real] = moved
        return self.put(self.batches._replace(images=images)), mixture

    def inner_batches(self, number: int, batches: Batches) -> Batches:
        """The batches of a round's inner maximisation, in a new order where the configuration says so."""
        if not self.config.shuffle:
            return batches
        arrays = [self.batches.images.copy(), self.batches.labels.copy()]
        for index, config in enumerate(self.configs):
            key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE + number)
            real = self.batches.weights[:, index] > 0
            order = np.asarray(jax.random.permutation(key, int(real.sum())))
            for array in arrays:
                array[:, index][real] = array[:, index][real][order]
        return self.put(self.batches._replace(images=arrays[0], labels=arrays[1]))

    def outer_batches(self, number: int, batches: Batches, mixture: Mixture | None) -> OuterBatch:
        """The batches of a round with their perturbed images; each member has its own (batches, members, images)."""
        of_round = self.config.of_round(number)
        chosen = np.full(self.batches.weights.shape, -1, np.int32)
        for index, config in enumerate(self.configs):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            weights = self.batches.weights[:, index, : self.batch_size]
            chosen[:, index, : self.batch_size] = assigned_images(key, weights, config.portion, of_round.perturbations)
        patched = self.put((chosen >= 0).astype(np.float32))
        which = self.put(np.maximum(chosen, 0)) if of_round.perturbations > 1 else None
        return OuterBatch(batches, patched, which, self.put(mixture) if mixture else None)

    def put(self, batches: PyTree) -> PyTree:
        """Batches as the loop wants them: all on the devices to be scanned, or here, to go there one at a time."""
        return self.placement.batches(batches) if self.execution.loop_form == "scan" else batches

    def zero(self, number: int) -> tuple[PyTree, PyTree]:
        """δ = 0 of every member at the beginning of a round, and its optimiser's state."""
        of_round = self.config.of_round(number)
        delta = jnp.zeros((of_round.perturbations, *self.batches.images.shape[3:]), jnp.float32)
        carry = (delta, inner_optimizer(of_round, self.count).init(delta))
        return self.placement.members(_stacked([carry] * len(self.states)))

    def aims(self, number: int) -> PyTree:
        """What the members' targeted perturbations aim at in a round; None for untargeted ones."""
        if not self.config.of_round(number).targeted:
            return None
        each = [
            aims_of_round(config, state.suspects, number)
            for config, state in zip(self.configs, self.states, strict=True)
            if state.suspects
        ]
        return self.placement.members(_stacked(each))

    def radii(self) -> Float[Array, " members"]:
        """Of the balls of the members' untargeted perturbations."""
        return jnp.asarray([config.norm_bound or jnp.inf for config in self.configs])

    def constants(self, number: int, delta: PyTree, aims: PyTree) -> OuterConstants:
        """What the outer steps of a round see."""
        first = self.placement.batch(jax.tree.map(lambda array: array[0], self.batches))
        rates = [
            state.pace * learning_rate(config, number) for state, config in zip(self.states, self.configs, strict=True)
        ]
        return OuterConstants(
            self.placement.members(delta),
            first,
            self.rest,
            self.placement.members(np.asarray(rates, np.float32)),
            aims,
            self.before,
        )


def learning_rate(config: UnlearnConfig, number: int) -> float:
    """Of a round's outer steps."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / config.n_rounds))


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
