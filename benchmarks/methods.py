"""Compares methods on many checkpoints, and writes the table of docs/comparison.md.

    python -m benchmarks.methods FILE.pth [FILE.pth ...] [--methods ft sau] [--n-clean 100] [--seeds 0] [--epochs N]
        [--precision tf32] [--store]

As `scripts/compare.py`, but data, attack and target are told from the names, as in `benchmarks.unlearning`. What that
has found of `robust` with the same images is not run again. Goes on where it was interrupted. Results are in
benchmarks/results/methods; `--store` renders them into docs/comparison.md.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any, get_args

from benchmarks import unlearning
from benchmarks.cases import ROOT
from benchmarks.report import put_between
from benchmarks.zoo import attack_of, others_of
from ibau_jax import evaluate, load, split_dataset
from ibau_jax.cli.compare import OUTCOMES, restored, run_each
from ibau_jax.comparison import Key, Outcome, Trial, as_markdown, key_of, method_names, outcome_of
from ibau_jax.config import Precision
from ibau_jax.execution import Execution
from ibau_jax.metrics import Metrics

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "methods", ROOT / "docs" / "comparison.md"
BEGIN, END = "<!-- comparison: written by python -m benchmarks.methods -->", "<!-- end of comparison -->"


def of_unlearning(results: dict[str, dict[str, dict[str, Any]]], outcomes: list[Outcome]) -> list[Outcome]:
    """What `benchmarks.unlearning` has found of `robust` with the clean images that other methods had."""
    wanted = {(one.checkpoint, one.n_clean, one.seed) for one in outcomes}
    wanted -= {(one.checkpoint, one.n_clean, one.seed) for one in outcomes if one.method == "robust"}
    found = []
    for name, size, seed in sorted(wanted):
        if run := results.get(name, {}).get(f"robust,{size}", {}).get(str(seed)):
            before, after = Metrics(**run["before"]), Metrics(**run["after"])
            found.append(Outcome(name, "robust", size, seed, before, after, run["seconds"]))
    return found


@functools.lru_cache(maxsize=1)  # its methods come one after the other
def trial_of(file: Path, n_clean: int, seed: int) -> Trial:
    """A model with the images that unlearn it, and those that measure."""
    attack, split = attack_of(file.stem), split_dataset(others_of(file.stem), n_clean, seed)
    others = split.evaluation.first(unlearning.EVALUATED)
    return Trial(load(file).model(), split.clean_set, lambda model: evaluate(model, others, attack))


def run(file: Path, key: Key, execution: Execution) -> Outcome:
    """One run."""
    outcome = outcome_of(key, trial_of(file, key.n_clean, key.seed), execution=execution)
    print(as_markdown([outcome]).splitlines()[-1], flush=True)
    return outcome


def main() -> None:
    """Runs what the command line names and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--methods", nargs="+", choices=method_names(), default=["cifar10", "ft", "ft-sam", "fp", "sau"]
    )
    parser.add_argument("--n-clean", type=int, nargs="+", default=[100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="of other methods than I-BAU")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    files = {file.stem: file for file in options.files}
    keys = (
        key_of(name, method, n_clean, seed, options.epochs)
        for n_clean, name, seed, method in itertools.product(options.n_clean, files, options.seeds, options.methods)
    )
    execution, outcomes = Execution(precision=options.precision), restored(options.out / OUTCOMES)
    failed = run_each(options.out, outcomes, keys, lambda key: run(files[key.checkpoint], key, execution))
    if options.store:
        outcomes += of_unlearning(json.loads((unlearning.RESULTS / unlearning.FROZEN).read_text()), outcomes)
        put_between(DOCUMENT, BEGIN, END, as_markdown(outcomes))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
