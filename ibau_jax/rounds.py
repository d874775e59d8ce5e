"""The rounds that a stack of models goes through: compiled steps, run over the batches, and what comes of them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from ibau_jax.compilation import release_memory
from ibau_jax.errors import NotFiniteError
from ibau_jax.functional import Weights, make_apply, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.outer import outer_step
from ibau_jax.perturb import InnerConstants, inner_step, space_of
from ibau_jax.placement import MEMBER
from ibau_jax.result import OnBatch, Result, Round, State
from ibau_jax.selection import judge
from ibau_jax.stack import PyTree, Stack


class CompiledRound(NamedTuple):
    """The two loops over batches, compiled for one stack's shapes and good for every other of the same shapes."""

    inner: BatchLoop
    outer: BatchLoop

    @property
    def seconds(self) -> float:
        """Time that compiling took."""
        return self.inner.compile_seconds + self.outer.compile_seconds


class CompiledSteps(dict[tuple[int, bool], CompiledRound]):
    """Those of each kind of round, by how many members go through it and whether it is targeted.

    Compiled when first asked for.
    """

    def of_round(self, stack: Stack, number: int) -> CompiledRound:
        """Those of a round, by its number."""
        kind = len(stack.states), stack.config.of_round(number).targeted
        if kind not in self:
            self[kind] = compile_round(stack, number)
        return self[kind]

    @property
    def seconds(self) -> float:
        """Time that compiling took so far."""
        return sum(compiled.seconds for compiled in self.values())


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
        stack.zero(number),
        stack.inner_batches(number, batches),
        constants,
        lambda done: on_batch("inner", number, done, stack.count),
    )
    delta = stack.placement.local(delta)
    if aims is None:  # targeted ones are in their balls
        delta = jax.vmap(jax.vmap(space_of(stack.config).project, (0, None)))(delta, stack.radii())
    carry, outer = steps.outer.run(
        carry,
        stack.outer_batches(number, *stack.augmented(number, batches)),
        stack.constants(number, delta, aims),
        lambda done: on_batch("outer", number, done, stack.count),
    )
    perturbations = np.asarray(delta) * np.asarray(stack.config.unit or 1.0, np.float32)
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
        try:
            done = judge(before, done, model, stack.held_out[index], stack.clean_sets[index], stack.configs[index])
            after = before.undone(done) if done.undone else before.after(done, model, optimizer_state)
            if on_round:
                on_round(index, after)
        except NotFiniteError:  # weights so large that logits overflow
            stack.stopped.add(index)
            continue
        stack.states[index] = after
