"""The relearning check of a run: the cleaned model beside the one that came and one that never had the backdoor."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flax import nnx
from rich.table import Table

from ibau_jax.cli.console import warn
from ibau_jax.cli.job import load_subject, settled
from ibau_jax.cli.options import RelearnOptions
from ibau_jax.cli.progress import Bar
from ibau_jax.config import TrainConfig
from ibau_jax.errors import ConfigError, IbauError
from ibau_jax.metrics import check_measurable, evaluate
from ibau_jax.models.normalized import normalized
from ibau_jax.relearning import Relearned, relearn, tempting_set

if TYPE_CHECKING:
    from ibau_jax.cli.task import Task

TRAINABLE = 1000  # clean images that a reference can be trained on
CLEANED, AS_IT_CAME, CLEAN = "cleaned", "as it came", "never backdoored"


def check_relearning(task: "Task", options: RelearnOptions) -> None:
    """Raises ConfigError or CheckpointError, before any long work, where the check could not be made."""
    if options.relearn is None:
        return
    if task.attack is None:
        raise ConfigError("--relearn puts triggers on images; name the attack by --attack")
    tempting_set(task.clean_set, task.attack, task.num_classes, options.config(task.config.seed))
    check_measurable(task.attack, task.sampled[0], task.num_classes)
    if options.clean_ckpt is not None:
        task.reference = _loaded(task, options)


def relearn_task(task: "Task", options: RelearnOptions) -> None:
    """Makes the check, where it is asked for and the run has a result."""
    if options.relearn is None or task.result is None or not task.result.rounds:
        return
    assert task.attack is not None
    config = options.config(task.config.seed)
    tempting = tempting_set(task.clean_set, task.attack, task.num_classes, config)
    models = {CLEANED: task.result.model, AS_IT_CAME: task.model}
    with Bar() as bar:
        job = bar.add_task("relearning", total=config.epochs)
        reference = task.reference or _trained(task, bar, job)
        if reference is not None:
            models[CLEAN] = reference
        try:
            task.relearned = relearn(
                models,
                tempting,
                lambda model: evaluate(model, *task.sampled),
                config,
                on_epoch=lambda name, done: bar.update(
                    job, description=f"relearning: {name}", completed=done, total=config.epochs
                ),
            )
        except IbauError as error:  # such as fine-tuning that diverged: no reason to lose the run's results
            warn(f"{task.name} has no relearning check: {error}")


def _loaded(task: "Task", options: RelearnOptions) -> nnx.Module:
    assert options.clean_ckpt is not None
    name = task.subject.checkpoint.architecture.name
    reference = load_subject(replace(task.options, ckpt=options.clean_ckpt, model=name))
    if nnx.split(reference.model)[0] != nnx.split(task.model)[0]:
        raise ConfigError(f"--clean-ckpt {options.clean_ckpt} is another architecture than {task.subject.path}")
    reference = settled(reference, task.split.evaluation, task.options.force)
    return reference.model


def _trained(task: "Task", bar: Any, job: Any) -> nnx.Module | None:
    """A model of the same architecture, trained on the clean set; None, and a line, where that can't be."""
    from ibau_jax.training import train

    if len(task.clean_set) < TRAINABLE:
        warn(f"{len(task.clean_set)} clean images train no model to compare with; name a clean one by --clean-ckpt")
        return None
    checkpoint, config = task.subject.checkpoint, TrainConfig(seed=task.config.seed)
    bar.update(job, description="relearning: training a clean model", total=config.epochs)
    try:
        return train(
            normalized(checkpoint.architecture, task.subject.normalization),
            task.num_classes,
            task.clean_set,
            config,
            on_epoch=lambda state: bar.update(job, completed=len(state.losses)),
        ).model
    except IbauError as error:
        warn(f"no clean model to compare with: {error}")
        return None


def relearning_table(relearned: dict[str, Relearned]) -> Table:
    """The attack's success, epoch by epoch."""
    table = Table("model", title="ASR (and ACC) in %, by epoch of fine-tuning with triggered images")
    for epoch in range(max(len(found.asr) for found in relearned.values())):
        table.add_column(str(epoch), justify="right")
    for name, found in relearned.items():
        table.add_row(name, *(f"{100 * (done.asr or 0):.1f}\n({100 * done.acc:.1f})" for done in found.figures))
    return table


def relearning_record(relearned: dict[str, Relearned]) -> dict[str, Any]:
    """What result.json holds: figures before and after each epoch, by model."""
    return {name: [asdict(metrics) for metrics in found.figures] for name, found in relearned.items()}
