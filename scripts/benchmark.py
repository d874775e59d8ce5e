"""Compares this project's speed with eager PyTorch's on the same work, in one run on this machine."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ibau_jax.cli import console, process
from ibau_jax.cli.options import parse
from ibau_jax.config import Precision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the folder `benchmarks`, which is no package


@dataclass(frozen=True)
class Options:
    """Runs the cases of benchmarks/cases.py through this project and through benchmarks/torch_baseline.py, in turns.

    Needs torch: pip install -e ".[test]". Writes benchmarks/results/DEVICE.json and the tables of docs/performance.md.
    """

    case: tuple[str, ...] = ()
    """cases to run; by default all whose data is there and that the device is made for"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where both sides run"""
    precision: Precision = "float32"
    """of this project's products; PyTorch has its defaults (tf32 in its convolutions on a GPU)"""
    dry_run: bool = False
    """print the results, write nothing"""


def main() -> int:
    """Parses the command line, measures, writes."""
    options = parse(Options)
    process.use_large_pages()
    process.quiet_libraries()
    from benchmarks.cases import CASES
    from benchmarks.compare import SIDES, compare
    from benchmarks.report import machine, markdown, store, update_document
    from ibau_jax.cli.device import choose_device
    from ibau_jax.errors import ConfigError

    unknown = set(options.case) - {case.name for case in CASES}
    if unknown:
        raise ConfigError(f"--case {', '.join(sorted(unknown))}: choose from {', '.join(case.name for case in CASES)}")
    import jax

    choose_device(options.device)
    on_gpu = jax.default_backend() != "cpu"
    comparisons, device = [], machine()
    for case in CASES:
        wanted = case.name in options.case if options.case else on_gpu or not case.gpu_only
        if wanted and (missing := case.missing()):
            console.warn(f"{case.name} is left out: {missing} is not there")
        elif wanted:
            comparison = compare(case, options.device, options.precision, console.console.print)
            comparisons.append(comparison)
            device = comparison.content[SIDES[0]]["device"] if on_gpu else device
            if not options.dry_run:
                console.console.print(f"written: {store([comparison], device)}")
                update_document()
    results = {"device": device, "cases": {comparison.case: comparison.content for comparison in comparisons}}
    print(markdown(json.loads(json.dumps(results))))
    return 0


if __name__ == "__main__":
    console.run_command(main)
