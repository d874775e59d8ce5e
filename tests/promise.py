"""What docs/security.md promises that reading a file takes, and what it took."""

import time
from collections.abc import Callable
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_promised(file_size: int) -> int:
    """Bytes."""
    return 64 * 2**20 + 8 * file_size


def seconds_promised(file_size: int) -> float:
    """Of processor time."""
    return 2 + file_size / 10**7


def measured(work: Callable[[], object]) -> tuple[object, float, int]:
    """What `work` returns or raises, the seconds of processor time it took, and the bytes of its highest memory.

    The memory is what the system gave the process at its highest, less what it had before.
    """
    RESET.write_text("5")
    before, start = _memory("VmRSS"), time.process_time()
    try:
        result: object = work()
    except Exception as error:
        result = error
    return result, time.process_time() - start, _memory("VmHWM") - before


def _memory(kind: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(kind))
