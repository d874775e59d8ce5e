"""x + δ where δ consists of few plane waves: what is sparse in frequencies, as a patch is in pixels."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Complex, Float

from ibau_jax.perturbations.ascent import TINY, along_gradient, scaled
from ibau_jax.perturbations.pixel import Pixel
from ibau_jax.perturbations.space import Images, Shape

STRIDE = (
    0.01  # of the first step, root mean square over pixels, in sizes; longer ones find a clean model's textures too
)


@dataclass(frozen=True)
class Wave:
    """x + δ clipped to [0, 1], its size the sum of the amplitudes of δ's plane waves. φ is δ, float (h, w, c).

    An amplitude is in units of the image range, of several channels the ℓ2 norm of theirs. The stripes of SIG (Barni
    et al., ICIP 2019) are one wave, as large in ℓ2 as what leads to an ordinary class, but hidden in fewer frequencies.
    """

    name: str = "wave"
    unit: str = "amplitude"

    def init(self, key: Array, shape: Shape) -> Float[Array, "h w c"]:
        """Draws normal noise of a thousandth of the image range."""
        return Pixel().init(key, shape)

    def apply(self, delta: Float[Array, "h w c"], images: Images) -> Images:
        """Adds δ, as the pixel space does."""
        return Pixel().apply(delta, images)

    def size(self, delta: Float[Array, "h w c"]) -> Float[Array, ""]:
        """Sums the amplitudes."""
        return jnp.sum(_amplitudes(_waves(delta)))

    def project(self, delta: Float[Array, "h w c"], size: Float[Array, ""] | float) -> Float[Array, "h w c"]:
        """Takes the same from every amplitude, down to 0, until their sum is `size` (Duchi et al., ICML 2008)."""
        waves = _waves(delta)
        amplitudes = _amplitudes(waves)
        highest = -jnp.sort(-amplitudes.reshape(-1))
        each = (jnp.cumsum(highest) - size) / jnp.arange(1, highest.size + 1)  # what so many would have to lose
        threshold = jnp.maximum(jnp.max(each), 0)
        kept = waves * (jnp.maximum(amplitudes - threshold, 0) / jnp.maximum(amplitudes, TINY))[..., None]
        return jnp.fft.ifft2(kept, axes=(0, 1), norm="forward").real.astype(delta.dtype)

    def enlarge(self, delta: Float[Array, "h w c"], factor: Float[Array, ""] | float) -> Float[Array, "h w c"]:
        """Multiplies δ."""
        return factor * delta

    def max_size(self, shape: Shape) -> float:
        """Computes the size of a wave whose amplitude is the range in every channel."""
        return math.sqrt(shape[2])

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Steps along the gradient, a share of the size long."""
        return along_gradient(_rms, scaled(schedule, STRIDE), in_sizes=True)

    def to_image(self, delta: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
        """Draws δ as the pixel space does."""
        return Pixel().to_image(delta)


def _waves(delta: Float[Array, "h w c"]) -> Complex[Array, "h w c"]:
    """Computes half of the amplitude, and the phase, of the wave of every frequency and of its negative."""
    return jnp.fft.fft2(delta, axes=(0, 1), norm="forward")


def _amplitudes(waves: Complex[Array, "h w c"]) -> Float[Array, "h w"]:
    return jnp.linalg.norm(jnp.abs(waves), axis=-1)


def _rms(delta: Float[Array, "h w c"]) -> Float[Array, ""]:
    return jnp.linalg.norm(delta) / math.sqrt(delta.shape[0] * delta.shape[1])
