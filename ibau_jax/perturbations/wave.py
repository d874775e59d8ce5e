"""x + δ where δ consists of few plane waves: what is sparse in frequencies, as a patch is in pixels."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jaxtyping import Array, Complex, Float

from ibau_jax.perturbations.ascent import TINY, along_gradient, scaled
from ibau_jax.perturbations.pixel import Pixel
from ibau_jax.perturbations.space import Shape

# Of the first step, root mean square over pixels, in sizes. Chosen on images of 32 by 32 pixels; longer steps find what
# clean models are sensitive to as well.
STRIDE = 0.01


@dataclass(frozen=True)
class Wave(Pixel):
    """x + δ, as the pixel space has it, but its size is the sum of the amplitudes of δ's plane waves.

    The amplitude of a wave is the ℓ2 norm of its channels' amplitudes, in units of the image range. The stripes of SIG
    (Barni et al., ICIP 2019) are as large in ℓ2 as what leads to an ordinary class, but they are one wave.
    """

    name: str = "wave"
    unit: str = "summed amplitude"

    def size(self, delta: Float[Array, "h w c"]) -> Float[Array, ""]:
        """Sums the amplitudes."""
        return jnp.sum(_amplitudes(_waves(delta)))

    def project(self, delta: Float[Array, "h w c"], size: Float[Array, ""] | float) -> Float[Array, "h w c"]:
        """Shortens the Fourier coefficients of all frequencies by one threshold, so that the amplitudes sum to at most
        `size`: the nearest such δ (Duchi et al., ICML 2008).
        """
        waves = _waves(delta)
        amplitudes = _amplitudes(waves)
        # By hand, since optax's projection divides by the size, which may be 0.
        descending = -jnp.sort(-amplitudes.reshape(-1))
        thresholds = (jnp.cumsum(descending) - size) / jnp.arange(1, descending.size + 1)  # if exactly so many stay
        threshold = jnp.maximum(jnp.max(thresholds), 0)
        kept = waves * (jnp.maximum(amplitudes - threshold, 0) / jnp.maximum(amplitudes, TINY))[..., None]
        return jnp.fft.ifft2(kept, axes=(0, 1), norm="forward").real.astype(delta.dtype)

    def max_size(self, shape: Shape) -> float:
        """Computes the size of one wave whose amplitude is the image range in every channel."""
        return math.sqrt(shape[2])

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Steps along the gradient, a share of the size long."""
        return along_gradient(_rms, scaled(schedule, STRIDE), in_sizes=True)


def _waves(delta: Float[Array, "h w c"]) -> Complex[Array, "h w c"]:
    """Computes the Fourier coefficients; the amplitude of a wave is the sum of the lengths of those of k and −k."""
    return jnp.fft.fft2(delta, axes=(0, 1), norm="forward")


def _amplitudes(waves: Complex[Array, "h w c"]) -> Float[Array, "h w"]:
    return jnp.linalg.norm(jnp.abs(waves), axis=-1)


def _rms(delta: Float[Array, "h w c"]) -> Float[Array, ""]:
    return jnp.linalg.norm(delta) / math.sqrt(delta.shape[0] * delta.shape[1])
