"""NaN and infinity: counted where they are stored, and never read as a class, a figure or a verdict."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import ibau_jax
from ibau_jax.auditing import audit
from ibau_jax.checkpoints import load, save
from ibau_jax.checkpoints.conversion import described_not_finite, not_finite
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.metrics import evaluate, predict
from ibau_jax.triggers import Attack
from tests.cli.commands import EXAMPLE


class Linear(nnx.Module):
    """Logits of the mean colour; where the first pixel's red is `spoilt`, what `value` says."""

    def __init__(self, spoilt=None, value=jnp.nan, weight=1.0):
        self.kernel = nnx.Param(weight * jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32))
        self.spoilt, self.value = spoilt, value

    def __call__(self, x):
        logits = x.reshape(len(x), -1) @ self.kernel[...]
        if self.spoilt is None:
            return logits
        return logits.at[:, 1].set(jnp.where(jnp.round(x[:, 0, 0, 0] * 255) == self.spoilt, self.value, logits[:, 1]))


def images_of(count=30):
    rng = np.random.default_rng(1)
    images = rng.integers(50, 200, (count, 2, 2, 3), dtype=np.uint8)
    return Dataset(images, rng.integers(0, 3, count), "some")


def spoilt_images(count=30):
    images = images_of(count)
    images.images[7, 0, 0, 0] = 255
    return images


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_image_of_many(value):
    images = spoilt_images()
    with pytest.raises(NotFiniteError, match="the logits of 1 of 30 images of some are not finite"):
        predict(Linear(255, value), images, batch_size=8)
    with pytest.raises(NotFiniteError, match="1 of 30"):
        evaluate(Linear(255, value), images)
    without = images.take(np.delete(np.arange(30), 7))
    logits = np.asarray(Linear()(jnp.asarray(without.images / np.float32(255))))
    np.testing.assert_array_equal(predict(Linear(255, value), without, batch_size=8), logits.argmax(axis=1))


def test_images_that_only_fill_a_batch_do_not_count():
    """They are black: a model may be anything there."""
    assert len(predict(Linear(0), images_of(30), batch_size=8)) == 30


def test_only_with_the_trigger():
    attack = Attack("test", lambda images: images.at[:, 0, 0].set(1.0), target_label=1)
    assert evaluate(Linear(255), images_of()).acc <= 1
    with pytest.raises(NotFiniteError, match="30 of 30 images of some with the trigger"):
        evaluate(Linear(255), images_of(), attack)


@pytest.mark.parametrize("where", ["weights", "one image", "only where a trigger leads"])
def test_no_verdict(where):
    model, images = {
        "weights": (Linear(weight=jnp.nan), images_of()),
        "one image": (Linear(255), spoilt_images()),
        "only where a trigger leads": (OverflowsWhereBright(), images_of()),
    }[where]
    with pytest.raises(NotFiniteError, match="no .*verdict can be had"):
        audit(model, images, AuditConfig(steps=8, batch_size=15))


class OverflowsWhereBright(Linear):
    """Infinite where a pixel is brighter than any of `images_of`."""

    def __call__(self, x):
        logits = super().__call__(x)
        return logits.at[:, 0].set(jnp.where(jnp.max(x, axis=(1, 2, 3)) > 0.8, -jnp.inf, logits[:, 0]))


def test_a_model_that_came_so_is_told_from_one_that_diverged():
    few = UnlearnConfig(n_rounds=1, batch_size=10, K=1)
    with pytest.raises(NotFiniteError, match="30 of 30 images"):
        ibau_jax.unlearn(Linear(weight=jnp.nan), images_of(), few)
    diverged = ibau_jax.unlearn(
        Linear(), images_of(), UnlearnConfig(n_rounds=1, batch_size=10, K=1, lr=1e38, optim="sgd")
    )
    assert (diverged.status, diverged.rounds) == ("diverged", ())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_counted_as_pytorch_counts(dtype):
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0, -2.0]).to(getattr(torch, dtype))
    expected = int((~torch.isfinite(values.float())).sum())
    numpy = np.asarray(values.float().numpy(), getattr(ml_dtypes, dtype, None) or dtype)
    tensors = {"a.weight": numpy, "a.running_mean": numpy, "a.running_var": numpy, "a.bias": numpy[[0, 4]]}
    counts = {"a.weight": expected, "a.running_mean": expected, "a.running_var": expected + 1}  # variances below 0 too
    assert not_finite(tensors) == counts
    assert not_finite({"num_batches_tracked": np.asarray(3), "running_var": np.zeros(3, numpy.dtype)}) == {}


def test_the_line_is_short_whatever_names_a_file_has():
    line = described_not_finite({f"{index}{'x' * 10**6}": 2 for index in range(50)})
    assert len(line) < 500
    assert line.endswith("and more in 47 others")


@pytest.mark.parametrize("folder", [False, True])
def test_a_checkpoint_names_its_tensors(tmp_path, folder):
    tree = torch.load(EXAMPLE, weights_only=True)
    tree["net"]["features.1.running_mean"][3] = float("nan")
    tree["net"]["features.1.running_var"][:2] = torch.tensor([-1.0, float("inf")])
    torch.save(tree, tmp_path / "broken.pth")
    checkpoint = load(tmp_path / "broken.pth")
    if folder:
        save(checkpoint, tmp_path / "flax")
        checkpoint = load(tmp_path / "flax")
    assert checkpoint.not_finite() == {"features.1.running_mean": 1, "features.1.running_var": 2}
    assert load(EXAMPLE).not_finite() == {}
    save(checkpoint, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["net"]
    assert all(again[name].numpy().tobytes() == value.numpy().tobytes() for name, value in tree["net"].items())


def test_a_round_after_which_other_images_can_t_be_evaluated_is_dropped():
    """As a round is whose loss is not finite; the last good one is the result."""

    def evaluated(state):
        if len(state.rounds) == 2:
            evaluate(Linear(255), spoilt_images())

    constants = {"batch_size": 10, "K": 1, "seed": 0}
    result = ibau_jax.unlearn(Linear(), images_of(), UnlearnConfig(n_rounds=3, **constants), on_round=evaluated)
    once = ibau_jax.unlearn(Linear(), images_of(), UnlearnConfig(n_rounds=1, **constants))
    assert (result.status, len(result.rounds)) == ("diverged", 1)
    np.testing.assert_array_equal(result.model.kernel[...], once.model.kernel[...])
