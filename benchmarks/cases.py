"""What is benchmarked."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("IBAU_SHARED", ROOT.parent / "shared"))
BATCH_SIZE, LR, SEED = 100, 1e-3, 2


@dataclass(frozen=True)
class Case:
    """One comparison. Both sides do the same: preset `cifar10`, batches of 100, the same patched images.

    Attributes:
        name: what tables call it.
        model: an architecture's registered name.
        n_clean: images that unlearn.
        K: terms of the Neumann series.
        rounds: how many are timed, after compilation.
        image_size: height and width.
        checkpoint: a published file; None for random weights, whose ACC and ASR say nothing.
        dataset: clean images, as `ibau_jax.load_dataset` takes them; None for random ones.
        attack: whose ASR is measured, and its target label.
        gpu_only: too slow for a CPU.
    """

    name: str
    model: str
    n_clean: int
    K: int
    rounds: int
    image_size: int = 32
    checkpoint: Path | None = None
    dataset: str | None = None
    attack: tuple[str, int] | None = None
    gpu_only: bool = False

    def missing(self) -> str | None:
        """What of the real data is not there."""
        files = [self.checkpoint, Path(self.dataset) if self.dataset and "/" in self.dataset else None]
        return next((str(file) for file in files if file and not file.exists()), None)


def _published(name: str, n_clean: int, K: int, rounds: int) -> Case:
    return Case(
        name,
        "small_vgg",
        n_clean,
        K,
        rounds,
        checkpoint=SHARED / "checkpoints" / "badnets_8_02_ckpt.pth",
        dataset=str(SHARED / "data" / "cifar10_test.npz"),
        attack=("badnets", 8),
    )


DIGITS = ROOT / "examples" / "badnets_digits.pth"
CASES = (
    Case("digits-400", "small_vgg", 400, 5, 3, checkpoint=DIGITS, dataset="digits", attack=("badnets", 3)),
    _published("small_vgg-5000-K5", 5000, 5, 3),
    _published("small_vgg-5000-K1", 5000, 1, 3),
    _published("small_vgg-5000-K20", 5000, 20, 1),
    _published("small_vgg-100-K1", 100, 1, 5),
    _published("small_vgg-100-K5", 100, 5, 5),
    _published("small_vgg-100-K20", 100, 20, 5),
    Case("preact_resnet18-200-K5", "preact_resnet18", 200, 5, 3),
    Case("preact_resnet18-5000-K5", "preact_resnet18", 5000, 5, 3, gpu_only=True),
    Case("resnet50-224-500-K5", "resnet50", 500, 5, 3, image_size=224, gpu_only=True),
    Case("vit_b_16-224-500-K5", "vit_b_16", 500, 5, 3, image_size=224, gpu_only=True),
)
