"""Signals that end a run: they wait while something is being written, and SIGTERM is told apart from ^C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which asks a process to end as ^C does."""


def end_on_sigterm() -> None:
    """Makes SIGTERM raise `Terminated` in the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


@contextmanager
def deferred_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of the block, then do what they would have done at once.

    In other threads than the main one, which signals don't reach, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before = {number: signal.signal(number, lambda *arguments: came.append(arguments)) for number in SIGNALS}
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
    for number, frame in came[:1]:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
