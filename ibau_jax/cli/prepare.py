"""From the options of a run to its task: everything read and checked before any long work."""

from dataclasses import asdict
from typing import Any

from ibau_jax.cli import console
from ibau_jax.cli.job import Subject, attack_on, load_split, load_subject
from ibau_jax.cli.plan import Planned
from ibau_jax.cli.relearn import check_relearning
from ibau_jax.cli.task import Task
from ibau_jax.cli.unlearn_options import UnlearnOptions
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Split
from ibau_jax.defences import get_defence
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.member import initial_state
from ibau_jax.metrics import Metrics
from ibau_jax.triggers import Attack


def prepare(planned: Planned, options: UnlearnOptions, execution: Execution, *, alone: bool) -> Task:
    """Reads and checks everything, and takes up an interrupted run where that is asked for.

    With `--resume` the only run must have been interrupted (`alone`); of several, those that had not begun begin.

    Raises:
        IbauError: the input is to blame.
    """
    subject = load_subject(planned.subject)
    split = load_split(options.data, subject, planned.config.seed)
    attack = attack_on(subject, options.attack, split.used)
    preset, config = options.method.suited(planned.config, len(split.clean_set))
    defence, tuning, constants = None, None, {"preset": preset, **asdict(config)}
    if options.method.method != "ibau":
        defence = get_defence(options.method.method)
        tuning = options.method.tuning(defence.config, planned.config)
        config, constants = UnlearnConfig(n_rounds=1, seed=planned.config.seed), asdict(tuning)
        if options.output.resume:
            raise ConfigError(f"--method {defence.name} keeps no state to --resume from")
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
    if options.output.resume and (alone or task.progress.exists()):
        task.state, stored = task.progress.restore_state(fresh)
        task.records, task.before = stored["rounds"], Metrics(**stored["before"])
    elif task.progress.exists():
        console.console.print("an interrupted run is there; it is replaced (--resume would go on with it)")
    return task


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
        "checkpoint_sha256": subject.sha256(),
    }
