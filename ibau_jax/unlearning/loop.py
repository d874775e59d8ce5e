"""The algorithm's loop: a stack of models goes through rounds of inner maximisation and outer minimisation."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ibau_jax.compilation import release_memory
from ibau_jax.errors import NotFiniteError
from ibau_jax.functional import Weights, make_apply, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.placement import MEMBER
from ibau_jax.unlearning.inner import begin_sizing, inner_step, sizing_step, space_of
from ibau_jax.unlearning.outer import OuterCarry, outer_step
from ibau_jax.unlearning.players import AT_REST, outliers
from ibau_jax.unlearning.stack import PyTree, Stack
from ibau_jax.unlearning.state import OnBatch, Result, Round, State

BISECTIONS = 8  # of ten octaves of norms: what a perturbation needs, to 3 %


class CompiledRound(NamedTuple):
    """The steps of a round, compiled for one stack's shapes and good for every other of the same shapes.

    Attributes:
        inner: the loop over batches of the inner maximisation.
        outer: the loop over batches of the outer minimisation.
        sizing: the bisections of the norms that untargeted perturbations need, where there are players.
    """

    inner: BatchLoop
    outer: BatchLoop
    sizing: BatchLoop | None

    @property
    def seconds(self) -> float:
        """Time that compiling took."""
        return sum(loop.compile_seconds for loop in self if loop)


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


def compile_round(stack: Stack) -> CompiledRound:
    """Compiles the steps of a round for the shapes and the places of a stack's arrays."""
    config, apply = stack.config, make_apply(stack.states[0].model, stack.execution)
    compiled = partial(compile_loop, execution=stack.execution, placement=stack.placement)
    delta, inner_state = stack.zero()
    carry = stack.carry()
    inner = over_members(inner_step(apply, config, stack.execution), stack)
    outer = over_members(outer_step(apply, config, stack.execution), stack)
    sizing = over_members(sizing_step(apply, config, AT_REST.success), stack)
    weights = Weights(carry.params, stack.rest)
    steps = CompiledRound(
        compiled(inner, (delta, inner_state), stack.put(stack.batches), weights),
        compiled(outer, carry, stack.outer_batches(1), stack.constants(delta)),
        compiled(sizing, *_bisected(stack, delta), weights) if config.spaces else None,
    )
    release_memory()
    return steps


def run_stack(
    stack: Stack, steps: CompiledRound, on_round: Callable[[int, State], None] | None, on_batch: OnBatch | None
) -> list[Result]:
    """Takes all members through their rounds.

    Args:
        stack: the members; its `states` follow them.
        steps: compiled for stacks of these shapes.
        on_round: called with a member's index and its state after each of its good rounds.
        on_batch: called after every batch.
    """
    carry, seconds = stack.carry(), 0.0
    for number in range(len(stack.states[0].rounds) + 1, stack.config.n_rounds + 1):
        if len(stack.over()) == len(stack.states):
            break
        carry, rounds = run_round(stack, steps, number, carry, on_batch or (lambda phase, number, done, count: None))
        seconds += sum(done.seconds for done in rounds)
        commit(stack, carry, rounds, on_round)
    share = seconds / len(stack.states)
    return [
        Result(state.model, state.rounds, stack.status(index), steps.seconds, share)
        for index, state in enumerate(stack.states)
    ]


def run_round(
    stack: Stack, steps: CompiledRound, number: int, carry: OuterCarry, on_batch: OnBatch
) -> tuple[OuterCarry, list[Round]]:
    """Takes all members through one round: the next carry, and what happened to each."""
    start, members = time.perf_counter(), range(len(stack.states))
    delta, inner = (
        stack.found() if number > 1 and not stack.config.renew else maximise(stack, steps, number, carry, on_batch)
    )
    carry, outer = steps.outer.run(
        carry,
        stack.outer_batches(number),
        stack.constants(delta),
        lambda done: on_batch("outer", number, done, stack.count),
    )
    perturbations = np.asarray(delta) * np.asarray(stack.config.unit or 1.0, np.float32)
    seconds, players = (time.perf_counter() - start) / len(members), stack.placement.local(carry.players)
    rounds = [
        Round(
            number,
            perturbations[index],
            float(jnp.linalg.norm(delta[index, 0])),
            float(inner[index]),
            float(np.mean(outer[:, index])),
            seconds,
            outliers(_member(players, index)) if players else (),
        )
        for index in members
    ]
    return carry, rounds


def maximise(
    stack: Stack, steps: CompiledRound, number: int, carry: OuterCarry, on_batch: OnBatch
) -> tuple[Float[Array, "members k h w c"], Float[np.ndarray, " members"]]:
    """Finds the members' untargeted perturbations from 0, and the mean inner losses on the way.

    They end in the ball of the configuration. Where there are players, each is made as large as it takes for 90 % of
    the images of other classes in the first batch to go to one class.
    """
    weights = Weights(carry.params, stack.rest)
    (delta, _), losses = steps.inner.run(
        stack.zero(),
        stack.inner_batches(number),
        weights,
        lambda done: on_batch("inner", number, done, stack.count),
    )
    radius, local = stack.config.norm_bound or float("inf"), stack.placement.local(delta)
    projected = jax.vmap(jax.vmap(lambda one: space_of(stack.config).project(one, radius)))(local)
    if steps.sizing:
        sized, _ = steps.sizing.run(*_bisected(stack, projected), weights)
        projected = jax.vmap(lambda of_member: of_member.delta)(stack.placement.local(sized))
    return projected, np.mean(losses, axis=0)


def _bisected(stack: Stack, delta: Float[Array, "members k h w c"]) -> tuple[PyTree, PyTree]:
    """Where the bisections of a stack begin, and the batches they see: the first, again and again."""
    begun = jax.vmap(partial(begin_sizing, stack.config))(stack.placement.local(delta))
    batches = jax.tree.map(lambda array: np.repeat(array[:1], BISECTIONS, axis=0), stack.batches)
    return stack.placement.members(begun), stack.put(batches)


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    """Whether no number is NaN or infinite; one program, where leaf after leaf would compile dozens."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def commit(stack: Stack, carry: OuterCarry, rounds: list[Round], on_round: Callable[[int, State], None] | None) -> None:
    """Takes a round's outcome into the states. Members with a non-finite loss stop at their last good round."""
    local, over = stack.placement.local(carry), stack.over()
    for index, done in enumerate(rounds):
        if index in over:
            continue
        params, optimizer_state, players = _member(local, index)
        figures = [done.inner_loss, done.outer_loss, done.perturbation_norm]
        if not (np.isfinite(figures).all() and _all_finite(params)):
            stack.stopped.add(index)
            continue
        before = stack.states[index]
        model = nnx.merge(stack.graph, params, split_weights(before.model).rest)
        after = before.after(done, model, optimizer_state, players)
        try:
            if on_round:
                on_round(index, after)
        except NotFiniteError:  # weights so large that logits overflow
            stack.stopped.add(index)
            continue
        stack.states[index] = after
