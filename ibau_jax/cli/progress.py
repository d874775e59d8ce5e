"""How far long work is: a bar on a terminal, a line now and then in a log."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ibau_jax.cli.console import console, errors, escaped, percent

if TYPE_CHECKING:
    from ibau_jax.auditing import Suspect
    from ibau_jax.metrics import Metrics
    from ibau_jax.unlearning import Phase, Round

BETWEEN_LINES = 60.0  # seconds
SHOWN = 2  # classes that stand out


class Bar(Progress):
    """A description, a count and the time elapsed, gone when it ends.

    Where there is no terminal to draw it on, standard error has a line from time to time.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.told = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich's."""
        super().update(task_id, **changes)
        if self.disable and time.monotonic() - self.told >= BETWEEN_LINES:
            self.told = time.monotonic()
            task = next(task for task in self.tasks if task.id == task_id)
            count = f" {task.completed:.0f}/{task.total:.0f}" if task.total else ""
            errors.print(f"{escaped(task.description)}{count}", soft_wrap=True)


class RoundProgress:
    """A bar over the batches of a round, and a line for every round done. Of several runs each line says which."""

    def __init__(self, n_rounds: int, names: list[str]) -> None:
        self.n_rounds, self.number = n_rounds, 0
        self.width = max(map(len, names)) if len(names) > 1 else 0
        self.progress = Bar()
        self.task: TaskID

    @contextlib.contextmanager
    def running(self, done: int) -> Iterator["RoundProgress"]:
        """Shows the bar; `done` rounds are already behind."""
        self.number = done + 1
        self.task = self.progress.add_task("compiling", total=None)
        with self.progress:
            yield self

    def on_batch(self, phase: "Phase", number: int, done: int, count: int) -> None:
        """Moves the bar."""
        if phase == "search":
            self.progress.update(self.task, description="search for players", total=count, completed=done)
            return
        self.number = number
        steps = {"inner": ("inner maximisation", 0), "outer": ("outer minimisation", count)}
        name, offset = steps[phase]
        description = f"{self._round(number)} {name}"
        self.progress.update(self.task, description=description, total=2 * count, completed=offset + done)

    def on_evaluation(self) -> None:
        """Says that the round is being evaluated."""
        self.progress.update(self.task, description=f"{self._round(self.number)} evaluation")

    def on_before(self, name: str, metrics: "Metrics", outliers: Sequence["Suspect"]) -> None:
        """Prints the figures of the original model, and the classes that stood out in it."""
        self._print(name, f"before     {_figures(metrics)}{_standing_out(outliers)}")
        if metrics.doubt_of_target:
            self._print(name, metrics.doubt_of_target)

    def on_round(self, name: str, done: "Round", metrics: "Metrics") -> None:
        """Prints the round's figures."""
        line = f"{self._round(done.number)}  {_figures(metrics)}"
        norm = f"  ‖δ‖ {done.perturbation_norm:.4g}" if len(done.perturbation) else ""
        self._print(name, f"{line}{norm}  {done.seconds:.1f} s{_standing_out(done.outliers)}")

    def _round(self, number: int) -> str:
        return f"round {number}/{self.n_rounds}"

    def _print(self, name: str, line: str) -> None:
        run = f"{escaped(name):<{self.width}}  " if self.width else ""
        self.progress.console.print(f"{run}{line}", soft_wrap=True)


def _standing_out(outliers: Sequence["Suspect"]) -> str:
    if not outliers:
        return ""
    return "  stands out: " + ", ".join(f"{one.name} ({one.space} {one.ratio:.1f}x)" for one in outliers[:SHOWN])


def _figures(metrics: "Metrics") -> str:
    figures = [f"ACC {percent(metrics.acc)}", f"ASR {percent(metrics.asr)}", f"RA {percent(metrics.ra)}"]
    return "  ".join(figures if metrics.asr is not None else figures[:1])
