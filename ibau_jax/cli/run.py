"""The main job: read, check, unlearn, evaluate, write; for one checkpoint or many."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax

from ibau_jax.cli import console
from ibau_jax.cli.audit import audit_task, make_auditor, verdict_lines
from ibau_jax.cli.defend import defend
from ibau_jax.cli.device import is_first_process, start
from ibau_jax.cli.plan import Planned, plan_runs
from ibau_jax.cli.prepare import prepare
from ibau_jax.cli.progress import RoundProgress
from ibau_jax.cli.relearn import relearn_task, relearning_table
from ibau_jax.cli.run_folder import REPORT, RESULT, check_folder, write_summary
from ibau_jax.cli.task import Task
from ibau_jax.cli.unlearn_options import UnlearnOptions
from ibau_jax.errors import IbauError, NotFiniteError
from ibau_jax.execution import Execution
from ibau_jax.files import exclusive, remove_abandoned
from ibau_jax.unlearning import Member, State, stackable, unlearn_many

SOME_FAILED = 1  # also where the one run diverged


def run(options: UnlearnOptions) -> int:
    """Runs `scripts/unlearn.py` and returns its exit code: 0, or 1 where one became NaN or infinite or failed.

    Raises:
        IbauError: the input is to blame; nothing was written.
    """
    planned = plan_runs(options.subject.each(), options.method.configs(), options.output.out)
    start(options.device, options.execution)
    if not is_first_process():
        console.mute()
    with ExitStack() as locks:
        for run in planned if is_first_process() else ():
            locks.enter_context(exclusive(run.folder))
        return _run(planned, options)


def _run(planned: list[Planned], options: UnlearnOptions) -> int:
    begin, execution = time.perf_counter(), chosen_execution(options)
    for run in planned:
        check_folder(run.folder, overwrite=options.output.overwrite or options.output.resume)
    prepared, failures = _prepared(planned, options, execution)
    tasks = [task for task in prepared if task.finished is None]
    _describe(tasks)
    with _resumable(tasks):
        auditor = make_auditor(options.audit.config(), execution) if options.audit.audit else None
        if auditor:  # in every process: players begin with what is found
            for task in tasks:
                audit_task(task, auditor, "before", task.model)
        for group in _groups(tasks):
            if group[0].defence:
                for task in group:
                    failures |= _attempt(task.name, partial(defend, task), len(planned))
            else:
                failures |= _run_together(group, execution, len(planned))
        if auditor and is_first_process():
            for task in tasks:
                if task.name not in failures and "before" in task.audits and task.result and task.result.rounds:
                    audit_task(task, auditor, "after", task.result.model)
        for task in tasks:
            if task.name not in failures and is_first_process():
                failures |= _attempt(task.name, partial(relearn_task, task, options.relearning), len(planned))
        for task in tasks:
            if task.name not in failures:
                failures |= _attempt(task.name, partial(_finish, task, begin, len(planned)), len(planned))
    if len(planned) > 1:
        _summarise(planned, prepared, failures)
    if not prepared:
        return console.BAD_INPUT
    if is_first_process():
        _forget(prepared, failures)
    return SOME_FAILED if failures or any(task.status == "diverged" for task in prepared) else 0


def _forget(tasks: list[Task], failures: dict[str, str]) -> None:
    """Deletes the states of runs whose results are there: of several only now, so that --resume finds them all."""
    for task in tasks:
        if task.name not in failures:
            task.progress.remove()
        if task.finished is not None:
            remove_abandoned(task.folder / RESULT)
        if task.finished is not None and len(tasks) == 1:
            console.console.print(
                f"{console.escaped(str(task.folder))} holds this run's results already", soft_wrap=True
            )


@contextmanager
def _resumable(tasks: list[Task]) -> Iterator[None]:
    """Says how to go on, where something else than bad input interrupts a run after a round."""
    try:
        yield
    except IbauError:
        raise
    except (Exception, KeyboardInterrupt):
        if any(task.progress.exists() for task in tasks):
            rounds = ", ".join(sorted({str(len(task.records)) for task in tasks}))
            console.errors.print(f"interrupted after round {rounds}; the same command with --resume goes on")
        elif not any(task.defence or task.records or task.result for task in tasks):
            console.errors.print(
                "interrupted before the first round was done: nothing is kept, and nothing to --resume"
            )
        raise


def chosen_execution(options: UnlearnOptions) -> Execution:
    """The machine's part of the options."""
    chosen = options.execution
    return Execution(
        precision=chosen.precision,
        microbatch=chosen.microbatch,
        remat=chosen.remat,
        devices=chosen.devices,
        shard_params=chosen.shard_params,
    )


def _prepared(
    planned: list[Planned], options: UnlearnOptions, execution: Execution
) -> tuple[list[Task], dict[str, str]]:
    """Everything checked before any long work, and what is wrong with the runs that can't be."""
    tasks: list[Task] = []
    failures: dict[str, str] = {}
    for run in planned:

        def take(run: Planned = run) -> None:
            tasks.append(prepare(run, options, execution, alone=len(planned) == 1))

        failures |= _attempt(run.name, take, len(planned))
    return tasks, failures


def _attempt(name: str, action: Callable[[], Any], count: int) -> dict[str, str]:
    """Runs `action`; what goes wrong is told, and returned under `name`, unless it is the only run's.

    Raises:
        IbauError, OSError: of the only run.
    """
    try:
        action()
    except (IbauError, OSError) as error:
        return _failed(name, error, count)
    return {}


def _failed(name: str, error: IbauError | OSError, count: int) -> dict[str, str]:
    """Tells what went wrong with one of `count` runs, and returns it under `name`; raises it where that is all."""
    if count == 1:
        raise error
    console.warn(f"{name}: {error}")
    return {name: str(error)}


def _describe(tasks: list[Task]) -> None:
    if len(tasks) == 1:
        console.describe(tasks[0].description())
    elif tasks:
        names = ", ".join(task.name for task in tasks)
        console.describe({"runs": f"{len(tasks)}: {names}", "method": tasks[0].method})


def _groups(tasks: list[Task]) -> Iterator[list[Task]]:
    """Tasks that can unlearn together."""
    left = list(tasks)
    while left:
        first = left[0]
        group = [task for task in left if stackable(member(first), member(task))]
        left = [task for task in left if task not in group]
        yield group


def member(task: Task) -> Member:
    """The task as the algorithm sees it."""
    return Member(task.model, task.clean_set, task.config, task.state, task.audits.get("before"))


def _run_together(tasks: list[Task], execution: Execution, count: int) -> dict[str, str]:
    """All rounds of tasks that fit together, of `count` runs in all; what went wrong with which."""
    bar = RoundProgress(tasks[0].config.n_rounds, [task.name for task in tasks])
    failures: dict[str, str] = {}

    def on_round(index: int, state: State) -> None:
        bar.on_evaluation()
        task = tasks[index]
        if task.name in failures:  # it ends here, but where other processes go on with it
            if jax.process_count() > 1:
                return
            raise NotFiniteError("it failed in a round before")
        try:
            task.take_in(state, bar)
        except NotFiniteError:  # the run ends with the round before
            raise
        except (IbauError, OSError) as error:
            failures.update(_failed(task.name, error, count))

    with bar.running(len(tasks[0].state.rounds)):
        members = [member(task) for task in tasks]
        results = unlearn_many(members, execution=execution, on_round=on_round, on_batch=bar.on_batch)
    for task, result in zip(tasks, results, strict=True):
        if task.name not in failures:
            failures |= _attempt(task.name, partial(task.end, result), count)
    return failures


def _finish(task: Task, begin: float, count: int) -> None:
    """Writes a task's results; the only run's are shown, several have their table at the end."""
    model_file = task.finish(begin)
    if model_file is None or count > 1:
        return
    assert task.before is not None
    console.console.print(console.before_after(task.before, task.after()))
    for when, audit in task.audits.items():
        verdict, *evidence = verdict_lines(audit, task.split.evaluation.class_names)
        console.describe({f"audit {when:<6}": f"{verdict}: {'; '.join(evidence)}"})
    if task.relearned:
        console.console.print(relearning_table(task.relearned))
    conclusion = task.conclusion()
    console.console.print(f"{conclusion.headline} ({'; '.join(conclusion.reasons)})", soft_wrap=True)
    console.console.print(f"cleaned model: {console.escaped(str(model_file))}", soft_wrap=True)
    console.console.print(f"report: {console.escaped(str(task.folder / REPORT))}", soft_wrap=True)


def _summarise(planned: list[Planned], tasks: list[Task], failures: dict[str, str]) -> None:
    records = {task.name: task.summary(failures.get(task.name)) for task in tasks}
    missing = {"status": "failed", "before": None, "after": None}
    for run in planned:
        if run.name not in records:
            records[run.name] = {
                "run": run.name,
                "checkpoint": str(run.subject.ckpt),
                **missing,
                "error": failures[run.name],
            }
    in_order = [records[run.name] for run in planned]
    console.console.print(console.summary_table(in_order))
    if is_first_process() and tasks:
        write_summary(planned[0].folder.parent, in_order)
