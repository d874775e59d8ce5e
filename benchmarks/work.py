"""Everything both sides need, in files: the checkpoint, the images, and which of them are patched."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cases import BATCH_SIZE, SEED, Case

if TYPE_CHECKING:
    from ibau_jax.data import Dataset

EVALUATED = 5000  # at most; the images that do not unlearn


def prepare(case: Case, folder: Path) -> None:
    """Writes `folder`/checkpoint.pth (unless the case has one) and `folder`/work.npz.

    work.npz: `images` uint8 (n, h, w, c) and `labels` that unlearn; `patched` (rounds, batches, 100), 1 where an image
    is patched; `clean`, `true`, `triggered`, `targets` to evaluate on, empty where nothing is to be measured.
    """
    from ibau_jax.data import load_dataset, make_dataset, split_dataset

    if case.checkpoint is None:
        _random_checkpoint(case, folder / "checkpoint.pth")
    if case.dataset is None:
        rng = np.random.default_rng(SEED)
        shape = (case.n_clean, case.image_size, case.image_size, 3)
        clean_set = make_dataset(rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, case.n_clean), "random")
        evaluation = clean_set.take(np.arange(0))
    else:
        images = load_dataset(case.dataset, (case.image_size, case.image_size, 3))
        split = split_dataset(images, case.n_clean, SEED)
        clean_set, evaluation = split.clean_set, split.evaluation.first(EVALUATED)
    patched = patched_in_rounds(clean_set, BATCH_SIZE, case.rounds, SEED)
    triggered, targets = _triggered(case, evaluation)
    np.savez(
        folder / "work.npz",
        images=clean_set.images,
        labels=clean_set.labels,
        patched=patched,
        clean=evaluation.images,
        true=evaluation.labels,
        triggered=triggered,
        targets=targets,
    )


def patched_in_rounds(clean_set: "Dataset", batch_size: int, rounds: int, seed: int) -> np.ndarray:
    """(rounds, batches, batch_size), 1 where `ibau_jax.unlearn` perturbs an image in a published preset's round."""
    import jax

    from ibau_jax.batches import make_batches, patched_images

    weights = make_batches(clean_set, batch_size).weights
    keys = [jax.random.fold_in(jax.random.key(seed), number + 1) for number in range(rounds)]
    return np.stack([np.asarray(patched_images(key, weights, 0.01)) for key in keys])


def _random_checkpoint(case: Case, path: Path) -> None:
    import torch

    from benchmarks.torch_models import torch_model

    torch.manual_seed(SEED)
    torch.save({"net": torch_model(case.model, 10, case.image_size).state_dict()}, path)


def _triggered(case: Case, evaluation: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    from ibau_jax.triggers import load_attack

    if case.attack is None or not len(evaluation):
        return evaluation.images, evaluation.labels
    name, target = case.attack
    attack = load_attack(name, evaluation.images.shape[1:])
    others = evaluation.take(np.flatnonzero(evaluation.labels != target))
    assert attack.stamp is not None
    return np.asarray(attack.stamp(others.images.astype(np.float32) / 255)), np.full(len(others), target)
