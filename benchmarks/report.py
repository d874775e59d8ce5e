"""The results' files, and the tables made of them."""

import json
import platform
import re
from pathlib import Path
from typing import Any

from benchmarks.cases import ROOT
from benchmarks.compare import SIDES, Comparison

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
HEADS = (
    "case",
    "side",
    "compile s",
    "round s: median (min–max)",
    "whole run s",
    "images/s",
    "GFLOP/s (of ceiling)",
    "host MiB",
    "device MiB",
    "ACC / ASR %",
)
BEGIN, END = "<!-- results: written by scripts/benchmark.py -->", "<!-- end of results -->"


def device_slug(name: str) -> str:
    """A device's name as a file name: `cpu-amd-epyc-2-cores`, `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine() -> str:
    """The processor and how many cores of it there are."""
    import os

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU {model} {os.cpu_count()} cores"


def store(comparisons: list[Comparison], device: str) -> Path:
    """Writes results/DEVICE.json; cases that were not run this time keep what they had."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{device_slug(device)}.json"
    found: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    found |= {comparison.case: comparison.content for comparison in comparisons}
    path.write_text(json.dumps({"device": device, "host": machine(), "cases": found}, indent=2) + "\n")
    return path


def markdown(results: dict[str, Any]) -> str:
    """One device's table."""
    lines = [f"### {results['device']}", "", f"| {' | '.join(HEADS)} |", "|" + " --- |" * len(HEADS)]
    for name, case in results["cases"].items():
        lines += [_row(name, side, case) for side in SIDES]
        ratios = case["ratios"]
        lines.append(
            f"| | **ratio** | | **{ratios['round']:.2f}x** | **{ratios['whole_run']:.2f}x** | | | "
            f"{ratios['host_peak']:.2f}x | | |"
        )
    return "\n".join(lines)


def _row(name: str, side: str, case: dict[str, Any]) -> str:
    figures = case[side]
    seconds = figures["round_seconds"]
    device = figures["device_peak_bytes"]
    accuracy = "–" if figures["acc"] is None else f"{100 * figures['acc']:.1f} / {100 * figures['asr']:.1f}"
    cells = (
        name if side == SIDES[0] else "",
        side,
        f"{figures['compile_seconds']:.1f}" if "compile_seconds" in figures else "–",
        f"{seconds['median']:.2f} ({seconds['min']:.2f}–{seconds['max']:.2f})",
        f"{figures['whole_run_seconds']:.1f}",
        f"{figures['images_per_second']:.0f}",
        f"{figures['flops_per_second'] / 1e9:.0f} ({100 * figures['share_of_ceiling']:.0f} %)",
        f"{figures['host_peak_bytes'] / 2**20:.0f}",
        f"{device / 2**20:.0f}" if device else "–",
        accuracy,
    )
    return "| " + " | ".join(cells) + " |"


def update_document() -> None:
    """Puts the tables of all result files into docs/performance.md."""
    tables = [markdown(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    put_between(DOCUMENT, BEGIN, END, "\n\n".join(tables))


def put_between(document: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two lines of a document."""
    before, rest = document.read_text().split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
