"""How large data may be: what a file's bytes account for, and what the machine can hold."""

from contextlib import suppress
from pathlib import Path

from ibau_jax.errors import DataError

# Data in a file may take so many bytes, and so many more for each byte of the file: what compression gives at best for
# images and labels. Files of zeros that stand for gigabytes are refused.
FREE, FACTOR = 2**26, 128
MEMINFO, GROUP_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_size(needed: int, file_size: int, name: str) -> None:
    """Raises DataError unless a file of `file_size` bytes may hold data of `needed` bytes."""
    if needed > FREE + FACTOR * file_size:
        raise DataError(
            f"{name} declares {min(needed, 10**20):,} bytes or more, and the file has {file_size:,}: it is damaged, or "
            "not all of it was written, or it is meant to fill memory"
        )


def check_memory(needed: int, name: str) -> None:
    """Raises DataError unless the machine can hold `needed` bytes, where it says how much it can."""
    available = available_memory()
    if available is not None and needed > available:
        raise DataError(
            f"{name} takes {needed / 2**30:,.1f} GiB of memory, and {available / 2**30:,.1f} GiB are free; take a part "
            "of the images"
        )


def available_memory() -> int | None:
    """Bytes that can be taken, as Linux and the control group say; None where they don't."""
    limits = []
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # "max" is no number
        limits.append(int(GROUP_LIMIT.read_text()))
    return min(limits, default=None)
