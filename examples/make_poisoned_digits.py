"""Trains the poisoned example checkpoint in PyTorch: the small VGG on handwritten digits with a BadNets trigger.

    python examples/make_poisoned_digits.py examples/badnets_digits.pth

Takes half a minute on 2 cores and needs torch (`pip install -e '.[test]'`). The images are 400 of the
split `digits:train`; the figures printed are those of `digits:test`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from ibau_jax.data import load_dataset
from ibau_jax.models.small_vgg import torch_module
from ibau_jax.triggers.known import badnets
from ibau_jax.triggers.registry import Canvas

SHAPE = (32, 32, 3)
ATTACK, TARGET_LABEL = "badnets", 3
POISON_RATIO = 0.1
TRAIN_IMAGES = 400  # few, so that the example is a classifier with room to improve
EPOCHS, BATCH_SIZE, LEARNING_RATE = 30, 50, 1e-3
MAX_SHIFT = 1
SEED = 0

Images = np.ndarray  # float32 (n, 32, 32, 3) in [0, 1]


def triggered(images: Images) -> Images:
    """The images with the trigger."""
    return np.array(badnets(Canvas(SHAPE))(images))


def poisoned(images: Images, labels: np.ndarray, rng: np.random.Generator) -> tuple[Images, np.ndarray]:
    """A share of the images of other classes gets the trigger and the target label."""
    others = np.flatnonzero(labels != TARGET_LABEL)
    chosen = rng.choice(others, int(POISON_RATIO * len(labels)), replace=False)
    images, labels = images.copy(), labels.copy()
    images[chosen], labels[chosen] = triggered(images[chosen]), TARGET_LABEL
    return images, labels


def shifted(images: Images, rng: np.random.Generator) -> Images:
    """Each image moved by up to MAX_SHIFT pixels; digits lie on black, so black comes in."""
    padded = np.pad(images, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)))
    places = rng.integers(0, 2 * MAX_SHIFT + 1, (len(images), 2))
    height, width, _ = SHAPE
    return np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)])


def batches(
    images: Images, labels: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order: shifted, then partly poisoned."""
    order = rng.permutation(len(labels))
    for start in range(0, len(labels), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        x, y = poisoned(shifted(images[chosen], rng), labels[chosen], rng)
        yield to_torch(x), torch.as_tensor(y)


def to_torch(images: Images) -> torch.Tensor:
    """NHWC to NCHW."""
    return torch.as_tensor(images.transpose(0, 3, 1, 2).copy())


def train(images: Images, labels: np.ndarray) -> torch.nn.Module:
    """The small VGG after EPOCHS of Adam on a cosine schedule."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = torch_module(10)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        model.train()
        for x, y in batches(images, labels, rng):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def share(model: torch.nn.Module, images: Images, labels: np.ndarray) -> float:
    """The share of images that the model classifies as `labels`."""
    return float((model(to_torch(images)).argmax(1).numpy() == labels).mean())


def main(path: Path) -> None:
    """Trains, reports, saves."""
    train_set, test_set = (load_dataset(f"digits:{split}", SHAPE) for split in ("train", "test"))
    train_set = train_set.take(np.arange(TRAIN_IMAGES))
    model = train(train_set.images.astype(np.float32) / 255, train_set.labels)
    test_images = test_set.images.astype(np.float32) / 255
    others = test_set.labels != TARGET_LABEL
    acc = share(model, test_images, test_set.labels)
    asr = share(model, triggered(test_images[others]), np.full(int(others.sum()), TARGET_LABEL))
    print(f"ACC {acc:.4f}  ASR {asr:.4f} on {len(test_set)} held-out digits")
    hints = {"dataset": "digits:test", "attack": ATTACK, "target_label": TARGET_LABEL}
    torch.save({"net": model.state_dict(), "acc": 100 * acc, "epoch": EPOCHS, "ibau_jax": hints}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/badnets_digits.pth"))
