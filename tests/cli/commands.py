"""The command lines that the tests here run as a user would: in a process of their own."""

import subprocess
import sys

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "badnets_digits.pth"
AUDITED_UNLEARN = [sys.executable, str(ROOT / "scripts" / "unlearn.py")]
UNLEARN = [*AUDITED_UNLEARN, "--no-audit"]  # two audits take longer than all else in most tests
AUDIT = [sys.executable, str(ROOT / "scripts" / "audit.py")]
EVALUATE = [sys.executable, str(ROOT / "scripts" / "evaluate.py")]
POISON = [sys.executable, str(ROOT / "scripts" / "poison.py")]
COMPARE = [sys.executable, str(ROOT / "scripts" / "compare.py")]
FAST = ["--preset", "cifar10", "--n-rounds", "1", "--K", "1", "--n-clean", "40", "--batch-size", "20"]
CONVERT = [sys.executable, str(ROOT / "convert_torch_ckpt.py")]


def run(*arguments, cwd, **options):
    return subprocess.run([*map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def unlearn(*arguments, cwd):
    return run(*UNLEARN, *arguments, cwd=cwd)
