"""How often clean images tell which of its candidates a random chain of layers is.

    IBAU_SHARED=../shared python -m benchmarks.plain_chains --networks 12
    IBAU_SHARED=../shared python -m benchmarks.plain_chains --written

Draws small convolutional networks, trains each on ten classes of GTSRB for some seconds, writes its state dict, and
says whether the network that clean images choose has the same logits, and whether it was taken or refused.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.cases import SHARED
from ibau_jax import Checkpoint, load
from ibau_jax.checkpoints.variants import check_evidence, weigh
from ibau_jax.errors import CheckpointError
from ibau_jax.models import Architecture, get_architecture
from tests.models.test_plain_chain import SIZES, signs, trained
from tests.oracles.plain_chains import CHAINS

CLASSES, HELD_OUT, STEPS, FIRST_SEED = 10, 2000, 300, 1000
SAME = 1e-3  # logits differ by less, relative to the largest


class Chain(nn.Module):
    """Layers one behind the other; those with weights are called by their places."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.chain = layers
        for place, layer in enumerate(layers):
            if list(layer.parameters()):
                self.add_module(f"layer{place}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.chain:
            x = layer(x)
        return x


def random_chain(seed: int) -> tuple[Chain, int, int] | None:
    """A chain, and the channels and the size of its images; None where its maps would vanish."""
    rng = np.random.default_rng(FIRST_SEED + seed)
    channels, size = (1, 28) if rng.integers(2) else (3, 32)
    norm, count, kernel = bool(rng.integers(2)), int(rng.integers(1, 5)), int(rng.choice([3, 5]))
    padding = int(rng.choice([0, kernel // 2]))
    halving = str(rng.choice(["each", "second", "last", "strided", "first two"]))
    averaged = bool(rng.integers(3) == 0)
    torch.manual_seed(seed)
    layers, before, side = list[nn.Module](), channels, size
    for place in range(count):
        features, stride = int(rng.choice([16, 24])) * (1 + place // 2), 2 if halving == "strided" else 1
        layers.append(nn.Conv2d(before, features, kernel, stride, padding))
        layers += [nn.BatchNorm2d(features), nn.ReLU()] if norm else [nn.ReLU()]
        side, before = (side + 2 * padding - kernel) // stride + 1, features
        pooled = {"each": True, "second": place % 2 == 1, "last": place == count - 1, "first two": place < 2}
        if pooled.get(halving, False):
            layers.append(nn.MaxPool2d(2))
            side //= 2
        if side < 2:
            return None
    if averaged:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES)]
    else:
        layers += [nn.Flatten(), nn.Linear(before * side**2, 48), nn.ReLU(), nn.Linear(48, CLASSES)]
    return Chain(layers), channels, size


def is_same(checkpoint: Checkpoint, architecture: Architecture, module: nn.Module, images: np.ndarray) -> bool:
    """Whether an architecture has the module's logits."""
    with torch.no_grad():
        expected = module(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    found = np.asarray(checkpoint.as_variant(architecture).model()(images))
    return bool(np.abs(found - expected).max() <= SAME * np.abs(expected).max())


def outcome(module: nn.Module, channels: int, size: int, file: Path, image_size: int | None = None) -> str:
    """What becomes of one network, where the user says how large images are, or does not."""
    data = signs(SHARED, (size, size, channels))
    module = trained(module, data.images[HELD_OUT:], data.labels[HELD_OUT:], STEPS)
    torch.save(module.state_dict(), file)
    try:
        checkpoint = load(file, image_size=image_size)
    except CheckpointError as error:
        return f"not read: {str(error)[:80]}"
    if checkpoint.image_size != (size, size):
        return f"another image size: {checkpoint.image_size}"
    evidence = weigh(checkpoint, data.first(HELD_OUT), None)
    few = data.images[:8].astype(np.float32) / 255
    right = "right" if is_same(checkpoint, evidence[0].architecture, module, few) else "wrong"
    try:
        check_evidence(evidence)
    except CheckpointError:
        return f"{right}, refused; {evidence[0]}"
    return f"{right}, taken; {evidence[0]}"


def main() -> None:
    """Prints a line a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--written", action="store_true", help="the hand-written networks of the tests instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chain.pth"
        for name, (make, spec) in CHAINS.items() if options.written else ():
            true = get_architecture(spec)
            print(
                f"{name}: {outcome(make(), true.channels, true.image_sizes[0].height, file, SIZES.get(name))}",
                flush=True,
            )
        for seed in () if options.written else range(options.networks):
            drawn = random_chain(seed)
            print(f"{seed}: {outcome(*drawn, file) if drawn else 'too small'}", flush=True)


if __name__ == "__main__":
    main()
