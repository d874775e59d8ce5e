"""The normalisation of images, put inside the model so that δ and triggers live in pixel space."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.errors import ConfigError
from ibau_jax.models.registry import Architecture

LEAST_STD = 1e-5  # below 1 / 65535
MOST_SHOWN = 4  # channels in a message


@dataclass(frozen=True)
class Normalization:
    """(x − mean) / std, one number a channel, x in [0, 1].

    Attributes:
        mean: each in [0, 1].
        std: each above 0 and at most 1: models of pixels in 0..255, or of 16 bits, have 1/255 and 1/65535 there.

    Raises:
        ConfigError: there are not as many means as deviations, or a value can't be one of images in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError("a normalisation needs as many means as deviations, the deviations positive")
        possible = all(0 <= value <= 1 for value in self.mean) and all(LEAST_STD <= value <= 1 for value in self.std)
        if not possible:
            raise ConfigError(
                f"a normalisation of images in [0, 1] has means in [0, 1] and deviations above 0 and at most 1, not "
                f"--mean {_numbers(self.mean)} --std {_numbers(self.std)}{_rescaled(self.mean, self.std)}"
            )


def _rescaled(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """What to give instead, where values are those of pixels in 0..255."""
    of_pixels = [any(value > 1 for value in values) for values in (mean, std)]
    of_pixels[1] |= of_pixels[0] and all(value == 1 for value in std)  # x − mean, of pixels in 0..255
    values = [
        tuple(value / 255 for value in values) if divide else values
        for values, divide in zip((mean, std), of_pixels, strict=True)
    ]
    if not any(of_pixels) or not all(0 <= value <= 1 for value in (*values[0], *values[1])):
        return ""
    return f"; they are of pixels in 0..255, so divide by 255: --mean {_numbers(values[0])} --std {_numbers(values[1])}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values[:MOST_SHOWN]) + (" ..." if len(values) > MOST_SHOWN else "")


# Means and deviations of the data sets' training images, as PyTorch training code has them. `none` is [0, 1] as it is.
NORMALIZATIONS: dict[str, Normalization | None] = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": Normalization((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": None,
}


class Normalized(nnx.Module):
    """`model((x - mean) / std)`."""

    def __init__(self, model: nnx.Module, normalization: Normalization) -> None:
        self.model = model
        self.normalization = normalization

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        mean, std = (
            jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1)
            for values in (self.normalization.mean, self.normalization.std)
        )
        return self.model((x - mean) / std)


def normalized_model(model: nnx.Module, normalization: Normalization | None) -> nnx.Module:
    """The model behind a normalisation, if there is one."""
    return Normalized(model, normalization) if normalization else model


def normalized(architecture: Architecture, normalization: Normalization | None) -> Architecture:
    """The architecture behind a normalisation, if there is one."""
    if normalization is None:
        return architecture
    build = architecture.build
    return replace(architecture, build=lambda *arguments: normalized_model(build(*arguments), normalization))
