"""I-BAU (Zeng et al., ICLR 2022, arXiv 2110.03735): unlearning as a minimax.

    min over θ of  max over ‖δ‖ ≤ C  of  (1/n) Σ L(f_θ(x_i + δ), y_i)                           (equation 1)

A round finds δ by the inner maximisation (`ibau_jax.perturb`), then takes one optimiser step along the implicit
hypergradient (`ibau_jax.hypergradient`) for every clean batch (`ibau_jax.outer`). The model always runs in inference
mode. Several models of one architecture unlearn as a stack (`ibau_jax.stack`); one alone is a stack of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from flax import nnx

from ibau_jax.config import UnlearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.member import Member, begin, divided, initial_state, longer
from ibau_jax.metrics import predict
from ibau_jax.models.inference import count_classes
from ibau_jax.rehearsal import rehearsed
from ibau_jax.result import OnBatch, Result, State
from ibau_jax.rounds import CompiledSteps, run_stack
from ibau_jax.stack import Stack


def unlearn(
    model: nnx.Module,
    clean_set: Dataset,
    config: UnlearnConfig | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    state: State | None = None,
    on_round: Callable[[State], None] | None = None,
    on_batch: OnBatch | None = None,
) -> Result:
    """Unlearns whatever backdoor `model` has.

    Args:
        model: a Flax NNX module that maps images, float32 (n, h, w, c) in [0, 1], to logits, float32 (n, classes).
            Its `nnx.Param`s are θ; all other state, such as BatchNorm's statistics, stays as it is. Not changed.
        clean_set: clean images with their true labels.
        config: the algorithm's constants; the preset `cifar10` by default.
        execution: precision, memory and devices.
        state: where to go on, as `on_round` got it; `model` is still the one that came.
        on_round: called after every good round; where it raises NotFiniteError, as evaluating on other images may, the
            round counts as one whose loss is not finite.
        on_batch: called with the phase, the round's number, the batches done and how many there are.

    Returns:
        The cleaned model and what happened.

    Raises:
        DataError: the clean set is empty, or has a label that is no class of the model.
        ConfigError: there are not so many devices.
        NotFiniteError: the model that came computes NaN or infinity for some image.
    """
    member = Member(model, clean_set, config or UnlearnConfig(), state)
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
        DataError, NotFiniteError: see `unlearn`; a model that is not finite may also just end as diverged here.
        ConfigError: the members do not fit together; or there are not so many devices.
    """
    _check(members)
    whole = together if together is not None else execution.loop_form == "scan" or execution.devices > 1
    members = begin([divided(member) for member in members], execution, on_batch)
    run = partial(unlearn_many, execution=execution, together=together)
    members = [rehearsed(member, run, not whole, on_batch) for member in members]
    results: dict[int, Result] = {}
    steps, states = CompiledSteps(), [member.state or initial_state(member.model, member.config) for member in members]

    def report(index: int, state: State) -> None:
        if on_round:
            on_round(index, state)
        states[index] = state

    for group in _groups(members) if whole else [[index] for index in range(len(members))]:
        stack = _stack([members[index] for index in group], execution)
        of_group = run_stack(stack, steps, partial(_reported, report, group), on_batch)
        results |= dict(zip(group, of_group, strict=True))
    for index, member in enumerate(members):
        more = longer(member, states[index], execution, on_batch) if results[index].status == "completed" else None
        if more:
            found = run([more], on_round=partial(_reported, report, [index]), on_batch=on_batch)[0]
            results[index] = found.after(results[index])
    return [results[index] for index in range(len(members))]


def _reported(report: Callable[[int, State], None], group: Sequence[int], index: int, state: State) -> None:
    """Reports of a member by its number among all, not in its group."""
    report(group[index], state)


def _groups(members: Sequence[Member]) -> list[list[int]]:
    """Those of members who have as many rounds, of the same kinds."""
    kinds = [(member.config.untargeted_rounds, member.config.n_rounds) for member in members]
    return [[index for index, kind in enumerate(kinds) if kind == of_group] for of_group in dict.fromkeys(kinds)]


def _stack(members: Sequence[Member], execution: Execution) -> Stack:
    states = [member.state or initial_state(member.model, member.config) for member in members]
    clean_sets, configs = [member.clean_set for member in members], [member.config for member in members]
    held_out, originals = [member.held_out for member in members], [member.model for member in members]
    return Stack(states, clean_sets, configs, execution, held_out, originals)


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise ConfigError("there is no model to unlearn")
    for member in members:
        image_shape = member.clean_set.images.shape[1:]
        member.clean_set.check_fits(image_shape, count_classes(member.model, image_shape))
        if not stackable(members[0], member):
            raise ConfigError("models that unlearn together have one architecture, and clean sets of one size")


def stackable(one: Member, other: Member) -> bool:
    """Whether two members fit into one stack."""

    def what_counts(member: Member) -> tuple[object, ...]:
        rounds = len(member.state.rounds) if member.state else 0
        images = member.clean_set.images
        return replace(member.config, seed=0, lr=1.0), nnx.split(member.model)[0], images.shape, images.dtype, rounds

    return what_counts(one) == what_counts(other)
