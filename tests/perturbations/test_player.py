"""What a player aims at, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from ibau_jax.batches import Batches
from ibau_jax.perturbations import Pixel
from ibau_jax.perturbations.player import see, towards

CLASSES = 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), target=st.integers(0, CLASSES))
def test_the_loss_is_of_the_aims_probability_and_counts_are_of_images_that_are_not_there(seed, target):
    """Some images only fill the batch; the own class is what the model says without the perturbation."""
    rng = np.random.default_rng(seed)
    weights, delta = rng.normal(0, 3, (12, CLASSES)), rng.normal(0, 0.3, (2, 2, 3))
    images, real = rng.random((9, 2, 2, 3)).astype(np.float32), np.arange(9) < 7
    labels = rng.integers(0, CLASSES, 9)
    batch = Batches(*map(jnp.asarray, (images, labels, real.astype(np.float32))))

    def forward(weights, images):
        return images.reshape(len(images), -1) @ weights

    params = jnp.asarray(weights)
    seen = see(forward, params, batch)
    loss, found = towards(forward, Pixel(clip=False), jnp.asarray(delta), params, seen, jnp.asarray(target))
    own = (images.reshape(9, -1) @ weights).argmax(axis=1)
    logits = (images + delta).reshape(9, -1) @ weights
    share, predicted = softmax(logits, axis=1), logits.argmax(axis=1)
    if target == CLASSES:
        losses, counted, follows = -np.log(1 - share[np.arange(9), own]), real, real & (predicted != own)
        others = 0.75 * 7  # a class's trigger does not move the images of its own
    else:
        counted = real & (labels != target)
        losses, follows, others = -np.log(share[:, target]), counted & (predicted == target), counted.sum()
    assert float(found.follow) == follows.sum()
    assert float(found.others) == pytest.approx(others)
    if counted.any():
        assert float(loss) == pytest.approx(losses[counted].mean(), rel=2e-3, abs=2e-3)


def test_what_surely_stays_has_a_gradient():
    """Where the own class has all of the probability in float32, 1 minus it would be 0."""
    batch = Batches(jnp.ones((4, 1, 1, 3)), jnp.zeros(4, int), jnp.ones(4))

    def forward(gain, images):
        return gain * jnp.stack([images[:, 0, 0, 0], images[:, 0, 0, 1] - 1], axis=1)

    def loss(delta):
        return towards(forward, Pixel(clip=False), delta, 200.0, see(forward, 200.0, batch), jnp.asarray(2))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 1, 3)))
    assert float(value) == pytest.approx(200)
    np.testing.assert_allclose(np.asarray(gradient)[0, 0], [200, -200, 0], rtol=1e-5)
