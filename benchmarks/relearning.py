"""How fast the backdoor comes back in cleaned published checkpoints, for docs/experiments.md.

    python -m benchmarks.relearning CLEANED.pth CLEAN.pth [--triggered 20]

CLEANED.pth is what `benchmarks.unlearning --save` wrote; the model as it came is found by its name. CLEAN.pth never had
a backdoor (`benchmarks.zoo`). All three are fine-tuned alike on a thousand clean images and some with the trigger.
Prints ASR (and ACC) in %, before and after each epoch.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.cases import SHARED
from benchmarks.zoo import CLEANED, attack_of, others_of
from ibau_jax import evaluate, load, split_dataset
from ibau_jax.config import RelearnConfig
from ibau_jax.relearning import relearn, tempting_set

N_CLEAN, EVALUATED = 1000, 1500


def main() -> None:
    """Fine-tunes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cleaned", type=Path)
    parser.add_argument("clean", type=Path)
    parser.add_argument("--triggered", type=int, default=20)
    options = parser.parse_args()
    name = options.cleaned.stem.partition(CLEANED)[0]
    attack = attack_of(name)
    assert attack is not None
    files = {"cleaned": options.cleaned, "as it came": SHARED / "checkpoints" / f"{name}.pth", "clean": options.clean}
    checkpoints = {what: load(file) for what, file in files.items()}
    split = split_dataset(others_of(name), N_CLEAN, seed=0)
    others = split.evaluation.take(np.arange(EVALUATED))
    config = RelearnConfig(triggered=options.triggered)
    tempting = tempting_set(split.clean_set, attack, checkpoints["cleaned"].num_classes, config)
    models = {what: checkpoint.model() for what, checkpoint in checkpoints.items()}
    for what, found in relearn(models, tempting, lambda model: evaluate(model, others, attack), config).items():
        figures = ", ".join(f"{100 * (one.asr or 0):.1f} ({100 * one.acc:.1f})" for one in found.figures)
        print(f"{name}, {options.triggered} triggered, {what}: {figures}", flush=True)


if __name__ == "__main__":
    main()
