"""What a person sees: errors as one line, a progress bar, tables."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ibau_jax.errors import IbauError
from ibau_jax.interruption import Terminated, end_on_sigterm

if TYPE_CHECKING:
    from ibau_jax.metrics import Metrics
    from ibau_jax.result import Phase, Round

BAD_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143
SUMMARISED = ("acc", "asr", "ra")
LABELS = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR (all images)", "ra": "RA"}

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def run_command(command: Callable[[], int]) -> None:
    """Runs a script's main function and exits: 2 after one line where the input is to blame, 130 interrupted, 143
    terminated.
    """
    end_on_sigterm()
    try:
        sys.exit(command())
    except IbauError as error:
        fail(str(error))
    except MemoryError:
        fail("out of memory; try a smaller --batch-size")
    except BrokenPipeError:  # the reader of our output is gone, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, say
        fail(str(error))
    except Terminated:
        errors.print("terminated")
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)


def fail(message: str) -> None:
    """Prints `error: message` as one line and exits with code 2."""
    errors.print(f"[red]error:[/red] {escaped(' '.join(message.split()))}", soft_wrap=True)
    sys.exit(BAD_INPUT)


def warn(message: str) -> None:
    """Prints a line to standard error, and the command goes on."""
    errors.print(escaped(" ".join(message.split())), soft_wrap=True)


def mute() -> None:
    """This process is not the one that prints."""
    console.quiet = errors.quiet = True


def escaped(text: str) -> str:
    """`text` without rich's markup and without control characters, which a hostile file may hold."""
    from rich.markup import escape

    return escape("".join(character if character.isprintable() else "?" for character in text))


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{100 * share:.2f} %"


def before_after(before: "Metrics", after: "Metrics") -> Table:
    """The table at the end of a run."""
    table = Table("", "before", "after", "change", title="Before and after")
    for name, label in LABELS.items():
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            table.add_row(label, percent(old), percent(new), f"{100 * (new - old):+.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def summary_table(records: list[dict[str, Any]]) -> Table:
    """The table at the end of several runs, in percent."""
    shown = [name for name in SUMMARISED if any((record["before"] or {}).get(name) is not None for record in records)]
    table = Table("run", *(f"{LABELS[name]} %" for name in shown), "", title="All runs: before → after")
    for record in records:
        table.add_row(escaped(record["run"]), *(_change(record, name) for name in shown), record["status"])
    for column in table.columns[1:-1]:
        column.justify, column.no_wrap = "right", True
    return table


def _change(record: dict[str, Any], name: str) -> str:
    if record["before"] is None or record["before"][name] is None:
        return "-"
    return f"{100 * record['before'][name]:.1f} → {100 * record['after'][name]:.1f}"


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    """The table at the end of a comparison, means over checkpoints and seeds."""
    table = Table(
        "clean\nimages", "method", "runs", "ACC %", "ASR %", "RA %", "DER %", "s", title="Means over all runs"
    )
    for row in rows:
        shares = ["-" if row[name] is None else f"{100 * row[name]:.1f}" for name in (*SUMMARISED, "der")]
        table.add_row(str(row["n_clean"]), row["method"], str(row["runs"]), *shares, f"{row['seconds']:.0f}")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    return table


def metrics_table(metrics: "Metrics") -> Table:
    """One evaluation."""
    table = Table("", "share", title="Evaluation")
    table.columns[1].justify = "right"
    for name, label in LABELS.items():
        if getattr(metrics, name) is not None:
            table.add_row(label, percent(getattr(metrics, name)))
    return table


def make_bar(**options: Any) -> Progress:
    """A bar with a description, a count and the time elapsed, gone when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, **options)


BEFORE_ROUNDS = {"search": "search for suspects", "rehearsal": "rehearsals"}


class RoundProgress:
    """A bar over the batches of a round, and a line for every round done. Of several runs each line says which."""

    def __init__(self, n_rounds: int, names: list[str]) -> None:
        self.n_rounds, self.number = n_rounds, 0
        self.width = max(map(len, names)) if len(names) > 1 else 0
        self.progress = make_bar()
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
        if phase in BEFORE_ROUNDS:
            self.progress.update(self.task, description=BEFORE_ROUNDS[phase], total=count, completed=done)
            return
        self.number = number
        steps = {"inner": ("inner maximisation", 0), "outer": ("outer minimisation", count)}
        name, offset = steps[phase]
        description = f"{self._round(number)} {name}"
        self.progress.update(self.task, description=description, total=2 * count, completed=offset + done)

    def on_evaluation(self) -> None:
        """Says that the round is being evaluated."""
        self.progress.update(self.task, description=f"{self._round(self.number)} evaluation")

    def on_before(self, name: str, metrics: "Metrics") -> None:
        """Prints the figures of the model as it came."""
        self._print(name, f"before     {_figures(metrics)}")

    def on_round(self, name: str, done: "Round", metrics: "Metrics") -> None:
        """Prints the round's figures."""
        line = f"{self._round(done.number)}  {_figures(metrics)}"
        norm = f"  ‖δ‖ {done.perturbation_norm:.4g}" if len(done.perturbation) else ""
        self._print(name, f"{line}{norm}  {done.seconds:.1f} s{_standing(done)}")

    def _round(self, number: int) -> str:
        return f"round {number}/{max(number, self.n_rounds)}"  # there may be more rounds than were planned

    def _print(self, name: str, line: str) -> None:
        run = f"{escaped(name):<{self.width}}  " if self.width else ""
        self.progress.console.print(f"{run}{line}", soft_wrap=True)


def _standing(done: "Round") -> str:
    if done.standing is None:
        return ""
    undone = "; undone" if done.undone else ""
    return f"  held-out ACC {percent(done.standing.acc)}, short cut {percent(done.standing.residual)}{undone}"


def _figures(metrics: "Metrics") -> str:
    figures = [f"ACC {percent(metrics.acc)}", f"ASR {percent(metrics.asr)}", f"RA {percent(metrics.ra)}"]
    return "  ".join(figures if metrics.asr is not None else figures[:1])


def print_facts(lines: dict[str, Any]) -> None:
    """Prints a table of two columns, long texts wrapped."""
    table = Table("", "", show_header=False, pad_edge=False)
    for name, value in lines.items():
        table.add_row(escaped(name), escaped(str(value)))
    console.print(table)


def describe(lines: dict[str, Any]) -> None:
    """Prints what a run is about, a line a fact."""
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(f"{name:<{width}}  {escaped(str(value))}", soft_wrap=True)
