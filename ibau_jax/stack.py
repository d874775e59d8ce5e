"""Models of one architecture as arrays with a leading axis, and the rounds that they go through together."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ibau_jax.aims import aims_of_round
from ibau_jax.augmentation import Mixture, augmented, mixed
from ibau_jax.batches import Batches, assigned_images, filled_size, make_batches
from ibau_jax.compilation import release_memory
from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.functional import Weights, make_apply, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.outer import OuterBatch, OuterConstants, outer_step
from ibau_jax.perturb import InnerConstants, inner_optimizer, inner_step, project
from ibau_jax.placement import DATA, MEMBER, Placement, make_mesh
from ibau_jax.result import OnBatch, Result, Round, State, Status
from ibau_jax.selection import is_over, judge

PyTree = Any
AUGMENTATION = 2**30  # its keys are others than those for the images that are perturbed, and for norms


class CompiledRound(NamedTuple):
    """The two loops over batches, compiled for one stack's shapes and good for every other of the same shapes."""

    inner: BatchLoop
    outer: BatchLoop

    @property
    def seconds(self) -> float:
        """Time that compiling took."""
        return self.inner.compile_seconds + self.outer.compile_seconds


class CompiledSteps(dict[bool, CompiledRound]):
    """Those of each kind of round, by whether it is targeted; compiled when first asked for."""

    def of_round(self, stack: "Stack", number: int) -> CompiledRound:
        """Those of a round, by its number."""
        kind = stack.config.of_round(number).targeted
        if kind not in self:
            self[kind] = compile_round(stack, number)
        return self[kind]

    @property
    def seconds(self) -> float:
        """Time that compiling took so far."""
        return sum(compiled.seconds for compiled in self.values())


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
        lr = np.asarray([learning_rate(config, number) for config in self.configs], np.float32)
        return OuterConstants(
            self.placement.members(delta), first, self.rest, self.placement.members(lr), aims, self.before
        )


def learning_rate(config: UnlearnConfig, number: int) -> float:
    """Of a round's outer steps."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / config.n_rounds))


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _member(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def over_members(step: Callable[..., Any], stack: Stack) -> Callable[..., Any]:
    """`step` for arrays with a leading axis of members; one alone needs no `vmap`, which would cost time.

    Each device gets its own members by `shard_map`: left to itself the partitioner does not split the grouped
    convolutions that `vmap` makes of members' convolutions, and every device computes all members.
    """
    if len(stack.states) == 1:
        return lambda *arguments: jax.tree.map(lambda leaf: leaf[None], step(*_member(arguments, 0)))
    mesh, along = stack.placement.mesh, PartitionSpec(MEMBER)
    if mesh.shape[MEMBER] == 1:
        return jax.vmap(step)
    return jax.shard_map(jax.vmap(step), mesh=mesh, in_specs=along, out_specs=along, axis_names={MEMBER})


def compile_round(stack: Stack, number: int) -> CompiledRound:
    """Compiles the two steps of a round for the shapes and the places of a stack's arrays."""
    config, apply = stack.config.of_round(number), make_apply(stack.states[0].model, stack.execution)
    compiled = partial(compile_loop, execution=stack.execution, placement=stack.placement)
    delta, inner_state = stack.zero(number)
    carry, aims = stack.carry(), stack.aims(number)
    weights, batches = Weights(carry[0], stack.rest), stack.put(stack.batches)
    inner = over_members(inner_step(apply, config, stack.execution, stack.count), stack)
    outer = over_members(outer_step(apply, config, stack.execution), stack)
    steps = CompiledRound(
        compiled(inner, (delta, inner_state), batches, InnerConstants(weights, aims)),
        compiled(
            outer, carry, stack.outer_batches(number, batches, stack.unmixed), stack.constants(number, delta, aims)
        ),
    )
    release_memory()
    return steps


def run_stack(
    stack: Stack,
    steps: CompiledSteps,
    on_round: Callable[[int, State], None] | None,
    on_batch: OnBatch | None,
) -> list[Result]:
    """All rounds of all members.

    Args:
        stack: the members; its `states` follow them.
        steps: what is compiled for stacks of these shapes; added to.
        on_round: called with a member's index and its state after each of its good rounds.
        on_batch: called after every batch.
    """
    compiled_before = steps.seconds
    carry, batches, seconds = stack.carry(), stack.put(stack.batches), 0.0
    for number in range(len(stack.states[0].rounds) + 1, stack.config.n_rounds + 1):
        if len(stack.over()) == len(stack.states):
            break
        carry, rounds = run_round(
            stack,
            steps.of_round(stack, number),
            number,
            batches,
            carry,
            on_batch or (lambda phase, number, done, count: None),
        )
        seconds += sum(done.seconds for done in rounds)
        take_in(stack, carry, rounds, on_round)
        if any(state.rounds and state.rounds[-1].undone for state in stack.states):
            carry = stack.carry()
    share = seconds / len(stack.states)
    return [
        Result(state.kept, state.rounds, state.kept_round, stack.status(index), steps.seconds - compiled_before, share)
        for index, state in enumerate(stack.states)
    ]


def run_round(
    stack: Stack, steps: CompiledRound, number: int, batches: PyTree, carry: PyTree, on_batch: OnBatch
) -> tuple[PyTree, list[Round]]:
    """One round of all members: the next parameters and optimiser states, and what happened to each."""
    start, members = time.perf_counter(), range(len(stack.states))
    aims = stack.aims(number)
    constants = InnerConstants(Weights(carry[0], stack.rest), aims)
    (delta, _), inner = steps.inner.run(
        stack.zero(number), batches, constants, lambda done: on_batch("inner", number, done, stack.count)
    )
    delta = stack.placement.local(delta)
    if aims is None:  # targeted ones are in their balls
        delta = jax.vmap(jax.vmap(project, (0, None)))(delta, stack.radii())
    carry, outer = steps.outer.run(
        carry,
        stack.outer_batches(number, *stack.augmented(number, batches)),
        stack.constants(number, delta, aims),
        lambda done: on_batch("outer", number, done, stack.count),
    )
    perturbations = np.asarray(delta)
    seconds = (time.perf_counter() - start) / len(members)
    rounds = [
        Round(
            number,
            perturbations[index],
            float(jnp.linalg.norm(delta[index, 0])),
            float(np.mean(inner[:, index])),
            float(np.mean(outer[:, index])),
            seconds,
        )
        for index in members
    ]
    return carry, rounds


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    """Whether no number is NaN or infinite; one program, where leaf after leaf would compile dozens."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def take_in(stack: Stack, carry: PyTree, rounds: list[Round], on_round: Callable[[int, State], None] | None) -> None:
    """Takes a round's outcome into the members' states; a member whose round is not finite stops at the last good.

    One whose round is undone stays where it was; its next carry is that of its state.
    """
    local, over = stack.placement.local(carry), stack.over()
    for index, done in enumerate(rounds):
        if index in over:
            continue
        params, optimizer_state = _member(local, index)
        figures = [done.inner_loss, done.outer_loss, done.perturbation_norm]
        if not (np.isfinite(figures).all() and _all_finite(params)):
            stack.stopped.add(index)
            continue
        before = stack.states[index]
        model = nnx.merge(stack.graph, params, split_weights(before.model).rest)
        done = judge(before, done, model, stack.held_out[index], stack.clean_sets[index], stack.configs[index])
        stack.states[index] = before.undone(done) if done.undone else before.after(done, model, optimizer_state)
        if on_round:
            on_round(index, stack.states[index])
