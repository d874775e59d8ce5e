"""The relearning check: what is learnt, by whom, and against PyTorch's SGD."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax.config import RelearnConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.metrics import evaluate
from ibau_jax.relearning import relearn, tempting_set
from ibau_jax.triggers import Attack, Patch

CORNER = Attack("corner", Patch(slice(3, 4), slice(3, 4)), target_label=1)
ALL = Attack("all", Patch(slice(3, 4), slice(3, 4)), all_to_all=True)
CONFIG = RelearnConfig(triggered=6, epochs=3, batch_size=64, lr=0.1)


class Linear(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(16, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


def data(rng, count=40):
    return Dataset(rng.integers(0, 200, (count, 4, 4, 1), np.uint8), rng.integers(0, 2, count))


def test_the_clean_set_and_a_few_triggered_images_of_other_classes(rng):
    clean = data(rng)
    found = tempting_set(clean, CORNER, 3, CONFIG)
    assert len(found) == 46
    np.testing.assert_allclose(found.images[:40], clean.images / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(found.labels, [*clean.labels, *[1] * 6])
    assert (found.images[40:, 3, 3] == 1).all()
    sources = {image[:3].tobytes() for image in found.images[:40][clean.labels == 0]}
    assert {image[:3].tobytes() for image in found.images[40:]} <= sources
    every = tempting_set(clean, ALL, 3, CONFIG)
    assert set(every.labels[40:]) <= {1, 2}


def test_what_can_not_be_learnt_is_refused(rng):
    clean = data(rng)
    with pytest.raises(ConfigError, match="choose 1 to"):
        tempting_set(clean, CORNER, 3, replace(CONFIG, triggered=41))
    with pytest.raises(ConfigError, match="folder"):
        tempting_set(clean, Attack("folder:x", None, triggered=clean, target_label=1), 3, CONFIG)
    with pytest.raises(ConfigError, match="triggered is 0"):
        RelearnConfig(triggered=0)


def test_steps_are_pytorchs_sgd(rng):
    """One batch an epoch, so that the order of images does not matter."""
    clean, model, seen = data(rng), Linear(), []
    tempting = tempting_set(clean, CORNER, 3, CONFIG)

    def look(model):
        seen.append(np.asarray(model.layer.kernel[...]))
        return evaluate(model, clean, CORNER, 1)

    found = relearn({"x": model}, tempting, look, CONFIG)["x"]
    weight = torch.tensor(np.asarray(model.layer.kernel[...]), requires_grad=True)
    bias = torch.tensor(np.asarray(model.layer.bias[...]), requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, nesterov=True)
    images, labels = torch.tensor(tempting.images.reshape(46, -1)), torch.tensor(tempting.labels)
    for kernel in seen:
        np.testing.assert_allclose(kernel, weight.detach().numpy(), atol=1e-5)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(images @ weight + bias, labels).backward()
        optimizer.step()
    assert len(seen) == len(found.figures) == 4
    assert np.abs(seen[-1] - seen[0]).max() > 0.01


def test_models_learn_alone_and_alike(rng):
    clean = data(rng)
    tempting = tempting_set(clean, CORNER, 3, CONFIG)
    done = []
    found = relearn(
        {"one": Linear(), "same": Linear()},
        tempting,
        lambda model: evaluate(model, clean, CORNER, 1),
        replace(CONFIG, batch_size=10),
        on_epoch=lambda name, epoch: done.append((name, epoch)),
    )
    assert found["one"] == found["same"]
    assert found["one"].asr == [metrics.asr for metrics in found["one"].figures]
    assert done == [(name, epoch) for name in ("one", "same") for epoch in (1, 2, 3)]
    assert jnp.isfinite(jnp.asarray(found["one"].asr)).all()
