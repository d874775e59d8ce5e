"""I-BAU (Zeng et al., ICLR 2022, arXiv 2110.03735): unlearning as a minimax.

    min over θ of  max over ‖δ‖ ≤ C  of  (1/n) Σ L(f_θ(x_i + δ), y_i)                           (equation 1)

A round finds δ by the inner maximisation (`ibau_jax.unlearning.inner`), then takes one optimiser step along the
implicit hypergradient (`ibau_jax.unlearning.hypergradient`) for every clean batch (`ibau_jax.unlearning.outer`). Beside
untargeted δ there may be persistent players that lead to classes (`ibau_jax.unlearning.players`). The model always runs
in inference mode. Several models of one architecture unlearn as a stack; one alone is a stack of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
from flax import nnx
from jax.experimental import multihost_utils

from ibau_jax.auditing.auditor import Audit, Auditor
from ibau_jax.augmentation import may_mirror
from ibau_jax.config import OPTIMIZERS, UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError, DataError, NotFiniteError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import structure
from ibau_jax.metrics import predict
from ibau_jax.models.inference import count_classes
from ibau_jax.models.normalized import Normalized
from ibau_jax.optimizers import check_optimizer
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning.loop import CompiledRound, compile_round, run_stack
from ibau_jax.unlearning.players import AT_REST, begin_players, outliers
from ibau_jax.unlearning.stack import Stack
from ibau_jax.unlearning.state import OnBatch, Result, State, initial_state


@dataclass(frozen=True)
class Member:
    """One of several models that unlearn together.

    Attributes:
        model: see `unlearn`.
        clean_set: as many images as every other member's.
        config: the same as every other member's but for `seed` and `lr`.
        state: where to go on; as many rounds as every other member's.
        audit: of `model`, on `clean_set` and with other images held out. Players begin with its triggers. Without one,
            or where its constants are not `AuditConfig()`'s, the triggers are searched for.
    """

    model: nnx.Module
    clean_set: Dataset
    config: UnlearnConfig
    state: State | None = None
    audit: Audit | None = None


def unlearn(
    model: nnx.Module,
    clean_set: Dataset,
    config: UnlearnConfig | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    state: State | None = None,
    audit: Audit | None = None,
    on_round: Callable[[State], None] | None = None,
    on_batch: OnBatch | None = None,
) -> Result:
    """Unlearns whatever backdoor `model` has.

    Args:
        model: a Flax NNX module that maps images, float32 (n, h, w, c) in [0, 1], to logits, float32 (n, classes).
            Its `nnx.Param`s are θ; all other state, such as BatchNorm's statistics, stays as it is. Not changed.
        clean_set: clean images with their true labels.
        config: the algorithm's constants; the preset `robust` by default.
        execution: precision, memory and devices.
        state: where to go on, as `on_round` got it; `model` is still the one that came.
        audit: the audit of `model`, see `Member`.
        on_round: called after every good round; where it raises NotFiniteError, as evaluating on other images may, the
            round counts as one whose loss is not finite.
        on_batch: called with the phase, the round's number, the batches done and how many there are.

    Returns:
        The cleaned model and what happened.

    Raises:
        DataError: the clean set is empty, has a label that is no class of the model, or images that it does not take.
        ConfigError: there are not so many devices, or fewer images than untargeted perturbations.
        NotFiniteError: the original model computes NaN or infinity for some image, or in the search for small triggers.
    """
    member = Member(model, clean_set, config or PRESETS["robust"], state, audit)
    report = (lambda index, state: on_round(state)) if on_round else None
    result = unlearn_many([member], execution=execution, on_round=report, on_batch=on_batch)[0]
    if not result.rounds:
        predict(model, clean_set)  # raises where the model came so, rather than diverged
    return result


def unlearn_many(
    members: Sequence[Member],
    *,
    execution: Execution = DEFAULT_EXECUTION,
    together: bool | None = None,
    on_round: Callable[[int, State], None] | None = None,
    on_batch: OnBatch | None = None,
) -> list[Result]:
    """Unlearns several models of one architecture by the same compiled steps.

    Args:
        members: models, each with its clean set, seed and learning rate.
        execution: precision, memory and devices.
        together: all at once, stacked under `vmap`, or one after the other. By default what is faster: together on
            accelerators and on several devices, else one after the other (XLA:CPU's convolutions of several models
            at once take twice as long as those of each).
        on_round: called with a member's index and state after each of its good rounds.
        on_batch: as for `unlearn`; where members unlearn one after the other, for each of them.

    Returns:
        A result a member, in order. One whose loss becomes NaN or infinite does not disturb the others.

    Raises:
        DataError: see `unlearn`.
        NotFiniteError: see `unlearn`, of the only member; one of several ends as diverged, without a round.
        ConfigError: the members do not fit together; or there are not so many devices.
    """
    _check(members)
    whole = together if together is not None else execution.loop_form == "scan" or execution.devices > 1
    states = begin(members, execution, on_batch)
    steps: CompiledRound | None = None
    results = [Result(member.model, (), "diverged", 0.0, 0.0) for member in members]
    groups = [list(states)] if whole and states else [[index] for index in states]
    for group in groups:
        stack = _stack([members[index] for index in group], [states[index] for index in group], execution)
        if steps is None:
            steps = compile_round(stack)
        report = partial(_reported, on_round, group) if on_round else None
        for index, result in zip(group, run_stack(stack, steps, report, on_batch), strict=True):
            results[index] = result if group is groups[0] else replace(result, compile_seconds=0.0)
    return results


def _reported(report: Callable[[int, State], None], group: Sequence[int], index: int, state: State) -> None:
    """Reports of a member by its number among all, not in its group."""
    report(group[index], state)


def begin(members: Sequence[Member], execution: Execution, on_batch: OnBatch | None) -> dict[int, State]:
    """Makes the states that the first round begins with, where members do not go on from one, by their index.

    Of several members those that are not finite have none.
    """
    auditor, states = Auditor(AT_REST, execution), {}
    for index, member in enumerate(members):
        try:
            states[index] = _begun(member, auditor, on_batch)
        except NotFiniteError:
            if len(members) == 1:
                raise
    return states


def _begun(member: Member, auditor: Auditor, on_batch: OnBatch | None) -> State:
    state, spaces = member.state or initial_state(member.model, member.config), member.config.spaces
    if not state.rounds:
        state = replace(state, mirrored=may_mirror(member.config.mirror, member.model, member.clean_set))
    if not spaces or state.players is not None:
        return state
    on_step = (lambda space, done, count: on_batch("search", 1, done, count)) if on_batch else None
    if member.audit and member.audit.config == AT_REST:
        smallest = member.audit.smallest()
    else:
        smallest = auditor.search(member.model, member.clean_set, spaces, on_step)
    players = begin_players({name: smallest[name] for name in spaces})
    if jax.process_count() > 1:  # rounding may differ between hosts
        players = multihost_utils.broadcast_one_to_all(players)
    return replace(state, players=players, outliers=outliers(players))


def _stack(members: Sequence[Member], states: list[State], execution: Execution) -> Stack:
    configs = [_in_its_space(member.config, member.model) for member in members]
    clean_sets, originals = [member.clean_set for member in members], [member.model for member in members]
    return Stack(states, clean_sets, configs, execution, originals)


def _in_its_space(config: UnlearnConfig, model: nnx.Module) -> UnlearnConfig:
    """The configuration with δ's unit: the deviation that the model divides by, where δ is added after that."""
    if config.space == "pixel" or not isinstance(model, Normalized):
        return config
    return replace(config, unit=model.normalization.std)


def check_feasible(config: UnlearnConfig, clean_set: Dataset) -> None:
    """Raises ConfigError where the constants do not fit the images, or name an optimiser that is none."""
    if len(clean_set) < config.perturbations:
        raise ConfigError(
            f"each of {config.perturbations} untargeted perturbations takes clean images of its own, and there are "
            f"{len(clean_set)}; give more, or a smaller --perturbations"
        )
    for name in {config.optim, config.inner_optim}.difference(OPTIMIZERS):
        check_optimizer(name)


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise ConfigError("there is no model to unlearn")
    for member in members:
        image_shape = member.clean_set.images.shape[1:]
        classes = count_classes(member.model, image_shape)
        member.clean_set.check_fits(image_shape, classes)
        if classes < 2:
            raise DataError("the model has a single logit; it takes one a class")
        check_feasible(member.config, member.clean_set)
        if not stackable(members[0], member):
            raise ConfigError("models that unlearn together have one architecture, and clean sets of one size")


def stackable(one: Member, other: Member) -> bool:
    """Whether two members fit into one stack."""

    def what_counts(member: Member) -> tuple[object, ...]:
        rounds = len(member.state.rounds) if member.state else 0
        images = member.clean_set.images
        return replace(member.config, seed=0, lr=1.0), structure(member.model), images.shape, images.dtype, rounds

    return what_counts(one) == what_counts(other)
