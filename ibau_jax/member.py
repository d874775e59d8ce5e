"""One of the models that unlearn: what its run begins with, and whether more rounds follow those planned."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flax import nnx

from ibau_jax.aims import adapted
from ibau_jax.auditing.search import OnStep
from ibau_jax.augmentation import may_mirror
from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.execution import Execution
from ibau_jax.models.normalized import Normalized
from ibau_jax.optimizers import make_optimizer
from ibau_jax.result import OnBatch, State
from ibau_jax.selection import asks_for_more, hold_out, may_go_deeper, measure
from ibau_jax.suspects import compile_scan, find_hidden, find_suspects


@dataclass(frozen=True)
class Member:
    """One of several models that unlearn together.

    Attributes:
        model: see `unlearn`.
        clean_set: as many images as every other member's.
        config: the same as every other member's but for `seed` and `lr`.
        state: where to go on; as many rounds as every other member's.
        held_out: clean images that tell which rounds to keep; by default a share of `clean_set`, where `config` asks
            for one.
        rehearsals: the states that rehearsals of the rounds so far have left, to go on from.
    """

    model: nnx.Module
    clean_set: Dataset
    config: UnlearnConfig
    state: State | None = None
    held_out: Dataset | None = None
    rehearsals: tuple[State, ...] = field(default=(), repr=False)


def initial_state(model: nnx.Module, config: UnlearnConfig) -> State:
    """The state before the first round."""
    return State(model, make_optimizer(config.optim, config.lr).init(nnx.state(model, nnx.Param)))


def divided(member: Member) -> Member:
    """The member with the images that are held out apart from those that unlearn."""
    if member.held_out is not None:
        return member
    clean_set, held_out = hold_out(member.clean_set, member.config)
    return replace(member, clean_set=clean_set, held_out=held_out)


def begin(members: Sequence[Member], execution: Execution, on_batch: OnBatch | None) -> list[Member]:
    """The members with states that know the suspects and how the models stood, where the configuration asks for it."""
    scan, begun = None, []
    for member in members:
        state = member.state or initial_state(member.model, member.config)
        if member.config.needs_suspects and state.suspects is None:
            scan = scan or compile_scan(member.model, member.clean_set, execution)
            found = find_suspects(scan, state.model, member.clean_set, member.config, _on_step(on_batch))
            initial = measure(state.model, member.held_out, member.clean_set, found) if member.held_out else None
            state = replace(state, suspects=found, initial=initial)
        if not state.rounds:
            mirrored = may_mirror(member.config.mirror, state.model, member.clean_set)
            state = replace(state, mirrored=mirrored)
        config = adapted(member.config, state.suspects) if state.suspects else member.config
        config = _in_its_space(config, member.model)
        begun.append(replace(member, config=config, state=state))
    return begun


def _in_its_space(config: UnlearnConfig, model: nnx.Module) -> UnlearnConfig:
    """The configuration with δ's unit: the deviation that the model divides by, where δ is added after that."""
    if config.space == "pixel" or not isinstance(model, Normalized):
        return config
    return replace(config, unit=model.normalization.std)


def longer(member: Member, state: State, execution: Execution, on_batch: OnBatch | None) -> Member | None:
    """The member with one round more to do: a short cut is open, or others may be behind those closed; else None."""
    config, count = member.config, len(state.rounds) + 1
    if asks_for_more(state, config):
        left = config.n_rounds + config.more_rounds - count
        return replace(member, state=state, config=replace(config, n_rounds=count, more_rounds=left))
    if state.suspects is None or not may_go_deeper(state, config):
        return None
    if not state.searched_after:
        hidden = find_hidden(state, member.clean_set, config, execution, _on_step(on_batch))
        if hidden is None:
            return None
        state = replace(state, suspects=state.suspects.and_more(hidden))
    return replace(member, state=state, config=replace(config, n_rounds=count, more_rounds=0))


def _on_step(on_batch: OnBatch | None) -> OnStep | None:
    return (lambda done, count: on_batch("search", 1, done, count)) if on_batch else None
