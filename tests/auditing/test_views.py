import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.auditing.views import PATCH, PERTURBATION, VIEWS

SHAPE = (5, 4, 3)


PROJECT = {view.name: jax.jit(view.project) for view in VIEWS.values()}


def size(view, trigger):
    return float(jnp.linalg.norm(trigger) if view is PERTURBATION else jnp.sum(trigger["mask"]))


def scattered(view, seed):
    """A trigger with values on both sides of what is allowed."""
    start = view.start(jax.random.key(seed), SHAPE)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.6, leaf.shape), jnp.float32), start)


def squared_distance(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in leaves)


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1.2))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_nearest_allowed_trigger(view, seed, share):
    bound = jnp.float32(share * view.largest(SHAPE))
    trigger = scattered(view, seed)
    projected = PROJECT[view.name](trigger, bound)
    assert size(view, projected) <= float(bound) * (1 + 1e-5) + 1e-6
    again = PROJECT[view.name](projected, bound)
    assert squared_distance(projected, again) < 1e-8
    nearest = squared_distance(trigger, projected)
    for other in range(20):  # no other allowed trigger is nearer
        allowed = PROJECT[view.name](scattered(view, seed + 1 + other), bound)
        mixed = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, projected, allowed)  # the allowed set is convex
        assert nearest <= squared_distance(trigger, mixed) + 1e-5


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_stamped_images_stay_images(view, seed):
    trigger = PROJECT[view.name](scattered(view, seed), jnp.float32(view.largest(SHAPE)))
    images = jnp.asarray(np.random.default_rng(seed).random((3, *SHAPE)), jnp.float32)
    stamped = view.stamp(trigger, images)
    assert stamped.shape == images.shape
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1 + 1e-6


def test_no_mask_no_change_full_mask_pattern_only():
    images = jnp.asarray(np.random.default_rng(0).random((3, *SHAPE)), jnp.float32)
    pattern = jnp.asarray(np.random.default_rng(1).random((1, *SHAPE)), jnp.float32)
    empty = {"mask": jnp.zeros((1, *SHAPE[:2], 1)), "pattern": pattern}
    full = {"mask": jnp.ones((1, *SHAPE[:2], 1)), "pattern": pattern}
    np.testing.assert_array_equal(PATCH.stamp(empty, images), images)
    np.testing.assert_array_equal(PATCH.stamp(full, images), jnp.broadcast_to(pattern, images.shape))
