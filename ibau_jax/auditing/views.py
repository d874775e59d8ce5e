"""Two families of universal triggers, each with a size: what an audit looks for the smallest of.

To add a view, write its functions and put it into `VIEWS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ibau_jax.perturb import STRIDE, project

Trigger: TypeAlias = Any  # a pytree of float arrays with a leading axis of length 1
Images = Float[Array, "n h w c"]
Shape = tuple[int, int, int]
BISECTIONS = 25  # halvings of an interval of length 1; float32 resolves no more


@dataclass(frozen=True)
class View:
    """A family of triggers.

    Attributes:
        name: what reports call it.
        unit: of its sizes.
        start: `start(key, shape)`, a small random trigger for images of `shape`.
        stamp: `stamp(trigger, images)`; images and results are in [0, 1].
        project: `project(trigger, size)`, the trigger cut down to at most `size`.
        largest: `largest(shape)`, a size that changes an image beyond recognition.
        first: the share of it that a search begins with.
        optimizer: `optimizer(schedule)`, of the trigger; the schedule falls from 1 to a tenth.
        stride: `stride(size)`, what its updates are multiplied by.
    """

    name: str
    unit: str
    start: Callable[[Array, Shape], Trigger]
    stamp: Callable[[Trigger, Images], Images]
    project: Callable[[Trigger, Float[Array, ""]], Trigger]
    largest: Callable[[Shape], float]
    first: float
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    stride: Callable[[Float[Array, ""]], Float[Array, ""] | float]


def _start_perturbation(key: Array, shape: Shape) -> Trigger:
    return 1e-3 * jax.random.normal(key, (1, *shape))


def _add(trigger: Trigger, images: Images) -> Images:
    return jnp.clip(images + trigger, 0, 1)


# A perturbation δ added to every image, clip(x + δ), its size ‖δ‖₂.
PERTURBATION = View(
    name="perturbation",
    unit="l2 norm",
    start=_start_perturbation,
    stamp=_add,
    project=project,
    largest=lambda shape: 0.5 * math.sqrt(math.prod(shape)),  # every pixel moved by half of the range
    first=0.15,
    # Steps along the gradient, a share of the size long. Adam's, nearly ±1 a pixel, end at a norm a quarter larger.
    optimizer=lambda schedule: optax.chain(optax.normalize_by_update_norm(-1.0), optax.scale_by_schedule(schedule)),
    stride=lambda size: STRIDE * size,
)


def _start_patch(key: Array, shape: Shape) -> Trigger:
    mask_key, pattern_key = jax.random.split(key)
    mask = 0.1 + 0.01 * jax.random.uniform(mask_key, (1, *shape[:2], 1))
    return {"mask": mask, "pattern": jax.random.uniform(pattern_key, (1, *shape))}


def _blend(trigger: Trigger, images: Images) -> Images:
    return images * (1 - trigger["mask"]) + trigger["mask"] * trigger["pattern"]


def _project_patch(trigger: Trigger, size: Float[Array, ""]) -> Trigger:
    """The nearest mask in [0, 1] with Σ m ≤ size: clip(m − τ) for the smallest τ ≥ 0 that does it, by bisection."""
    mask = trigger["mask"]

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        too_large = jnp.sum(jnp.clip(mask - middle, 0, 1)) > size
        return jnp.where(too_large, middle, low), jnp.where(too_large, high, middle)

    _, threshold = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros(()), jnp.maximum(jnp.max(mask), 0)))
    fits = jnp.sum(jnp.clip(mask, 0, 1)) <= size
    cut = jnp.clip(mask - jnp.where(fits, 0, threshold), 0, 1)
    return {"mask": cut, "pattern": jnp.clip(trigger["pattern"], 0, 1)}


def _along_largest() -> optax.GradientTransformation:
    """Against the gradient, as far as that its largest component is 1."""

    def update(gradient: Trigger, state: optax.EmptyState, params: None = None) -> tuple[Trigger, optax.EmptyState]:
        return jax.tree.map(lambda g: -g / jnp.maximum(jnp.max(jnp.abs(g)), 1e-12), gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# A mask m and a pattern p as in Neural Cleanse (Wang et al., IEEE S&P 2019), x·(1 − m) + p·m, its size Σ m.
PATCH = View(
    name="patch",
    unit="pixels",
    start=_start_patch,
    stamp=_blend,
    project=_project_patch,
    largest=lambda shape: float(shape[0] * shape[1]),
    first=0.15,
    # The mask's steps are in proportion to the gradient, so that it gathers where it matters; the pattern's are Adam's.
    optimizer=lambda schedule: optax.partition(
        {"mask": optax.chain(_along_largest(), optax.scale_by_schedule(schedule)), "pattern": optax.adam(schedule)},
        {"mask": "mask", "pattern": "pattern"},
    ),
    stride=lambda size: 0.2,
)

VIEWS = {view.name: view for view in (PERTURBATION, PATCH)}
