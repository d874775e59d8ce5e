"""Searches the smallest perturbation of one space for every class: does a backdoor's target stand out there?

    python -m benchmarks.spaces warp FILE.pth [FILE.pth ...] [--seeds 3] [--steps 100]

Data and target are told from the names, as in `benchmarks.audits`. Prints a Markdown row for each model and seed.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.audits import images_for
from benchmarks.zoo import targets_of
from ibau_jax import AuditConfig, load
from ibau_jax.auditing.judgement import median_size
from ibau_jax.auditing.search import compile_search, measure, run_search
from ibau_jax.execution import DEFAULT_EXECUTION
from ibau_jax.models.inference import count_classes
from ibau_jax.perturbations import SPACES

SHOWN = 3  # classes, those with the smallest perturbations
SEARCHED = 500  # images; the others measure


def row(file: Path, space_name: str, config: AuditConfig) -> str:
    """Searches one model with one seed and returns its row of the table."""
    checkpoint = load(file)
    model, images = checkpoint.model(), images_for(file.stem)
    order = np.random.default_rng(config.seed).permutation(len(images))
    searched, others = images.take(order[:SEARCHED]), images.take(order[SEARCHED : SEARCHED + config.held_out_images])
    classes = count_classes(model, images.images.shape[1:])
    search = compile_search(model, classes, searched, SPACES[space_name], config, DEFAULT_EXECUTION)
    smallest = run_search(search, model, searched)
    success = measure(search, model, smallest.triggers, others)
    median, labels = median_size(smallest.sizes), np.argsort(smallest.sizes)[:SHOWN]
    ratios = ", ".join(
        f"{label}: {median / smallest.sizes[label]:.2f} ({100 * success[label]:.0f} %)" for label in labels
    )
    targets = ", ".join(map(str, targets_of(file.stem))) or "–"
    return f"| `{file.stem}` | {config.seed} | {targets} | {median:.2f} | {ratios} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", choices=SPACES)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    columns = ("model", "seed", "targets", f"median size, {SPACES[options.space].unit}")
    print(f"| {' | '.join(columns)} | class: times smaller than the median (held-out images that follow) |")
    print("| --- | --- | --- | --- | --- |")
    for file in options.files:
        for seed in range(options.seeds):
            print(row(file, options.space, AuditConfig(seed=seed, steps=options.steps)), flush=True)


if __name__ == "__main__":
    main()
