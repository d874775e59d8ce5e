"""What every space promises, and the images that perturbations make against NumPy and PyTorch."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ibau_jax.config import SpaceName
from ibau_jax.perturbations import SPACES, Patch, Pixel, Warp, Wave, apply_each, size_text

SHAPE = (6, 5, 3)
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
PROJECT = {name: jax.jit(space.project) for name, space in SPACES.items()}
SIZE = {
    "perturbation": np.linalg.norm,
    "patch": lambda delta: np.sum(delta["mask"]),
    "warp": lambda delta: np.sqrt(np.mean(np.sum(np.square(delta), axis=-1))),
    "wave": lambda delta: sum_of_amplitudes(np.asarray(delta)),
}


def sum_of_amplitudes(delta):
    """Each frequency's wave by least squares: a sine and a cosine, fitted to the pixels; no Fourier transform."""
    height, width, channels = delta.shape
    rows, columns, total, seen = *np.indices((height, width)), 0.0, set()
    for frequency in np.ndindex(height, width):
        if frequency in seen:
            continue
        seen |= {frequency, ((-frequency[0]) % height, (-frequency[1]) % width)}
        phase = 2 * np.pi * (frequency[0] * rows / height + frequency[1] * columns / width)
        basis = np.stack([np.cos(phase).ravel(), np.sin(phase).ravel()], axis=1)
        coefficients = np.linalg.lstsq(basis, delta.reshape(-1, channels), rcond=1e-6)[0]
        total += np.linalg.norm(coefficients)
    return total


def scattered(space, seed):
    """Draws a perturbation with values on both sides of what is allowed."""
    start = space.init(jax.random.key(seed), SHAPE)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.6, leaf.shape), jnp.float32), start)


def squared_distance(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in leaves)


def random_images(seed=0, count=3):
    return jnp.asarray(np.random.default_rng(seed).random((count, *SHAPE)), jnp.float32)


@every_space
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1.2))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_nearest_allowed_perturbation(space, seed, share):
    bound = jnp.float32(share * space.max_size(SHAPE))
    delta = scattered(space, seed)
    projected = PROJECT[space.name](delta, bound)
    assert SIZE[space.name](projected) == pytest.approx(float(space.size(projected)), rel=1e-5)
    assert SIZE[space.name](projected) <= float(bound) * (1 + 1e-5) + 1e-6
    again = PROJECT[space.name](projected, bound)
    assert squared_distance(projected, again) < 1e-8
    nearest = squared_distance(delta, projected)
    for other in range(20):  # no other allowed one is nearer
        allowed = PROJECT[space.name](scattered(space, seed + 1 + other), bound)
        mixed = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, projected, allowed)  # the allowed set is convex
        assert nearest <= squared_distance(delta, mixed) + 1e-5


@every_space
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_images_stay_images(space, seed):
    delta = PROJECT[space.name](scattered(space, seed), jnp.float32(space.max_size(SHAPE)))
    perturbed = space.apply(delta, random_images(seed))
    assert perturbed.shape == (3, *SHAPE)
    assert float(perturbed.min()) >= 0
    assert float(perturbed.max()) <= 1 + 1e-6


@every_space
def test_size_0_is_the_identity(space):
    nothing = space.project(scattered(space, 0), 0.0)
    assert float(space.size(nothing)) == 0
    np.testing.assert_allclose(space.apply(nothing, random_images()), random_images(), atol=1e-6)


@every_space
@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 3))
@settings(max_examples=15, deadline=None)
def test_enlarging_multiplies_the_size_up_to_what_the_space_allows(space, seed, factor):
    delta = PROJECT[space.name](scattered(space, seed), jnp.float32(0.3 * space.max_size(SHAPE)))
    larger = space.enlarge(delta, factor)
    expected = np.clip(factor * delta["mask"], 0, 1).sum() if space.name == "patch" else factor * space.size(delta)
    assert SIZE[space.name](larger) == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_allclose(space.apply(space.enlarge(delta, 0.0), random_images()), random_images(), atol=1e-6)


@every_space
def test_one_perturbation_for_each_image(space):
    deltas = [scattered(space, seed) for seed in range(3)]
    together = apply_each(space, jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas), random_images())
    for image, delta, found in zip(random_images(), deltas, together, strict=True):
        np.testing.assert_allclose(found, space.apply(delta, image[None])[0], atol=1e-6)


@every_space
def test_a_step_does_not_depend_on_the_gradients_scale(space):
    """Where Adam's small number in the denominator does not show."""
    ascent, delta = space.ascent(optax.constant_schedule(1.0)), scattered(space, 0)
    one, other = (
        ascent.update(jax.tree.map(lambda leaf, s=scale: s * leaf, delta), ascent.init(delta), size=2.0)[0]
        for scale in (1.0, 1e-2)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), one, other)


@every_space
def test_the_ascent_lowers_a_loss(space):
    """Toward an image that the space can make."""
    goal = space.apply(PROJECT[space.name](scattered(space, 1), 0.3 * space.max_size(SHAPE)), random_images())
    size, ascent = 0.3 * space.max_size(SHAPE), space.ascent(optax.cosine_decay_schedule(1.0, 60, alpha=0.1))

    def loss(delta):
        return jnp.mean((space.apply(delta, random_images()) - goal) ** 2)

    @jax.jit
    def step(delta, state):
        updates, state = ascent.update(jax.grad(loss)(delta), state, size=size)
        return space.project(optax.apply_updates(delta, updates), size), state

    delta = space.init(jax.random.key(0), SHAPE)
    first, state = float(loss(delta)), ascent.init(delta)
    for _ in range(60):
        delta, state = step(delta, state)
    assert float(loss(delta)) < 0.5 * first


@every_space
def test_a_picture_of_it(space):
    picture = space.to_image(space.project(scattered(space, 0), 0.5 * space.max_size(SHAPE)), SHAPE)
    assert picture.shape[:2] == SHAPE[:2]
    assert 0 <= picture.min() < picture.max() <= 1


def test_pixels_are_added_in_units_of_each_channel_and_clipped_if_so_asked():
    delta, scale = np.asarray(scattered(SPACES["perturbation"], 0)), np.asarray([0.5, 1.0, 2.0], np.float32)
    moved = np.asarray(random_images()) + delta * scale
    np.testing.assert_allclose(Pixel(False, (0.5, 1.0, 2.0)).apply(delta, random_images()), moved, atol=1e-6)
    np.testing.assert_allclose(
        Pixel(True, (0.5, 1.0, 2.0)).apply(delta, random_images()), np.clip(moved, 0, 1), atol=1e-6
    )


def test_clipping_has_pytorchs_derivative():
    """It is 1 on the closed interval, so that black and white pixels can move."""
    images = np.asarray([0.0, 0.5, 1.0, 0.9], np.float32).reshape(1, 2, 2, 1)
    delta = np.asarray([0.0, 0.1, 0.0, 0.2], np.float32).reshape(2, 2, 1)
    twin = torch.tensor(delta, requires_grad=True)
    (torch.tensor(images) + twin).clamp(0, 1).sum().backward()
    found = jax.grad(lambda delta: jnp.sum(Pixel().apply(delta, jnp.asarray(images))))(jnp.asarray(delta))
    np.testing.assert_array_equal(found, twin.grad.numpy())


def test_no_mask_no_change_full_mask_pattern_only():
    images, pattern = random_images(), random_images(1, 1)[0]
    np.testing.assert_array_equal(Patch().apply({"mask": jnp.zeros((6, 5, 1)), "pattern": pattern}, images), images)
    full = Patch().apply({"mask": jnp.ones((6, 5, 1)), "pattern": pattern}, images)
    np.testing.assert_array_equal(full, jnp.broadcast_to(pattern, images.shape))


@pytest.mark.parametrize(("size", "text"), [(50176.0, "50176.00"), (4.9, "4.90"), (0.0262, "0.026"), (0.0, "0")])
def test_sizes_for_a_person(size, text):
    assert size_text(size) == text


def test_waves_shrink_by_the_same_amplitude():
    """Two plane waves lose the same, and the lower one is gone first."""
    rows, columns = np.indices((8, 8))[..., None] / 8

    def waves(high, low):
        return np.float32(high * np.sin(2 * np.pi * (2 * columns + rows)) + low * np.cos(2 * np.pi * rows))

    assert float(Wave().size(waves(0.2, 0.1))) == pytest.approx(0.3, rel=1e-5)
    np.testing.assert_allclose(Wave().project(waves(0.2, 0.1), 0.15), waves(0.125, 0.025), atol=1e-6)
    np.testing.assert_allclose(Wave().project(waves(0.2, 0.1), 0.05), waves(0.05, 0.0), atol=1e-6)


def test_a_mean_is_a_wave_of_one_frequency():
    """And so are stripes of two pixels: without a partner of opposite sign they lose half as much as other waves."""
    rows, columns = np.indices((8, 6))[..., None]
    for alone in (np.ones((8, 6, 1)), np.cos(np.pi * columns)):
        other = np.cos(2 * np.pi * rows / 8)
        delta = jnp.asarray(0.4 * alone + 0.2 * other, jnp.float32)
        assert float(Wave().size(delta)) == pytest.approx(0.6, rel=1e-5)
        np.testing.assert_allclose(Wave().project(delta, 0.45), 0.35 * alone + 0.1 * other, atol=1e-6)
        np.testing.assert_allclose(Wave().project(delta, 0.3), 0.3 * alone, atol=1e-6)


def test_the_sinusoid_of_sig_is_one_wave():
    """Barni et al.: Δ sin(2π j f / m) with Δ = 20 of 255 levels and f = 6, the same in all channels."""
    stripes = np.broadcast_to(20 / 255 * np.sin(2 * np.pi * 6 * np.arange(32) / 32)[None, :, None], (32, 32, 3))
    assert float(Wave().size(jnp.asarray(stripes, jnp.float32))) == pytest.approx(20 / 255 * np.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 5, 3), (32, 32, 1), (2, 9, 3)])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_warps_are_pytorchs(rng, shape, scale):
    """WaNet's own operations: bicubic enlarging of the flow, `grid_sample` with what is outside at the border."""
    flow, (height, width, _) = scale * rng.normal(size=(4, 4, 2)).astype(np.float32), shape
    images = rng.random((2, *shape), np.float32)
    enlarged = functional.interpolate(
        torch.tensor(flow.transpose(2, 0, 1))[None], (height, width), mode="bicubic", align_corners=True
    )[0].numpy()
    rows, columns = np.indices((height, width)) + enlarged
    grid = np.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], axis=-1).astype(np.float32)
    expected = functional.grid_sample(
        torch.tensor(images.transpose(0, 3, 1, 2)),
        torch.tensor(np.broadcast_to(grid, (2, *grid.shape)).copy()),
        padding_mode="border",
        align_corners=True,
    )
    found = Warp().apply(jnp.asarray(flow), jnp.asarray(images))
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_options_and_configurations_know_all_of_them():
    assert set(get_args(SpaceName)) == set(SPACES)
