"""One side of a comparison, a process of its own: `python -m benchmarks.worker SIDE CASE FOLDER DEVICE PRECISION`.

It answers once when it could begin its first round, then does what its standard input asks for, a word a line: `round`,
`evaluate`, `ceiling`, `end`. Every answer is a line of JSON. So two sides take turns, and each has its own peak memory.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case

KIB = 1024


def main() -> None:
    """Answers until `end`."""
    side, name, folder, device, precision = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    start = time.perf_counter()
    worker = make_side(side, case, Path(folder), device, precision)
    answer({"setup_seconds": time.perf_counter() - start, **worker.facts()})
    for line in sys.stdin:
        request = line.strip()
        if request == "round":
            begin = time.perf_counter()
            worker.round()
            answer({"seconds": time.perf_counter() - begin})
        elif request == "evaluate":
            answer(worker.evaluate())
        elif request == "ceiling":
            answer({"flops_per_second": worker.ceiling()})
        elif request == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
            answer({"host_peak_bytes": peak, "device_peak_bytes": worker.device_peak()})
            return


def make_side(side: str, case: Case, folder: Path, device: str, precision: str) -> Any:
    """The side by its name; only its own framework is imported."""
    if side == "torch":
        from benchmarks.torch_side import TorchSide

        return TorchSide(case, folder, device)
    from benchmarks.jax_side import JaxSide

    return JaxSide(case, folder, device, precision)


def answer(content: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
