"""How far BatchNorm's statistics are off on clean images: of each model as it is, with other layers, on other images.

    IBAU_SHARED=../shared python -m benchmarks.look_alikes

Prints a line a model and change: the mean over layers, and that without the largest quarter, in %; for the published
checkpoints and those of `benchmarks.zoo` in the shared folder. See docs/converting.md.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.cases import SHARED
from ibau_jax import Checkpoint, load, load_dataset
from ibau_jax.checkpoints.variants import IMAGES, Evidence, discrepancies
from ibau_jax.models.layers import Activation, AvgPool, MaxPool, Sequential, leaky_relu, relu, relu6, silu
from ibau_jax.models.small_vgg import SmallVGG

ACTIVATIONS = {"ReLU": relu, "ReLU6": relu6, "SiLU": silu, "GELU": jax.nn.gelu, "LeakyReLU(0.1)": leaky_relu}


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
    """The small VGG as it is, with other activations, and with average pooling."""
    yield "as it is", checkpoint.model()
    for name, function in ACTIVATIONS.items():
        model = checkpoint.model()
        for _, module in nnx.iter_graph(model):
            if isinstance(module, Activation):
                module.function = function
        yield name, model
    model = checkpoint.model()
    assert isinstance(model, SmallVGG)
    model.features = Sequential([AvgPool(2) if isinstance(layer, MaxPool) else layer for layer in model.features])
    yield "average pooling", model


def main() -> None:
    """Prints the lines."""
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
                checkpoint.architecture, discrepancies(network, jnp.asarray(some, jnp.float32) / 255), len(some)
            )
            print(
                f"{file.stem}, {name}: {100 * evidence.discrepancy:.2f} {100 * evidence.plausibility:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
