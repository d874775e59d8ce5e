"""The command lines that the tests here run as a user would: in a process of their own."""

import subprocess
import sys

from tests.cli.forked import run_forked
from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "badnets_digits.pth"
AUDITED_UNLEARN = [sys.executable, str(ROOT / "scripts" / "unlearn.py")]
UNLEARN = [*AUDITED_UNLEARN, "--no-audit"]  # two audits take longer than all else in most tests
AUDIT = [sys.executable, str(ROOT / "scripts" / "audit.py")]
EVALUATE = [sys.executable, str(ROOT / "scripts" / "evaluate.py")]
POISON = [sys.executable, str(ROOT / "scripts" / "poison.py")]
COMPARE = [sys.executable, str(ROOT / "scripts" / "compare.py")]
FAST = ["--preset", "cifar10", "--n-rounds", "1", "--K", "2", "--n-clean", "40", "--batch-size", "20"]
CONVERT = [sys.executable, str(ROOT / "convert_torch_ckpt.py")]
TIMEOUT = 300  # seconds


def run(*arguments, cwd, fresh=False, **options):
    """A command's exit code and output. It compiles as the tests do (tests/conftest.py): the slow ones as for a user.

    Args:
        arguments: the command line. A Python script is run by a process that has imported already.
        cwd: the folder it runs in.
        fresh: by a new one all the same, as a user's shell does.
        options: of `subprocess.run`; a process that is given any is new.
    """
    command = [*map(str, arguments)]
    if command[0] == sys.executable and command[1].endswith(".py") and not fresh and not options:
        return run_forked(command[1], command[2:], cwd, TIMEOUT)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, **options)


def unlearn(*arguments, cwd):
    return run(*UNLEARN, *arguments, cwd=cwd)
