"""The protocol that every perturbation space follows."""

from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

Perturbation: TypeAlias = Any
"""φ, a pytree of float32 arrays. Its structure belongs to its space."""
Images: TypeAlias = Float[Array, "n h w c"]
Shape: TypeAlias = tuple[int, int, int]
"""height, width, channels"""


class PerturbationSpace(Protocol):
    """Transforms T(x; φ) of images, one φ for all of them, and the size of φ.

    An implementation is a frozen dataclass, so that it can be a static argument of compiled functions. All methods but
    `max_size` and `to_image` can be traced and mapped, and `apply` can be differentiated twice.
    """

    @property
    def name(self) -> str:
        """Names the space in reports and in result.json."""

    @property
    def unit(self) -> str:
        """Names the unit of sizes."""

    def init(self, key: Array, shape: Shape) -> Perturbation:
        """Draws a small random perturbation of images of `shape`; symmetric ones would have no gradient."""

    def apply(self, delta: Perturbation, images: Images) -> Images:
        """Perturbs images. Images in [0, 1] stay in [0, 1], except where the space says that it does not clip."""

    def size(self, delta: Perturbation) -> Float[Array, ""]:
        """Measures a perturbation; 0 leaves images as they are."""

    def project(self, delta: Perturbation, size: Float[Array, ""] | float) -> Perturbation:
        """Finds the nearest perturbation in the space whose size is at most `size`."""

    def enlarge(self, delta: Perturbation, factor: Float[Array, ""] | float) -> Perturbation:
        """Makes a perturbation `factor` times as large; 0 makes the identity."""

    def max_size(self, shape: Shape) -> float:
        """Computes the size that changes images of `shape` beyond recognition."""

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Makes the optimiser of φ, which descends on a loss; its `update` takes the size allowed now as `size=`.

        Args:
            schedule: maps the number of steps done to what the steps are multiplied by, 1 for a full one.
        """

    def to_image(self, delta: Perturbation, shape: Shape) -> Float[np.ndarray, "h w c"]:
        """Draws a perturbation of images of `shape` for a person, in [0, 1]; in their channels, or in one."""


def size_text(size: float) -> str:
    """Writes a size for a person: with two decimals, a small one with two digits."""
    return f"{size:.2f}" if size >= 1 else f"{size:.2g}"


def apply_each(space: PerturbationSpace, deltas: Perturbation, images: Images) -> Images:
    """Perturbs each image by a perturbation of its own; `deltas` has a leading axis of images."""
    return jax.vmap(lambda delta, image: space.apply(delta, image[None])[0])(deltas, images)
