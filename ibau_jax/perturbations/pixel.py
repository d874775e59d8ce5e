"""x + δ, as in the paper: every pixel moves by the same amount in all images."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ibau_jax.perturbations.ascent import STRIDE, TINY, along_gradient, into_ball, scaled
from ibau_jax.perturbations.space import Images, Shape


@dataclass(frozen=True)
class Pixel:
    """x + δ, its size ‖δ‖₂. φ is δ, float (h, w, c).

    Attributes:
        clip: x + δ is clipped to [0, 1].
        scale: what a δ of 1 means in each channel, where it is not 1: δ in normalised images is in units of their
            standard deviation.
    """

    clip: bool = True
    scale: tuple[float, ...] = ()
    name: str = "perturbation"
    unit: str = "l2 norm"

    def init(self, key: Array, shape: Shape) -> Float[Array, "h w c"]:
        """Draws normal noise of a thousandth of the image range."""
        return 1e-3 * jax.random.normal(key, shape)

    def apply(self, delta: Float[Array, "h w c"], images: Images) -> Images:
        """Adds δ. Clipping has the derivative 1 on the closed interval, as PyTorch's clamp has it, so that black and
        white pixels can move; jnp.clip halves it at 0 and 1.
        """
        step = delta * jnp.asarray(self.scale)[None, None] if self.scale else delta
        moved = images + step[None]
        return jnp.where((moved >= 0) & (moved <= 1), moved, jnp.clip(moved, 0, 1)) if self.clip else moved

    def size(self, delta: Float[Array, "h w c"]) -> Float[Array, ""]:
        """Measures ‖δ‖₂."""
        return jnp.linalg.norm(delta)

    def project(self, delta: Float[Array, "h w c"], size: Float[Array, ""] | float) -> Float[Array, "h w c"]:
        """Scales δ into the ℓ2 ball."""
        return into_ball(delta, self.size(delta), size)

    def enlarge(self, delta: Float[Array, "h w c"], factor: Float[Array, ""] | float) -> Float[Array, "h w c"]:
        """Multiplies δ."""
        return factor * delta

    def max_size(self, shape: Shape) -> float:
        """Computes the norm of a δ that moves every pixel by half of the range."""
        return 0.5 * math.sqrt(math.prod(shape))

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Steps along the gradient, by a share of the size. Adam's steps, nearly ±1 a pixel, end at larger norms."""
        return along_gradient(jnp.linalg.norm, scaled(schedule, STRIDE), in_sizes=True)

    def to_image(self, delta: Float[np.ndarray, "h w c"], shape: Shape) -> Float[np.ndarray, "h w c"]:
        """Draws 0 as grey, and δ's largest component as black or white."""
        delta = np.asarray(delta)
        return 0.5 + delta / (2 * max(float(np.abs(delta).max()), TINY))
