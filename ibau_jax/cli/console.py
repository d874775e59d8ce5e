"""What a person sees: errors as one line, and tables."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ibau_jax.errors import IbauError
from ibau_jax.interruption import Terminated, end_on_sigterm

if TYPE_CHECKING:
    from ibau_jax.metrics import Metrics

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
