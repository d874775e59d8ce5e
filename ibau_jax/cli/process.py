"""What a command's process needs between its checked options and the first import of JAX."""

import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES = "glibc.malloc.hugetlb"
LARGE_PAGES_ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def quiet_libraries() -> None:
    """Keeps third parties' warnings off the screen; our own messages are printed, not warned."""
    warnings.filterwarnings("ignore")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads log what it raises anyway


def use_large_pages() -> None:
    """Starts this process anew, with the same arguments, with an allocator that asks for large pages.

    For commands that compute; where the system offers none, or they are asked for already, it does nothing.

    XLA:CPU allocates arrays of many megabytes for every step, and a quarter of a step's time goes into their pages of
    4 KiB (docs/performance.md). glibc asks for pages of 2 MiB where this variable says so when a process starts. It is
    left alone where it is set; other allocators ignore it.
    """
    given = os.environ.get(TUNABLES, "")
    if LARGE_PAGES in given or multiprocessing.parent_process() or not _on_request():
        return
    os.environ[TUNABLES] = ":".join(filter(None, (given, f"{LARGE_PAGES}=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
    """Whether Linux gives large pages to those that ask for them."""
    try:
        return "[madvise]" in LARGE_PAGES_ALLOWED.read_text()
    except OSError:
        return False
