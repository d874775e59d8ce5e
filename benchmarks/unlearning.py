"""Unlearns many checkpoints over several seeds, and writes the table of docs/experiments.md.

    python -m benchmarks.unlearning FILE.pth [FILE.pth ...] [--preset robust] [--n-clean 5000] [--seeds 0 1 2]
        [--store NAME] [--save FOLDER] [--set [FIELD=VALUE ...] ...]

Data, attack and target are told from the names: the published ones, and those of `benchmarks.zoo`. The seed chooses the
clean images too; up to 3000 others evaluate. `--store` adds what was found to NAME.json in
benchmarks/results/unlearning, and renders it where docs/experiments.md or benchmarks/NOTEBOOK.md has its marks;
`--save` writes cleaned models; `--set` changes fields of the preset, as an ablation does. Each `--set` is a run of its
own (an empty one is the preset as it is), and runs of a checkpoint and a seed share the search that players begin with.
"""

import argparse
import ast
import functools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import ROOT
from benchmarks.report import machine, put_between
from benchmarks.zoo import CLEANED, ZOO, attack_of, others_of
from ibau_jax import PRESETS, Attack, Auditor, Checkpoint, Dataset, State, evaluate, load, save, split_dataset, unlearn
from ibau_jax.auditing.search import SmallestTriggers
from ibau_jax.config import UnlearnConfig
from ibau_jax.json_files import write_json
from ibau_jax.unlearning.players import begin_players
from ibau_jax.unlearning.state import initial_state

RESULTS = ROOT / "benchmarks" / "results" / "unlearning"
FROZEN = "frozen.json"  # the default on the models that did not choose its constants
DOCUMENTS = (ROOT / "docs" / "experiments.md", ROOT / "benchmarks" / "NOTEBOOK.md")
BEGIN, END = "<!-- unlearning {}: written by python -m benchmarks.unlearning -->", "<!-- end of unlearning {} -->"
EVALUATED = 3000


@dataclass(frozen=True)
class Case:
    """What runs of a checkpoint with the same images share.

    Attributes:
        checkpoint: that unlearns.
        clean_set: on which.
        others: images that evaluate.
        attack: to measure; None where there is no backdoor.
        before: figures of the model as it came.
    """

    checkpoint: Checkpoint
    clean_set: Dataset
    others: Dataset
    attack: Attack | None
    before: dict[str, Any]

    @functools.cached_property
    def search(self) -> tuple[dict[str, SmallestTriggers], float]:
        """What players begin with, and the seconds that finding it took, with compilation."""
        begin = time.perf_counter()
        return Auditor().search(self.checkpoint.model(), self.clean_set), time.perf_counter() - begin


@functools.lru_cache(maxsize=1)
def prepare(file: Path, n_clean: int, seed: int) -> Case:
    """Chooses the images, and evaluates the model as it came."""
    attack = attack_of(file.stem)
    if attack is None and file.stem not in ZOO:
        raise SystemExit(f"{file.stem}: neither a published name nor one of benchmarks.zoo")
    checkpoint = load(file)
    split = split_dataset(others_of(file.stem), n_clean, seed)
    others = split.evaluation.first(EVALUATED)
    return Case(checkpoint, split.clean_set, others, attack, asdict(evaluate(checkpoint.model(), others, attack)))


def run(case: Case, config: UnlearnConfig, saved: Path | None = None) -> dict[str, Any]:
    """One run: figures before, after each round and of the round that is kept, and seconds without evaluation."""
    model, rounds = case.checkpoint.model(), list[dict[str, Any]]()
    state, searching = initial_state(model, config), 0.0
    if config.spaces:
        smallest, searching = case.search
        state = replace(state, players=begin_players({name: smallest[name] for name in config.spaces}))
    evaluating, begin = 0.0, time.perf_counter()

    def on_round(state: State) -> None:
        nonlocal evaluating
        start = time.perf_counter()
        outliers = [asdict(one) for one in state.rounds[-1].outliers]
        rounds.append({**asdict(evaluate(state.model, case.others, case.attack)), "suspects": outliers})
        evaluating += time.perf_counter() - start

    result = unlearn(model, case.clean_set, config, state=state, on_round=on_round)
    seconds = time.perf_counter() - begin - evaluating
    if saved:
        save(case.checkpoint.with_weights(result.model), saved)
    return {
        "before": case.before,
        "after": {name: [case.before, *rounds][-1][name] for name in case.before},
        "rounds": rounds,
        "seconds": seconds + searching,
        "machine": machine(),
    }


def figures(metrics: dict[str, float | None]) -> str:
    """ACC, ASR and RA in percent."""
    shown = (metrics[name] for name in ("acc", "asr", "ra"))
    return " / ".join("–" if share is None else f"{100 * share:.1f}" for share in shown)


def shortfall(run: dict[str, Any]) -> tuple[float, float]:
    """What the round that is kept lacks of the best one in hindsight: ACC lost, ASR left, in [-1, 1].

    The best one has the largest ACC − ASR, of the rounds that were done; the model as it came is none of them.
    """
    rounds = run["rounds"] or [run["after"]]  # one that diverged at once
    best = max(rounds, key=lambda figures: figures["acc"] - (figures["asr"] or 0.0))
    return best["acc"] - run["after"]["acc"], (run["after"]["asr"] or 0.0) - (best["asr"] or 0.0)


def row(name: str, kind: str, runs: dict[str, dict[str, Any]]) -> str:
    """A line of the table: a checkpoint over its seeds."""

    def mean(when: str) -> dict[str, float | None]:
        shares = {key: [run[when][key] for run in runs.values()] for key in ("acc", "asr", "ra")}
        return {key: None if None in values else float(np.mean(values)) for key, values in shares.items()}

    preset, n_clean, *changes = kind.split(",", 2)
    each = "; ".join(f"{seed}: {figures(run['after'])}" for seed, run in sorted(runs.items()))
    seconds = np.median([run["seconds"] for run in runs.values()])
    lacking = np.max([shortfall(run) for run in runs.values()], axis=0)
    cells = (
        f"`{name}`",
        ", ".join([preset, *changes]),
        n_clean,
        figures(mean("before")),
        f"**{figures(mean('after'))}**",
        each,
        " / ".join(f"{100 * share:.1f}" for share in lacking),
        f"{seconds:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All runs, as Markdown."""
    heads = "checkpoint | preset | clean images | before | after, mean | each seed | behind the best round | s, median"
    lines = [f"| {heads} |", "|" + " --- |" * len(heads.split("|"))]
    kinds = sorted(
        {kind for of_file in results.values() for kind in of_file}, key=lambda kind: (-int(kind.split(",")[1]), kind)
    )
    lines += [
        row(name, kind, results[name][kind]) for kind in kinds for name in sorted(results) if kind in results[name]
    ]
    return "\n".join(lines)


def changed(config: UnlearnConfig, assignments: list[str]) -> UnlearnConfig:
    """The configuration with `FIELD=VALUE`s, where VALUE is a Python literal or a word."""
    values: dict[str, Any] = {}
    for name, _, text in (assignment.partition("=") for assignment in assignments):
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return replace(config, **values)


def main() -> None:
    """Unlearns what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--preset", default="robust")
    parser.add_argument("--n-clean", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--store", metavar="NAME")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--set", nargs="*", action="append", metavar="FIELD=VALUE", dest="changes")
    options = parser.parse_args()
    stored = RESULTS / f"{options.store}.json"
    for seed in options.seeds:
        for file in options.files:
            for assignments in options.changes or [[]]:
                config = replace(changed(PRESETS[options.preset], assignments), seed=seed)
                kind = ",".join([options.preset, str(options.n_clean), *assignments])
                name = f"{file.stem}{CLEANED}{kind.replace(',', '-').replace(' ', '-')}-{seed}.pth"
                found = run(prepare(file, options.n_clean, seed), config, options.save / name if options.save else None)
                print(
                    f"{file.stem} {kind} seed {seed}: {figures(found['before'])} → {figures(found['after'])} "
                    f"({len(found['rounds'])} rounds) {found['seconds']:.0f} s",
                    flush=True,
                )
                if options.store:
                    stored.parent.mkdir(parents=True, exist_ok=True)
                    results = json.loads(stored.read_text()) if stored.exists() else {}  # others may write there too
                    results.setdefault(file.stem, {}).setdefault(kind, {})[str(seed)] = found
                    write_json(stored, results, indent=1)
    begin, end = BEGIN.format(options.store), END.format(options.store)
    for document in DOCUMENTS:
        if options.store and begin in document.read_text():
            put_between(document, begin, end, table(json.loads(stored.read_text())))


if __name__ == "__main__":
    main()
