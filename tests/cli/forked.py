"""Commands in processes that need not import anew: each is forked from a server that has imported already.

Imports are two to three seconds of processor time of every command, more than most of what the tests ask of it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import Any

IMPORTED = ["ibau_jax.cli.run", "ibau_jax.cli.compare", "ibau_jax.cli.poison", "ibau_jax.cli.convert"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


def run_forked(script: str, arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Does what `python SCRIPT ARGUMENT...` does in `cwd`, and returns its exit code and output.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds; it is killed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        outputs = [reduction.DupFd(file.fileno()) for file in (out, err)]
        process = _context.Process(target=_run_script, args=(script, arguments, str(cwd), *outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([script, *arguments], timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, out.read(), err.read())


def _run_script(script: str, arguments: list[str], cwd: str, out: Any, err: Any) -> None:
    """What the forked process does."""
    os.dup2(out.detach(), 1)
    os.dup2(err.detach(), 2)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
