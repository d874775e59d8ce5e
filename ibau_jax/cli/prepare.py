"""From the options of a run to its task: everything read and checked before any long work."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.checkpoints.checkpoint import check_can_be_saved
from ibau_jax.checkpoints.shards import files_of
from ibau_jax.cli import console
from ibau_jax.cli.job import Subject, attack_on, check_plausible, load_split, load_subject, settled
from ibau_jax.cli.options import OutputOptions
from ibau_jax.cli.plan import Planned
from ibau_jax.cli.relearn import check_relearning
from ibau_jax.cli.run_folder import RESULT, check_apart, check_folder, finished_result
from ibau_jax.cli.task import Task
from ibau_jax.cli.unlearn_options import UnlearnOptions
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Split
from ibau_jax.defences import get_defence
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.files import check_free
from ibau_jax.metrics import check_measurable
from ibau_jax.triggers import Attack
from ibau_jax.unlearning import check_feasible, initial_state

BYTES_A_WEIGHT = 20  # on the disk, in float32: results hold it twice, and a state with the two averages of Adam


def prepare(planned: Planned, options: UnlearnOptions, execution: Execution, *, alone: bool) -> Task:
    """Reads and checks everything, and takes up an interrupted run where that is asked for.

    With `--resume` the only run must have been interrupted (`alone`); of several, those that had not begun begin.

    Raises:
        IbauError: the input is to blame.
    """
    subject = load_subject(planned.subject)
    for path in _paths_read(subject.path, options):
        check_apart(planned.folder, path)
    check_can_be_saved(subject.checkpoint)
    split = load_split(options.data, subject, planned.config.seed)
    attack = attack_on(subject, options.attack, split.used)
    if attack is not None:
        check_measurable(attack, split.evaluation, subject.checkpoint.num_classes)
    config = planned.config
    defence, tuning, constants = None, None, {"preset": options.method.preset, **asdict(config)}
    if options.method.method != "ibau":
        defence = get_defence(options.method.method)
        tuning = options.method.tuning(defence.config, planned.config)
        config, constants = UnlearnConfig(n_rounds=1, seed=planned.config.seed), asdict(tuning)
        if options.output.resume:
            raise ConfigError(f"--method {defence.name} keeps no state to --resume from")
    else:
        check_feasible(config, split.clean_set)
    shown, classes = len(np.unique(split.clean_set.labels)), subject.checkpoint.num_classes
    if 2 * shown < classes:
        console.warn(
            f"the {len(split.clean_set)} clean images that unlearn are of {shown} of {classes} classes: accuracy on "
            "the others may be lost"
        )
    check_free(planned.folder, BYTES_A_WEIGHT * sum(leaf.size for leaf in subject.checkpoint.leaves.values()))
    subject = settled(subject, split.evaluation, planned.subject.force)
    if options.data.clean_set:
        check_plausible(subject, split.clean_set, planned.subject.force)
    settings = {"method": options.method.method, **constants, **_settings(subject, split, attack, execution)}
    settings["class_order"] = options.data.class_order
    fresh = initial_state(subject.model, config)
    task = Task(
        planned.name,
        planned.subject,
        subject,
        split,
        attack,
        config,
        planned.folder,
        execution,
        settings,
        fresh,
        defence=defence,
        tuning=tuning,
    )
    check_relearning(task, options.relearning)
    _take_up(task, options.output, alone)
    return task


def _paths_read(checkpoint: Path, options: UnlearnOptions) -> Iterator[Path]:
    """The files and folders among the inputs."""
    data, attack = options.data, options.attack
    for given in (data.dataset, data.clean_set, attack.attack, attack.trigger_mask, options.relearning.clean_ckpt):
        if given is not None and os.path.exists(given):
            yield Path(given)
    yield from files_of(checkpoint)


def _take_up(task: Task, output: OutputOptions, alone: bool) -> None:
    """Goes on with an interrupted run, where `--resume` asks for that, or takes a finished one as it is.

    A run that was killed while its results were put in place has no result.json: all is written again.
    """
    waits = task.progress.exists()
    if not output.resume:
        if waits:
            console.console.print("an interrupted run is there; it is replaced (--resume would go on with it)")
        return
    if not (waits and output.overwrite):
        task.finished = finished_result(task.folder, task.settings)
        if task.finished is not None:
            return
    resumed = alone or waits
    half_placed = resumed and not (task.folder / RESULT).exists()
    check_folder(task.folder, overwrite=output.overwrite or half_placed)
    if resumed:
        task.state, task.before, task.records = task.progress.restore_state(task.state, task.config)


def _settings(subject: Subject, split: Split, attack: Attack | None, execution: Execution) -> dict[str, Any]:
    return {
        "precision": execution.precision,
        "clean_set": split.clean_set.name,
        "n_clean": len(split.clean_set),
        "dataset": split.evaluation.name,
        "n_evaluation": len(split.evaluation),
        "attacks": [part.name for part in attack.each] if attack else [],
        "target_labels": [part.target_label for part in attack.each] if attack else [],
        "mean": subject.normalization.mean if subject.normalization else None,
        "std": subject.normalization.std if subject.normalization else None,
        "model": subject.checkpoint.architecture.name,
        "image_size": subject.checkpoint.image_size.plain(),
        "key": subject.options.key,
        "leave_out": subject.options.leave_out,
        "checkpoint_sha256": subject.sha256(),
    }
