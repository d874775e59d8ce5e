"""Do cheap statistics that search no trigger tell a backdoored model from a clean one?

    python -m benchmarks.cheap_statistics FILE.pth [FILE.pth ...]

A row a model, of three candidates for a second audit that shares nothing with the players:

- Lipschitz: the largest z-score of a channel's upper bound of its Lipschitz constant in its layer (CLP, Zheng et al.,
  ECCV 2022), over all convolutions. It needs no images.
- BatchNorm noise: the share of images that go to the class that most go to, where scales and shifts of all BatchNorm
  layers are multiplied by 1 + 0.5 × normal noise; the mean over 20 draws.
- image noise: the same where normal noise of deviation 0.2 is added to the images.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from benchmarks.audits import images_for
from benchmarks.zoo import targets_of
from ibau_jax import load
from ibau_jax.batches import to_unit
from ibau_jax.models.inference import classes_of
from ibau_jax.models.taps import tapped

DRAWS, IMAGES, LAYER_NOISE, IMAGE_NOISE = 20, 150, 0.5, 0.2


def lipschitz(model: nnx.Module, images: Float[Array, "n h w c"]) -> float:
    """Computes the largest z-score of a channel among those of its layer."""
    with tapped() as taps:
        model(images[:1])
    most = []
    layers: list[tuple[Any, Any, Array]] = list(taps.convolutions)
    for conv, norm, _ in layers:
        kernel = np.asarray(conv.kernel[...])
        of_channels = np.moveaxis(kernel.reshape(-1, *kernel.shape[-2:]), -1, 0)  # out, places, in
        scale = 1.0 if norm is None else np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...]) + norm.epsilon)
        bounds = np.linalg.norm(of_channels, 2, axis=(1, 2)) * np.abs(scale)
        most.append(np.max((bounds - bounds.mean()) / bounds.std()))
    return float(np.max(most))


def shares(model: nnx.Module, images: Float[Array, "n h w c"], classes: int) -> Float[np.ndarray, " classes"]:
    """Computes the share of images that goes to each class."""
    return np.bincount(np.asarray(_classes(model, images)), minlength=classes) / len(images)


@nnx.jit
def _classes(model: nnx.Module, images: Float[Array, "n h w c"]) -> Array:
    return classes_of(model(images))


def layer_noise(model: nnx.Module, images: Float[Array, "n h w c"], classes: int) -> Float[np.ndarray, " classes"]:
    """Computes the mean share of each class over models with noisy BatchNorm layers."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        noisy = nnx.clone(model)
        for _, layer in nnx.iter_graph(noisy):
            if isinstance(layer, nnx.BatchNorm):
                for param in filter(None, (layer.scale, layer.bias)):
                    factor = 1 + LAYER_NOISE * rng.normal(size=param[...].shape)
                    param[...] = param[...] * jnp.asarray(factor, jnp.float32)
        found.append(shares(noisy, images, classes))
    return np.mean(found, axis=0)


def row(file: Path) -> str:
    """A line of the table."""
    checkpoint = load(file)
    model, classes = checkpoint.model(), checkpoint.num_classes
    images = to_unit(jnp.asarray(images_for(file.stem).images[:IMAGES]))
    noise = IMAGE_NOISE * np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    found = [layer_noise(model, images, classes), shares(model, jnp.clip(images + noise, 0, 1), classes)]
    most = (f"{of_class.argmax()}: {100 * of_class.max():.0f} %" for of_class in found)
    targets = ", ".join(map(str, targets_of(file.stem))) or "–"
    return f"| `{file.stem}` | {targets} | {lipschitz(model, images):.2f} | {' | '.join(most)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    print("| model | targets | Lipschitz | BatchNorm noise | image noise |")
    print("| --- | --- | --- | --- | --- |")
    for file in options.files:
        print(row(file), flush=True)


if __name__ == "__main__":
    main()
