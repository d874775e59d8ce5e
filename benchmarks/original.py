"""The published algorithm in PyTorch, with the images and seeds that `benchmarks.unlearning` has: what
docs/reproduction.md sets beside ours.

    python -m benchmarks.original FILE.pth [FILE.pth ...] --preset cifar10 [--n-clean 5000] [--seeds 0 1 2]
        [--n-rounds 1]

The rounds are those of `benchmarks.torch_baseline`. What is found is added to
benchmarks/results/unlearning/pytorch.json.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_baseline
from benchmarks.cases import ROOT
from benchmarks.torch_models import in_torch, loaded
from benchmarks.unlearning import EVALUATED
from benchmarks.work import patched_in_rounds
from benchmarks.zoo import attack_of, others_of
from ibau_jax import PRESETS, split_dataset
from ibau_jax.batches import to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.triggers import Stamp

RESULTS = ROOT / "benchmarks" / "results" / "unlearning" / "pytorch.json"


def settings_of(config: UnlearnConfig) -> torch_baseline.Settings:
    """A published preset's constants.

    Raises:
        ValueError: the preset does what the published code does not.
    """
    constants: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(torch_baseline.Settings)}
    if config != UnlearnConfig(**constants, n_rounds=config.n_rounds, seed=config.seed):
        raise ValueError("only the published presets are the published code's")
    return torch_baseline.Settings(**constants)


def unit(dataset: Dataset) -> np.ndarray:
    """The images in [0, 1] as `ibau_jax` has them, to the last bit: what a round makes of them is chaotic."""
    return np.asarray(to_unit(jnp.asarray(dataset.images)))


def evaluation(others: Dataset, stamp: Stamp, target: int) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Measures a model: ACC, and ASR with images of the target class counted."""
    images = unit(others)
    clean, triggered = in_torch(images), in_torch(np.asarray(stamp(images)))

    def measured(model: torch.nn.Module) -> dict[str, float]:
        right = torch_baseline.predict(model, clean).numpy() == others.labels
        hit = torch_baseline.predict(model, triggered).numpy() == target
        return {"acc": float(right.mean()), "asr_all": float(hit.mean())}

    return measured


def run(file: Path, config: UnlearnConfig, n_clean: int) -> dict[str, Any]:
    """Figures before and after each round."""
    settings, attack = settings_of(config), attack_of(file.stem)
    assert attack is not None
    assert attack.stamp is not None
    assert attack.target_label is not None
    split = split_dataset(others_of(file.stem), n_clean, config.seed)
    measured = evaluation(split.evaluation.first(EVALUATED), attack.stamp, attack.target_label)
    model = loaded(file, "small_vgg", 32).eval()
    before = measured(model)
    batches, patched = work_of(split.clean_set, config)
    rounds = [measured(model) for _ in torch_baseline.rounds(model, batches, patched, settings)]
    return {"before": before, "rounds": rounds, "torch": torch.__version__}


def work_of(clean_set: Dataset, config: UnlearnConfig) -> tuple[list[torch_baseline.Batch], list[list[torch.Tensor]]]:
    """The batches, and for each round which images of each are perturbed: those that `ibau_jax` chooses."""
    images, labels = in_torch(unit(clean_set)), torch.as_tensor(clean_set.labels)
    batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
    masks = patched_in_rounds(clean_set, config.batch_size, config.n_rounds, config.seed)
    return batches, [[torch.as_tensor(np.flatnonzero(mask)) for mask in of_round] for of_round in masks]


def main() -> None:
    """Unlearns what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--n-clean", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # as XLA does; what Intel's processors take for them is several times the rest
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for file, seed in itertools.product(options.files, options.seeds):
        config = replace(PRESETS[options.preset], n_rounds=options.n_rounds, seed=seed)
        found = run(file, config, options.n_clean)
        print(file.stem, seed, json.dumps(found), flush=True)
        results.setdefault(file.stem, {}).setdefault(f"{options.preset},{options.n_clean}", {})[str(seed)] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
