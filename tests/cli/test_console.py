"""What a person sees where the terminal or the memory is too small."""

import io
import sys

import jax
import pytest

from ibau_jax.cli import console
from ibau_jax.metrics import Metrics


@pytest.fixture
def terminal(monkeypatch):
    """Standard output and error of an encoding, and what was written to them."""

    def of(encoding):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        return [stream.buffer for stream in streams]

    return of


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "||delta|| 1 -> 2 e ?"), ("latin-1", "||delta|| 1 -> 2 \xe9 ?"),
                                                 ("utf-8", "‖δ‖ 1 → 2 é 漢")])  # fmt: skip
def test_characters_that_a_terminal_lacks_are_replaced(terminal, encoding, shown):
    out, _ = terminal(encoding)
    console.show_all_characters()
    console.console.print("‖δ‖ 1 → 2 é 漢")
    console.console.print(console.before_after(Metrics(0.5, n_images=7), Metrics(0.25, n_images=7)))
    lines = out.getvalue().decode(encoding).splitlines()
    assert lines[0] == shown
    assert "-25.00" in "".join(lines)


SPARE = ("a smaller --microbatch", "--remat")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.\n\nmore\n"),
            "error: out of memory (123456 bytes were asked for); try a smaller --microbatch or --remat\n",
        ),
        (MemoryError(), "error: out of memory; try a smaller --microbatch or --remat\n"),
    ],
)
def test_too_little_memory_is_one_line_that_names_what_spares_it(terminal, error, message):
    _, err = terminal("utf-8")

    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        console.run_command(command, SPARE)
    assert (ended.value.code, err.getvalue().decode()) == (2, message)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: something"), RuntimeError("x"), KeyError("x")])
def test_what_is_a_bug_stays_a_traceback(terminal, error):
    """Its exit code is not 1, which says of an audit that something was found."""
    _, err = terminal("utf-8")

    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        console.run_command(command, SPARE)
    assert ended.value.code == 70
    shown = err.getvalue().decode()
    assert "Traceback" in shown
    assert type(error).__name__ in shown
    assert shown.endswith("this is a fault of the program; please report it with the lines above\n")
