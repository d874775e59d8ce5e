"""x·(1 − m) + p·m: some pixels of all images are replaced by those of a pattern, as in Neural Cleanse."""

from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ibau_jax.perturbations.ascent import along_gradient, scaled
from ibau_jax.perturbations.space import Images, Shape

STRIDE = 0.2  # of the first step, in units of the range of masks and patterns
BISECTIONS = 25  # halvings of an interval of length 1; float32 resolves no more


class MaskAndPattern(TypedDict):
    """φ: the mask m, float (h, w, 1), and the pattern p, float (h, w, c), both in [0, 1]."""

    mask: Float[Array, "h w 1"]
    pattern: Float[Array, "h w c"]


@dataclass(frozen=True)
class Patch:
    """x·(1 − m) + p·m (Wang et al., IEEE S&P 2019, equation 2), its size Σ m."""

    name: str = "patch"
    unit: str = "pixels"

    def init(self, key: Array, shape: Shape) -> MaskAndPattern:
        """Draws a mask near 0.1 and a pattern near grey, from where black and white are equally far."""
        mask_key, pattern_key = jax.random.split(key)
        mask = 0.1 + 0.01 * jax.random.uniform(mask_key, (*shape[:2], 1))
        return {"mask": mask, "pattern": 0.5 + 0.01 * jax.random.normal(pattern_key, shape)}

    def apply(self, delta: MaskAndPattern, images: Images) -> Images:
        """Blends the pattern in."""
        mask = delta["mask"][None]
        return images * (1 - mask) + mask * delta["pattern"][None]

    def size(self, delta: MaskAndPattern) -> Float[Array, ""]:
        """Counts the pixels that are replaced, in shares: Σ m."""
        return jnp.sum(delta["mask"])

    def project(self, delta: MaskAndPattern, size: Float[Array, ""] | float) -> MaskAndPattern:
        """Finds the nearest mask in [0, 1] with Σ m ≤ size: clip(m − τ) for the smallest τ ≥ 0, by bisection."""
        mask = delta["mask"]

        def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = interval
            middle = (low + high) / 2
            too_large = jnp.sum(jnp.clip(mask - middle, 0, 1)) > size
            return jnp.where(too_large, middle, low), jnp.where(too_large, high, middle)

        highest = jnp.maximum(jnp.max(mask), 0)
        # Both ends are made of the mask: under shard_map a loop's state must vary over devices from its start.
        _, threshold = jax.lax.fori_loop(0, BISECTIONS, halve, (0 * highest, highest))
        fits = jnp.sum(jnp.clip(mask, 0, 1)) <= size
        cut = jnp.clip(mask - jnp.where(fits, 0, threshold), 0, 1)
        return {"mask": cut, "pattern": jnp.clip(delta["pattern"], 0, 1)}

    def enlarge(self, delta: MaskAndPattern, factor: Float[Array, ""] | float) -> MaskAndPattern:
        """Multiplies the mask, up to 1."""
        return {"mask": jnp.clip(factor * delta["mask"], 0, 1), "pattern": delta["pattern"]}

    def max_size(self, shape: Shape) -> float:
        """Counts all pixels."""
        return float(shape[0] * shape[1])

    def ascent(self, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """Moves the mask in proportion to the gradient, so that it gathers where it matters; the pattern by Adam."""
        strides = scaled(schedule, STRIDE)
        return optax.partition(
            {"mask": along_gradient(_largest, strides), "pattern": optax.adam(strides)},
            {"mask": "mask", "pattern": "pattern"},
        )

    def to_image(self, delta: MaskAndPattern, shape: Shape) -> Float[np.ndarray, "h w c"]:
        """Draws the patch on grey."""
        mask, pattern = np.asarray(delta["mask"]), np.asarray(delta["pattern"])
        return 0.5 * (1 - mask) + mask * pattern


def _largest(tree: Any) -> Float[Array, ""]:
    """Finds the largest component of a pytree of one array, without its sign."""
    (leaf,) = jax.tree.leaves(tree)
    return jnp.max(jnp.abs(leaf))
