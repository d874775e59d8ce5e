"""Writes what changed fields of a preset do, of the runs that `benchmarks.unlearning --set` stored.

    python -m benchmarks.ablation [STORE]

A line is a change, a column a checkpoint: ACC / ASR / RA of every seed. The last columns are the mean of the paired
differences to the runs without any change, in points, with its standard error over checkpoints and seeds.
"""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.report import put_between
from benchmarks.unlearning import DOCUMENTS, RESULTS, figures

BEGIN, END = "<!-- ablation {}: written by python -m benchmarks.ablation -->", "<!-- end of ablation {} -->"
Results = dict[str, dict[str, dict[str, Any]]]


def effect(results: Results, kind: str, unchanged: str, share: str) -> str:
    """The mean paired difference of a share, where there is one, and its standard error."""
    pairs = [
        (run["after"][share], of_file[unchanged][seed]["after"][share])
        for of_file in results.values()
        for seed, run in of_file.get(kind, {}).items()
        if seed in of_file.get(unchanged, {})
    ]
    differences = [100 * (changed - reference) for changed, reference in pairs if changed is not None]
    if kind == unchanged or len(differences) < 2:
        return ""
    return f"{np.mean(differences):+.1f} ± {np.std(differences, ddof=1) / math.sqrt(len(differences)):.1f}"


def lines(results: Results) -> Iterator[str]:
    """Makes the rows of the Markdown table."""

    def cells(kind: str, when: str) -> list[str]:
        runs = [of_file.get(kind, {}) for of_file in results.values()]
        return ["; ".join(f"{seed}: {figures(run[when])}" for seed, run in of_file.items()) for of_file in runs]

    kinds = list(dict.fromkeys(kind for of_file in results.values() for kind in of_file))
    unchanged = min(kinds, key=len)
    if not all(kind.startswith(unchanged) for kind in kinds):
        raise SystemExit("a table of changes is of one preset and one number of clean images")
    table = [["change", *(f"`{name}`" for name in results), "ΔACC", "ΔASR", "ΔRA"], ["---"] * (len(results) + 4)]
    table.append(["before", *cells(unchanged, "before"), "", "", ""])
    for kind in kinds:
        effects = [effect(results, kind, unchanged, share) for share in ("acc", "asr", "ra")]
        table.append([kind[len(unchanged) + 1 :] or "none", *cells(kind, "after"), *effects])
    for row in table:
        yield f"| {' | '.join(row)} |"


def main() -> None:
    """Renders a store where a document has its marks, and on the screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="ablation")
    store = parser.parse_args().store
    table = "\n".join(lines(json.loads((RESULTS / f"{store}.json").read_text())))
    print(table)
    for document in DOCUMENTS:
        if BEGIN.format(store) in document.read_text():
            put_between(document, BEGIN.format(store), END.format(store), table)


if __name__ == "__main__":
    main()
