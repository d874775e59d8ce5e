"""Layers against PyTorch, in value and in derivative, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.models import Normalization, Normalized, architectures, get_architecture, register
from ibau_jax.models.layers import (
    AdaptiveAvgPool,
    AvgPool,
    Flatten,
    MaxPool,
    Resize,
    elu,
    hardsigmoid,
    hardswish,
    relu6,
)
from tests.oracles import torchvision_models
from tests.oracles.twins import as_torch


def assert_same_as_torch(ours, theirs, images, atol=1e-6):
    """Values, and derivatives along random directions, of two layers."""
    inputs = as_torch(images).requires_grad_(True)
    expected = theirs(inputs)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    found, gradient = jax.vjp(ours, jnp.asarray(images))
    np.testing.assert_allclose(found, expected.detach().numpy().transpose(0, 2, 3, 1), atol=atol)
    (along,) = gradient(jnp.asarray(weights.numpy().transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(along, inputs.grad.numpy().transpose(0, 2, 3, 1), atol=atol)


@given(
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    pads=st.booleans(),
    height=st.integers(3, 8),
    width=st.integers(3, 8),
    levels=st.sampled_from([2, 1000]),
)
@settings(max_examples=15, deadline=None)
def test_max_pooling_and_its_derivative_at_ties(size, stride, pads, height, width, levels):
    """With two levels nearly every window has its maximum more than once."""
    images = np.random.default_rng(height * 10 + width).integers(0, levels, (2, height, width, 3)).astype(np.float32)
    padding = size // 2 if pads else 0
    assert_same_as_torch(
        MaxPool(size, stride, padding), torch.nn.MaxPool2d(size, stride, padding), images, atol=1e-6 * levels
    )


@given(size=st.integers(1, 8), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_adaptive_pooling(size, height, width):
    """Bins overlap where sizes do not divide, and repeat where the image is smaller than the bins are many."""
    images = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    assert_same_as_torch(AdaptiveAvgPool(size), torch.nn.AdaptiveAvgPool2d(size), images, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7)])
def test_average_pooling(rng, height, width):
    images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    assert_same_as_torch(AvgPool(2), torch.nn.AvgPool2d(2), images)
    assert_same_as_torch(AvgPool(2, ceil=True), torch.nn.AvgPool2d(2, ceil_mode=True), images)
    padded = torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True)
    assert_same_as_torch(AvgPool(3, 2, 1, ceil=True), padded, images)
    assert_same_as_torch(AvgPool(3, 3, ceil=True), torch.nn.AvgPool2d(3, 3, ceil_mode=True), images)


def test_pooling_too_small_an_image_says_so(rng):
    with pytest.raises(ValueError, match="too small"):
        MaxPool(2)(jnp.zeros((1, 1, 4, 3)))


@pytest.mark.parametrize("size", [8, 12, 31, 64])
def test_resizing(rng, size):
    images = rng.random((2, 32, 32, 3), np.float32)
    assert_same_as_torch(
        Resize(size), torchvision_models.torchvision.transforms.Resize((size, size)), images, atol=1e-5
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "kinks"),
    [
        (relu6, torch.nn.ReLU6(), (0.0, 6.0)),
        (hardswish, torch.nn.Hardswish(), (-3.0, 3.0)),
        (hardsigmoid, torch.nn.Hardsigmoid(), (-3.0, 3.0)),
        (elu, torch.nn.ELU(), ()),
        (jax.nn.relu, torch.nn.ReLU(), (0.0,)),
    ],
)
def test_activations_and_their_derivatives_at_the_kinks(rng, ours, theirs, kinks):
    values = np.asarray([*kinks, *rng.normal(scale=4, size=30 - len(kinks))], np.float32)
    assert_same_as_torch(ours, theirs, values.reshape(1, 5, 2, 3))


def test_flatten_matches_torch(rng):
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(Flatten()(jnp.asarray(x)), torch.nn.Flatten()(as_torch(x)).numpy())


def test_normalisation_inside_the_model(rng):
    class Identity(nnx.Module):
        def __call__(self, x):
            return x

    x, mean, std = rng.random((2, 3, 3, 3), np.float32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    np.testing.assert_allclose(Normalized(Identity(), Normalization(mean, std))(jnp.asarray(x)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), r"--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225$"),
        ((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), r"--mean 0.4076 0.458 0.485 --std 0.003922 0.003922 0.003922$"),
        ((127.5,), (0.5,), r"--mean 0.5 --std 0.5$"),
        ((0.5,), (58.0,), r"--mean 0.5 --std 0.2275$"),
        ((-0.1,), (0.5,), r"not --mean -0.1 --std 0.5$"),
        ((1e9,), (0.5,), "means in"),
        ((float("nan"),), (0.5,), "means in"),
        ((0.5,), (float("nan"),), "deviations positive"),
        ((0.5,), (float("inf"),), "at most 1"),
        ((0.5,), (0.0,), "deviations positive"),
        ((0.5,), (1e-30,), "at most 1"),
        ((0.5, 0.5), (0.5,), "as many means"),
    ],
)
def test_normalisations_that_can_not_be(mean, std, message):
    with pytest.raises(ConfigError, match=message):
        Normalization(mean, std)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.5), (0.0, 1 / 255), (1.0, 0.01)])
def test_normalisations_of_pixels_in_other_ranges(mean, std):
    """[0, 1] as it is, [-1, 1], 0..255."""
    assert Normalization((mean,), (std,)).mean == (mean,)


def test_the_registry():
    names = [architecture.name for architecture in architectures()]
    assert "small_vgg" in names
    with pytest.raises(CheckpointError, match="did you mean small_vgg"):
        get_architecture("smal_vgg")
    with pytest.raises(CheckpointError, match=r"FILE.py:CLASS, or the name of one in docs/converting\.md: .* resnet,"):
        get_architecture("nosuch")
    with pytest.raises(ValueError, match="twice"):
        register(get_architecture("small_vgg"))
