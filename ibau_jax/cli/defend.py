"""Another defence than I-BAU in place of its rounds."""

import time
from typing import TYPE_CHECKING

import numpy as np

from ibau_jax.cli.progress import RoundProgress
from ibau_jax.unlearning import Result, Round

if TYPE_CHECKING:
    from ibau_jax.cli.task import Task


def defend(task: "Task") -> None:
    """Runs a task's defence; it counts as one round, without a perturbation."""
    assert task.defence is not None
    bar, start = RoundProgress(1, [task.name]), time.perf_counter()
    with bar.running(0):

        def on_epoch(done: int, count: int) -> None:
            bar.on_batch("outer", 1, done, count)

        model = task.defence(task.model, task.clean_set, task.tuning, execution=task.execution, on_epoch=on_epoch)
        none = np.zeros((0, *task.clean_set.images.shape[1:]), np.float32)
        done = Round(1, none, 0.0, 0.0, 0.0, time.perf_counter() - start)
        bar.on_evaluation()
        task.take_in(task.state.after(done, model, task.state.optimizer_state, None), bar)
    task.end(Result(model, (done,), "completed", 0.0, done.seconds))
