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
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_baseline
from benchmarks.cases import ROOT
from benchmarks.torch_models import torch_model
from benchmarks.unlearning import EVALUATED
from benchmarks.zoo import attack_of, others_of
from ibau_jax import PRESETS, split_dataset
from ibau_jax.batches import make_batches, patched_images, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.triggers import Stamp

RESULTS = ROOT / "benchmarks" / "results" / "unlearning" / "pytorch.json"


def settings_of(config: UnlearnConfig) -> torch_baseline.Settings:
    """A published preset's constants.

    Raises:
        ValueError: the preset does what the published code does not.
    """
    settings = torch_baseline.Settings(
        config.K,
        config.lr,
        config.clip,
        "adam" if config.inner_optim == "adam" else "sgd",
        config.inner_lr,
        config.norm_bound,
        config.fixed_point_step,
        config.regularization,
    )
    if config != UnlearnConfig(**vars(settings), n_rounds=config.n_rounds, seed=config.seed):
        raise ValueError("only the published presets are the published code's")
    return settings


def unit(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1]."""
    return np.asarray(to_unit(jnp.asarray(images)))


def in_torch(images: np.ndarray) -> torch.Tensor:
    """Images (n, h, w, c), uint8 or in [0, 1], as NCHW in [0, 1]."""
    return torch.as_tensor(unit(images).transpose(0, 3, 1, 2).copy())


def measured(model: torch.nn.Module, others: Dataset, stamp: Stamp, target: int) -> dict[str, float]:
    """ACC, and ASR with images of the target class counted."""
    triggered = in_torch(np.asarray(stamp(unit(others.images))))
    acc = torch_baseline.predict(model, in_torch(others.images)).numpy() == others.labels
    hit = torch_baseline.predict(model, triggered).numpy() == target
    return {"acc": float(acc.mean()), "asr_all": float(hit.mean())}


def run(file: Path, config: UnlearnConfig, n_clean: int) -> dict[str, Any]:
    """Figures before and after each round."""
    attack, target = attack_of(file.stem)
    assert attack is not None
    assert attack.stamp is not None
    assert target is not None
    split = split_dataset(others_of(file.stem), n_clean, config.seed)
    others = split.evaluation.first(EVALUATED)
    model = loaded(file)
    before = measured(model, others, attack.stamp, target)
    batches, patched = work_of(split.clean_set, config)
    rounds = [
        measured(model, others, attack.stamp, target)
        for _ in torch_baseline.rounds(model, batches, patched, settings_of(config))
    ]
    return {"before": before, "rounds": rounds, "torch": torch.__version__}


def loaded(file: Path) -> torch.nn.Module:
    """A published checkpoint's model."""
    state = torch.load(file, map_location="cpu", weights_only=True)["net"]
    model = torch_model("small_vgg", len(state[list(state)[-1]]), 32)
    model.load_state_dict(state)
    return model.eval()


def work_of(clean_set: Dataset, config: UnlearnConfig) -> tuple[list[torch_baseline.Batch], list[list[torch.Tensor]]]:
    """The batches, and for each round which images of each are perturbed: those that `ibau_jax` chooses."""
    images, labels = in_torch(clean_set.images), torch.as_tensor(clean_set.labels)
    batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
    weights = make_batches(clean_set, config.batch_size).weights
    keys = [jax.random.fold_in(jax.random.key(config.seed), number + 1) for number in range(config.n_rounds)]
    masks = [patched_images(key, weights, config.portion) for key in keys]
    return batches, [[torch.as_tensor(np.flatnonzero(mask)) for mask in of_round] for of_round in masks]


def main() -> None:
    """Unlearns what the command line names."""
    parser = argparse.ArgumentParser()
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
