"""What a person sees: errors as one line, and tables."""

import codecs
import io
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ibau_jax.errors import IbauError, shortened
from ibau_jax.interruption import Terminated, end_on_sigterm

if TYPE_CHECKING:
    from ibau_jax.metrics import Metrics

BAD_INPUT = 2
FAULT = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 would say that something was found
INTERRUPTED, TERMINATED = 130, 143
ASCII = "ibau_jax.ascii"  # the name of an error handler for encoding
LOOKALIKES = {
    "→": "->", "‖": "||", "δ": "delta", "±": "+/-", "·": "*", "×": "x", "–": "-", "—": "-", "\N{MINUS SIGN}": "-",
    "“": '"', "”": '"', "’": "'", "•": "*", "…": "...",
    **dict.fromkeys("─━═╌╍┄┅┈┉", "-"), **dict.fromkeys("│┃║", "|"), **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╡╞╪", "+"),
}  # fmt: skip
SUMMARISED = ("acc", "asr", "ra")
INTERVAL = "95 % interval"
LABELS = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR (all images)", "ra": "RA"}

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def run_command(command: Callable[[], int], spare: Sequence[str] = ()) -> None:
    """Runs a script's main function and exits: 2 after one line where the input is to blame, 70 after a traceback
    where the program is, 130 interrupted, 143 terminated. `spare` are the script's options that spare memory.
    """
    end_on_sigterm()
    show_all_characters()
    try:
        sys.exit(command())
    except IbauError as error:
        fail(str(error))
    except MemoryError as error:
        fail(_out_of_memory(error, spare))
    except BrokenPipeError:  # the reader of our output is gone, as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, say
        named = isinstance(error.filename, str | bytes)
        where = f"can't read or write {shortened(os.fsdecode(error.filename))}: " if named else ""
        fail(f"{where}{error.strerror or error}")
    except Terminated:
        errors.print("terminated")
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        # JAX's class of errors is not imported for --help, so it is known by its message.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            fail(_out_of_memory(error, spare))
        traceback.print_exc()
        errors.print("this is a fault of the program; please report it with the lines above", soft_wrap=True)
        sys.exit(FAULT)


def _out_of_memory(error: BaseException, spare: Sequence[str]) -> str:
    """What to do about it, and how much was asked for, where that is known."""
    asked = re.search(r"allocat\w* ([\d.]+ ?\w*)", str(error))
    how_much = f" ({asked[1].strip()} were asked for)" if asked else ""
    advice = f"try {' or '.join(spare)}" if spare else "try fewer or smaller images, or a machine with more memory"
    return f"out of memory{how_much}; {advice}"


def show_all_characters() -> None:
    """Makes standard output and error show any character: one that their encoding lacks by what ASCII has for it."""
    codecs.register_error(ASCII, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ASCII)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = (LOOKALIKES.get(character) or _plain(character) for character in error.object[error.start : error.end])
    return "".join(shown), error.end


def _plain(character: str) -> str:
    """A letter without its accents, where it has any, else a question mark."""
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


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
    table = Table("", "before", "after", "change", INTERVAL, title=f"Before and after, on {_counts(after)}")
    for name, label in LABELS.items():
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            change = f"{100 * (new - old):+.2f}"
            table.add_row(label, percent(old), percent(new), change, interval_text(after.interval(name)))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def interval_text(interval: tuple[float, float] | None) -> str:
    """A confidence interval in percent."""
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _counts(metrics: "Metrics") -> str:
    """On how many images it was measured."""
    if metrics.n_images is None:
        return "images that nobody counted"
    triggered = "" if metrics.n_triggered is None else f" and {metrics.n_triggered} triggered ones"
    return f"{metrics.n_images} images{triggered}"


def warn_of_figures(metrics: "Metrics") -> None:
    """Prints a warning where few images were measured on, and where a trigger leads elsewhere than named."""
    from ibau_jax.metrics import ENOUGH

    if metrics.doubt_of_target:
        warn(metrics.doubt_of_target)
    if metrics.fewest is not None and metrics.fewest < ENOUGH:
        warn(f"only {metrics.fewest} image{'s' * (metrics.fewest != 1)} measured: below {ENOUGH} figures are uncertain")


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
    table = Table("", "share", INTERVAL, title=f"Evaluation on {_counts(metrics)}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in LABELS.items():
        if getattr(metrics, name) is not None:
            table.add_row(label, percent(getattr(metrics, name)), interval_text(metrics.interval(name)))
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
