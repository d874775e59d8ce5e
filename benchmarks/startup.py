"""How long the command line takes from the start of its process to its first round, with a cold and a warm cache.

    python -m benchmarks.startup [--ckpt FILE --dataset SPEC ... ]

The arguments are those of scripts/unlearn.py; by default the embedded example with a published preset and without
audits, so that nothing is searched before its first round. Each run is a process of its own that ends where its first
round would begin; the first has an empty cache of compiled programs, the others find what it left.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WARM_RUNS = 3
# Prints the seconds since this process was started (its age, as the system counts it) and how many of them compiled.
PROGRAM = """
import os, runpy, sys, time
from ibau_jax.unlearning import loop
def at_first_round(stack, steps, *rest):
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    age = float(open("/proc/uptime").read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    print("first round after", age, "of which compiling", steps.seconds, flush=True)
    os._exit(0)
loop.run_round = at_first_round
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def first_round(arguments: list[str], cache: str) -> tuple[float, float]:
    """Seconds from process start to the first round, and those of them that compiled."""
    program = PROGRAM.format(script=str(ROOT / "scripts" / "unlearn.py"))
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True, check=False)
    line = [line.split() for line in done.stdout.splitlines() if line.startswith("first round after")]
    if not line:
        raise SystemExit(done.stdout + done.stderr)
    return float(line[0][3]), float(line[0][7])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = [str(Path(a).absolute()) if Path(a).exists() else a for a in parser.parse_known_args()[1]]
    arguments = arguments or [
        "--ckpt",
        str(ROOT / "examples" / "badnets_digits.pth"),
        "--preset",
        "cifar10",
        "--no-audit",
    ]
    with tempfile.TemporaryDirectory() as cache:
        cold, compiled = first_round(arguments, cache)
        print(f"cold cache: first round after {cold:.1f} s, of which {compiled:.1f} s compiled")
        warm = [first_round(arguments, cache) for _ in range(WARM_RUNS)]
    totals, compiles = zip(*warm, strict=True)
    print(
        f"warm cache: first round after {statistics.median(totals):.1f} s (median of {WARM_RUNS}: "
        f"{min(totals):.1f} to {max(totals):.1f}), of which {statistics.median(compiles):.1f} s traced and loaded"
    )


if __name__ == "__main__":
    main()
