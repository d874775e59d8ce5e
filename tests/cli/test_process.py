"""What is done before JAX is imported: nothing slow before the options are checked, and large pages."""

import json
import os
import sys
from pathlib import Path

import pytest

from ibau_jax.cli.process import LARGE_PAGES_ALLOWED
from tests.cli.commands import run
from tests.conftest import ROOT

SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), ROOT / "convert_torch_ckpt.py"])
HEAVY = {"jax", "flax", "optax", "orbax", "torch", "tensorflow", "matplotlib", "scipy", "sklearn"}

# Runs a script's help, then prints which of the slow packages that needed.
HELP = f"""
import contextlib, os, runpy, sys
sys.argv = [sys.argv[1], "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted({HEAVY!r} & set(sys.modules)))
"""

# Prints the arguments, how often it was started and how many KiB of 64 MiB from malloc are in large pages.
PROGRAM = """
import ctypes, json, os, sys
with open(sys.argv[1], "a") as starts:
    starts.write("x")
from ibau_jax.cli import process
process.use_large_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ctypes.memset(libc.malloc(ctypes.c_size_t(64 << 20)), 1, 64 << 20)
large = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(json.dumps([sys.argv[2:], len(open(sys.argv[1]).read()), int(large.split()[1]), os.environ["GLIBC_TUNABLES"]]))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_needs_no_slow_import(script):
    done = run(sys.executable, "-c", HELP, script, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def started(tmp_path: Path, tunables: str | None) -> list:
    if not LARGE_PAGES_ALLOWED.exists() or "[madvise]" not in LARGE_PAGES_ALLOWED.read_text():
        pytest.skip("this system gives no large pages on request")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    done = run(sys.executable, "-c", PROGRAM, tmp_path / "starts", "a", "b c", "--d=é", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_comes_in_large_pages(tmp_path):
    arguments, starts, large, tunables = started(tmp_path, None)
    assert (arguments, starts) == (["a", "b c", "--d=é"], 2)
    assert large >= 60 << 10
    assert tunables == "glibc.malloc.hugetlb=1"


def test_other_tunables_are_kept(tmp_path):
    *_, tunables = started(tmp_path, "glibc.malloc.arena_max=4")
    assert tunables == "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"


def test_who_has_chosen_is_left_alone(tmp_path):
    _, starts, large, _ = started(tmp_path, "glibc.malloc.hugetlb=0")
    assert (starts, large) == (1, 0)
