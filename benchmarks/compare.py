"""Runs both sides of a case in turns, A B A B, in one run on one machine."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import ROOT, Case
from benchmarks.work import prepare

SIDES = ("ibau_jax", "torch")
WHOLE_RUN = 3  # rounds of what counts as a whole run


class Worker:
    """A side's process."""

    def __init__(self, side: str, case: Case, folder: Path, device: str, precision: str) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", side, case.name, str(folder), device, precision]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.side, self.facts, self.seconds = side, self.answer(), []  # type: ignore[var-annotated]

    def ask(self, request: str) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that is an answer.

        Raises:
            RuntimeError: the process has ended; the message has the end of what it said.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        assert self.process.stderr is not None
        raise RuntimeError("\n".join(self.process.stderr.read().splitlines()[-5:]))


@dataclass(frozen=True)
class Comparison:
    """Both sides' figures of one case; `content` is what the JSON holds."""

    case: str
    content: dict[str, Any]


def compare(case: Case, device: str, precision: str, report: Callable[[str], None]) -> Comparison:
    """Runs a case.

    Args:
        case: what to do.
        device: as `--device` of the scripts.
        precision: of this project's side.
        report: told what happens.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(case, folder)
        workers = []
        for side in SIDES:  # one after the other, so that neither's start disturbs the other
            workers.append(Worker(side, case, folder, device, precision))
            report(f"{case.name}: {side} ready after {workers[-1].facts['setup_seconds']:.1f} s")
        ceilings = {worker.side: worker.ask("ceiling")["flops_per_second"] for worker in workers}
        for number in range(case.rounds):
            for worker in workers:
                worker.seconds.append(worker.ask("round")["seconds"])
                report(f"{case.name}: {worker.side} round {number + 1}/{case.rounds} {worker.seconds[-1]:.2f} s")
        flops = workers[0].facts["round_flops"]
        content = {worker.side: _figures(case, worker, flops, max(ceilings.values())) for worker in workers}
    ours, torch = (content[side] for side in SIDES)
    content["ratios"] = {
        "round": torch["round_seconds"]["median"] / ours["round_seconds"]["median"],
        "whole_run": torch["whole_run_seconds"] / ours["whole_run_seconds"],
        "host_peak": torch["host_peak_bytes"] / ours["host_peak_bytes"],
    }
    settings = {
        "n_clean": case.n_clean,
        "K": case.K,
        "rounds": case.rounds,
        "model": case.model,
        "precision": precision,
    }
    return Comparison(f"{case.name} ({precision})", {**settings, "ceilings": ceilings, "round_flops": flops, **content})


def _figures(case: Case, worker: Worker, flops: float, ceiling: float) -> dict[str, Any]:
    median = statistics.median(worker.seconds)
    whole = worker.seconds[:WHOLE_RUN]  # the first ones, which are slower
    figures = worker.ask("evaluate")
    return {
        **worker.facts,
        "seconds": worker.seconds,
        "round_seconds": {"median": median, "min": min(worker.seconds), "max": max(worker.seconds)},
        # From the start of the process's work, imports of the framework not counted, to the end of the last round.
        "whole_run_seconds": worker.facts["setup_seconds"] + WHOLE_RUN * sum(whole) / len(whole),
        "images_per_second": case.n_clean / median,
        "flops_per_second": flops / median,
        "share_of_ceiling": flops / median / ceiling,
        **figures,
        **worker.ask("end"),
    }
