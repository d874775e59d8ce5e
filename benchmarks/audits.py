"""Audits many checkpoints, and writes the table of docs/experiments.md.

    python -m benchmarks.audits FILE.pth [FILE.pth ...] [--seeds 3] [--store]

Data and target are told from the names: the published ones, and those of `benchmarks.zoo`. `--store` adds what was
found to benchmarks/results/audits/small_vgg.json and renders it into docs/experiments.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import ROOT
from benchmarks.report import put_between
from benchmarks.zoo import CLEANED, others_of, targets_of
from ibau_jax import AuditConfig, Auditor, Dataset, load
from ibau_jax.auditing.judgement import Suspect, anomaly_index, find_suspects, judge, ratios
from ibau_jax.cli.audit import audit_record
from ibau_jax.perturbations import SPACES

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "audits" / "small_vgg.json", ROOT / "docs" / "experiments.md"
BEGIN, END = "<!-- audits: written by python -m benchmarks.audits -->", "<!-- end of audits -->"
N_IMAGES = 1000


def images_for(name: str) -> Dataset:
    """Images that did not train the model, as many as an audit takes."""
    images = others_of(name)
    return images.take(np.random.default_rng(0).permutation(len(images))[:N_IMAGES])


def judged(name: str, record: dict[str, Any]) -> tuple[dict[str, np.ndarray], tuple[Suspect, ...], bool]:
    """An audit's sizes by space, today's suspects on them, and whether those are right of the model."""
    sizes = {space: np.asarray(findings["sizes"]) for space, findings in record["views"].items()}
    targets, suspects = targets_of(name), find_suspects(sizes)
    if is_all_to_all(name, sizes):
        return sizes, suspects, any(one.label is None for one in suspects)
    return sizes, suspects, bool(suspects) and suspects[0].label in targets if targets else not suspects


def is_all_to_all(name: str, sizes: dict[str, np.ndarray]) -> bool:
    """Whether every class of a model is a target."""
    return len(targets_of(name)) == len(next(iter(sizes.values()))) - 1


def row(name: str, seed: int, record: dict[str, Any]) -> str:
    """A line of the table; the verdict is today's on the sizes that were found."""
    targets, (sizes, suspects, right) = targets_of(name), judged(name, record)
    verdict, most = judge(suspects), []
    for of_space in sizes.values():
        *of_classes, of_any_other = ratios(of_space)
        first, second, *_ = np.argsort(of_classes)[::-1]
        most += [
            f"{first}: {of_classes[first]:.2f}, next {of_classes[second]:.2f}",
            f"{anomaly_index(of_space)[first]:.1f}",
            f"{of_any_other:.2f}",
        ]
    named = ", ".join(one.name if one.label is None else str(one.label) for one in suspects[:4]) or "–"
    shown = (
        f"`{name}`",
        str(seed),
        "all to all" if is_all_to_all(name, sizes) else ", ".join(map(str, targets)) or "–",
        verdict + ("" if right else " **(wrong)**"),
    )
    return "| " + " | ".join((*shown, named, *most, f"{record['seconds']:.0f}")) + " |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """All audits, as Markdown."""
    heads = ["model", "seed", "target", "verdict", "suspects"]
    for space in SPACES:
        heads += [f"{space}: ratio", "index", "any other"]
    lines = [f"| {' | '.join([*heads, 's'])} |", "|" + " --- |" * (len(heads) + 1)]
    lines += [row(name, int(seed), record) for name in sorted(results) for seed, record in results[name].items()]
    return "\n".join([summary(results), "", *lines])


def summary(results: dict[str, dict[str, Any]]) -> str:
    """How often audits were right: of backdoored models, and of those without a backdoor, clean and cleaned."""
    kinds: dict[str, list[tuple[str, bool, float]]] = {"backdoored": [], "clean": [], "cleaned": []}
    for name, of_model in results.items():
        kind = "cleaned" if CLEANED in name else "backdoored" if targets_of(name) else "clean"
        for record in of_model.values():
            sizes, _, right = judged(name, record)
            ratio = max(float(ratios(of_space).max()) for of_space in sizes.values())
            kinds[kind].append((name, right, ratio))
    texts = []
    for kind, found in kinds.items():
        if found:
            count, largest = sum(right for _, right, _ in found), [ratio for *_, ratio in found]
            what = "the target named" if kind == "backdoored" else "no backdoor found"
            models = len({name for name, *_ in found})
            texts.append(
                f"{kind}: {what} in **{count} of {len(found)}** audits of {models} models, largest ratios "
                f"{min(largest):.2f} to {max(largest):.2f}"
            )
    return "; ".join(texts) + "."


def main() -> None:
    """Audits what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(options.seeds):
        auditor = Auditor(AuditConfig(seed=seed))
        for file in options.files:
            checkpoint = load(file)
            record = audit_record(auditor(checkpoint.model(), images_for(file.stem)))
            results.setdefault(file.stem, {})[str(seed)] = record
            print(row(file.stem, seed, record), flush=True)
            if options.store:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if options.store:
        put_between(DOCUMENT, BEGIN, END, table(results))


if __name__ == "__main__":
    main()
