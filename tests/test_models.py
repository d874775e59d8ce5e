"""Layers against PyTorch, in value and in derivative, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.errors import CheckpointError
from ibau_jax.models import Normalized, architectures, get_architecture, register
from ibau_jax.models.layers import ELU, Flatten, MaxPool
from ibau_jax.perturb import perturbed
from tests.oracles.twins import as_torch


@given(size=st.integers(1, 3), height=st.integers(3, 8), width=st.integers(3, 8), levels=st.sampled_from([2, 1000]))
@settings(max_examples=25, deadline=None)
def test_max_pooling_and_its_derivative_at_ties(size, height, width, levels):
    """With two levels nearly every window has its maximum more than once."""
    rng = np.random.default_rng(height * 10 + width)
    images = rng.integers(0, levels, (2, height, width, 3)).astype(np.float32)
    weights = rng.normal(size=(2, height // size, width // size, 3)).astype(np.float32)
    theirs = as_torch(images).requires_grad_(True)
    pooled = torch.nn.MaxPool2d(size)(theirs)
    (pooled * as_torch(weights)).sum().backward()
    ours, gradient = jax.vjp(MaxPool(size), jnp.asarray(images))
    np.testing.assert_array_equal(ours, pooled.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(gradient(jnp.asarray(weights))[0], theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_clipping_has_torchs_derivative_on_the_border():
    """Black and white pixels are where clip and clamp differ."""
    images = np.asarray([0.0, 0.25, 1.0, 0.9], np.float32).reshape(1, 2, 2, 1)
    delta = np.asarray([0.0, 0.0, 0.0, 0.3], np.float32).reshape(1, 2, 2, 1)
    theirs = torch.as_tensor(delta).requires_grad_(True)
    (torch.as_tensor(images) + theirs).clamp(0, 1).sum().backward()
    gradient = jax.grad(lambda d: perturbed(jnp.asarray(images), d, clip=True).sum())(jnp.asarray(delta))
    np.testing.assert_array_equal(gradient, theirs.grad.numpy())
    assert np.asarray(gradient).ravel().tolist() == [1, 1, 1, 0]


def test_elu_and_flatten_match_torch(rng):
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(ELU()(jnp.asarray(x)), torch.nn.ELU()(torch.as_tensor(x)).numpy(), atol=1e-6)
    np.testing.assert_array_equal(Flatten()(jnp.asarray(x)), torch.nn.Flatten()(as_torch(x)).numpy())


def test_normalisation_inside_the_model(rng):
    class Identity(nnx.Module):
        def __call__(self, x):
            return x

    x, mean, std = rng.random((2, 3, 3, 3), np.float32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    np.testing.assert_allclose(Normalized(Identity(), mean, std)(jnp.asarray(x)), expected, rtol=1e-5)


def test_the_registry():
    names = [architecture.name for architecture in architectures()]
    assert "small_vgg" in names
    with pytest.raises(CheckpointError, match="small_vgg"):
        get_architecture("nosuch")
    with pytest.raises(ValueError, match="twice"):
        register(get_architecture("small_vgg"))
