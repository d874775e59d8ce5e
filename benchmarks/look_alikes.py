"""How far BatchNorm's statistics are off on clean images: of each model as it is, altered, on other images.

    IBAU_SHARED=../shared python -m benchmarks.look_alikes
    IBAU_SHARED=../shared python -m benchmarks.look_alikes wide_resnet10_1 wide_resnet10_1+silu

Prints a line a model and change: the mean over layers, and that without the largest quarter, in %; for the published
checkpoints and those of `benchmarks.zoo` in the shared folder. Of architectures that are named, each is trained for
eight epochs on CIFAR-10, two minutes on 2 cores, written without its name, and what clean images say of it is printed.
See docs/converting.md.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.cases import SHARED
from benchmarks.zoo import images_of
from ibau_jax import Checkpoint, load, load_dataset, save
from ibau_jax.checkpoints import fresh_checkpoint
from ibau_jax.checkpoints.variants import IMAGES, Evidence, weigh
from ibau_jax.config import TrainConfig
from ibau_jax.models import get_architecture
from ibau_jax.models.alterations import ALTERATIONS
from ibau_jax.models.running_statistics import discrepancies
from ibau_jax.training import train


def resized(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Each image changed and brought back to its size."""
    size = (images.shape[2], images.shape[1])
    return np.stack(
        [np.asarray(change(Image.fromarray(image)).resize(size, Image.Resampling.BICUBIC)) for image in images]
    )


OTHER_IMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blurred": lambda images: resized(images, lambda image: image.resize((16, 16))),
    "grey": lambda images: resized(images, lambda image: image.convert("L").convert("RGB")),
    "cropped": lambda images: resized(images, lambda image: image.crop((6, 6, 26, 26))),
}


def networks(checkpoint: Checkpoint) -> Iterator[tuple[str, nnx.Module]]:
    """The small VGG as it is, and with each alteration that changes anything of it."""
    yield "as it is", checkpoint.model()
    for name, alter in ALTERATIONS.items():
        model = checkpoint.model()
        if alter(model):
            yield name, model


def found(name: str) -> list[Evidence]:
    """What clean images say of a model of that architecture, trained, from its state dict alone."""
    training, others = images_of("cifar")
    model = train(get_architecture(name), 10, training, TrainConfig(epochs=8, flip=True)).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pth"
        save(fresh_checkpoint(get_architecture(name), 10, training.images.shape[1], model, {}), file)
        return weigh(load(file), others, None)


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*")
    architectures = parser.parse_args().architectures
    for name in architectures:
        print(f"{name}: {'; '.join(map(str, found(name)))}", flush=True)
    if architectures:
        return
    data = {name: load_dataset(str(SHARED / "data" / f"{name}_test.npz"), (32, 32, 3)) for name in ("cifar10", "gtsrb")}
    chosen = {
        name: images.images[np.random.default_rng(0).permutation(len(images))[:IMAGES]] for name, images in data.items()
    }
    for file in sorted([*(SHARED / "checkpoints").glob("*.pth"), *(SHARED / "zoo").glob("*.pth")]):
        checkpoint = load(file)
        own, other = ("gtsrb", "cifar10") if "gtsrb" in file.stem else ("cifar10", "gtsrb")
        model, images = checkpoint.model(), chosen[own]
        cases = [(name, network, images) for name, network in networks(checkpoint)]
        cases += [(name, model, change(images)) for name, change in OTHER_IMAGES.items()]
        for name, network, some in [*cases, (f"images of {other}", model, chosen[other])]:
            evidence = Evidence(
                checkpoint.architecture, *discrepancies(network, jnp.asarray(some, jnp.float32) / 255), len(some)
            )
            print(
                f"{file.stem}, {name}: {100 * evidence.discrepancy:.2f} {100 * evidence.plausibility:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
