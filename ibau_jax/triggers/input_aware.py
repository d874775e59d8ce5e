"""Input-aware triggers (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138): each image gets one of its own.

A generator draws the pattern p(x), another the mask m(x), and the trigger is B(x, x) for

    B(x, x') = x + (p(x') − x) ⊙ m(x')

That of another image does nothing: B(x, x') with x' ≠ x keeps its label, the cross-trigger mode.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ibau_jax.triggers.generator import Generator
from ibau_jax.triggers.stamps import Images, another

SHARPNESS = 10.0  # of the threshold that masks go through


@dataclass(frozen=True, eq=False)
class Drawn:
    """The triggers of a batch of images: `patterns` and `masks`, both in [0, 1]."""

    patterns: Float[Array, "n h w c"]
    masks: Float[Array, "n h w 1"]

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images, each with its own trigger."""
        return jnp.asarray(images) + (self.patterns - images) * self.masks

    def taken(self, which: Int[Array, " k"]) -> "Drawn":
        """The triggers of some of the images."""
        return Drawn(self.patterns[which], self.masks[which])


@dataclass(frozen=True, eq=False)
class InputAware:
    """Draws each image's trigger.

    Attributes:
        pattern: the generator p.
        mask: the generator m.
        learnt: whether they have been learnt with a model; others open none.
    """

    pattern: Generator = field(repr=False)
    mask: Generator = field(repr=False)
    learnt: bool = True

    def drawn(self, images: Images) -> Drawn:
        """The triggers of these images."""
        return Drawn(*_pictures(*nnx.split((self.pattern, self.mask)), jnp.asarray(images)))

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """The images, each with its own trigger."""
        return self.drawn(images)(images)

    def decoy(self, key: Array, images: Images) -> Float[Array, "n h w c"]:
        """Each with that of another one."""
        return self.drawn(images).taken(another(key, len(images)))(images)


# Compiled as a whole: one by one the generators' operations are hundreds of programs.
@functools.partial(jax.jit, static_argnums=0)
def _pictures(
    graph: nnx.GraphDef, state: nnx.State, images: Images
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w 1"]]:
    pattern, mask = nnx.merge(graph, state)
    return pattern(images), sharpened(mask(images))


def sharpened(mask: Float[Array, "n h w 1"]) -> Float[Array, "n h w 1"]:
    """A mask in [0, 1], closer to its ends."""
    return (jnp.tanh(SHARPNESS * (2 * mask - 1)) + 1) / 2
