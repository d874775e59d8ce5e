"""Cross-fitting: how accurate a run leaves a model, told by images that it unlearns with all the same.

Where clean images are too few to hold any out, the run is rehearsed: once for each of several parts of them, which it
then goes without, and which measures. All images together tell accuracy, and all of them unlearn in the run itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ibau_jax.config import NO_MORE_ROUNDS
from ibau_jax.data import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.member import Member, initial_state
from ibau_jax.result import OnBatch, Phase, Result, Standing, State
from ibau_jax.selection import measure, too_costly

Run = Callable[..., list[Result]]


def folds_of(clean_set: Dataset, count: int, seed: int) -> list[tuple[Dataset, Dataset]]:
    """For each of `count` equal parts of the images: the others, and the part; a remainder is in none of the parts.

    Raises:
        ConfigError: a part would be empty, or nothing would be left beside it.
    """
    size = len(clean_set) // count
    if count < 2 or not size:
        raise ConfigError(
            f"--folds {count} needs at least {max(2, count)} clean images, and there are {len(clean_set)}; choose a "
            "larger --n-clean, or --folds 1"
        )
    order = np.random.default_rng(seed).permutation(len(clean_set))
    parts = [order[index * size : (index + 1) * size] for index in range(count)]
    return [(clean_set.take(np.setdiff1d(order, part)), clean_set.take(part)) for part in parts]


def pooled(standings: Sequence[Standing]) -> Standing:
    """That of all the images that measured."""
    images = [standing.images for standing in standings]

    def mean(name: str) -> float:
        return float(np.average([getattr(standing, name) for standing in standings], weights=images))

    return Standing(mean("acc"), mean("residual"), sum(images))


def rehearse(
    member: Member, begun: State, run: Run, one_by_one: bool, on_batch: OnBatch | None
) -> tuple[tuple[Standing, ...], tuple[State, ...]]:
    """How the model stands after each round, on images that did not unlearn.

    Args:
        member: with the states that its rehearsals have left so far, if any.
        begun: the state before the first round; it knows the suspects.
        run: unlearns several members, as `ibau_jax.minimax.unlearn_many` does.
        one_by_one: whether it does so one after the other.
        on_batch: called after every batch with the phase `rehearsal`.

    Returns:
        The standings after the rounds that were not rehearsed yet, and the states after the last one.
    """
    config = replace(member.config, folds=1, held_out=0.0, **NO_MORE_ROUNDS)
    assert begun.suspects is not None
    suspects, folds = begun.suspects, folds_of(member.clean_set, member.config.folds, member.config.seed)
    states = [replace(state, suspects=suspects) for state in member.rehearsals or [begun] * len(folds)]
    rounds: list[list[Standing]] = [[] for _ in folds]
    batches, left = 0, config.n_rounds - len(states[0].rounds)

    def on_round(index: int, found: State) -> None:
        rest, part = folds[index]
        states[index] = found
        rounds[index].append(measure(found.model, part, rest, suspects.first))

    def report(phase: Phase, number: int, done: int, count: int) -> None:
        nonlocal batches
        batches += 1
        if on_batch:
            on_batch("rehearsal", 1, batches, 2 * count * left * (len(folds) if one_by_one else 1))

    members = [
        replace(member, clean_set=rest, config=config, state=state)
        for (rest, _), state in zip(folds, states, strict=True)
    ]
    run(members, on_round=on_round, on_batch=report)
    return tuple(pooled(of_round) for of_round in zip(*rounds, strict=False)), tuple(states)  # diverged: fewer rounds


def rehearsed(member: Member, run: Run, one_by_one: bool, on_batch: OnBatch | None) -> Member:
    """The member with what rehearsals say of all its rounds, where its configuration asks for them."""
    state, config = member.state, member.config
    if config.folds == 1 or member.held_out is not None or state is None or len(state.rehearsed) >= config.n_rounds:
        return member
    assert state.suspects is not None
    initial = state.initial or measure(member.model, member.clean_set, member.clean_set.first(0), state.suspects)
    begun = replace(
        initial_state(member.model, config), suspects=state.suspects, mirrored=state.mirrored, pace=state.pace
    )
    found, rehearsals = rehearse(member, begun, run, one_by_one, on_batch)
    for _ in range(0 if state.rounds else config.slower):
        if found and not too_costly(initial, found[0], config):
            break
        begun = replace(begun, pace=begun.pace / 4)
        found, rehearsals = rehearse(member, begun, run, one_by_one, on_batch)
    standings = (*state.rehearsed, *found) if member.rehearsals else found
    state = replace(state, initial=initial, rehearsed=standings, pace=begun.pace)
    return replace(member, rehearsals=rehearsals, state=state)
