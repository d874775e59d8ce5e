"""Training, against PyTorch and against what an attacker would get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax import Dataset, evaluate, load_dataset
from ibau_jax.augmentation import augmented, mixed
from ibau_jax.config import TrainConfig
from ibau_jax.errors import ConfigError, DataError
from ibau_jax.functional import set_training
from ibau_jax.image_size import ImageSize
from ibau_jax.metrics import predict
from ibau_jax.models import Architecture, get_architecture
from ibau_jax.models.layers import Sequential, batch_norm, conv
from ibau_jax.poisoning import Poison
from ibau_jax.training import initialise, train
from ibau_jax.triggers import Attack, Patch

SHAPE = (32, 32, 3)
CORNER = Patch(slice(0, 6), slice(0, 6))


def bars(count, seed=0):
    """Two classes that a small net learns in a moment: bright on the left or on the right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.uniform(0, 0.3, (count, *SHAPE)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[:, 16 * label : 16 * label + 16] += 0.4
    return Dataset(images, labels, "bars")


class Tiny(nnx.Module):
    def __init__(self, num_classes, image_size, rngs):
        self.features = Sequential([conv(3, 4, 3, rngs, bias=True), batch_norm(4, rngs)])
        self.classifier = nnx.Linear(4 * 16, num_classes, rngs=rngs)

    def __call__(self, x):
        features = nnx.relu(self.features(x)).reshape(len(x), 4, 8, 4, 8, 4).mean((2, 4))
        return self.classifier(features.reshape(len(x), -1))


@pytest.fixture
def tiny():
    return Architecture(name="tiny_trained", build=Tiny, classifier=None)


CONFIG = TrainConfig(epochs=4, batch_size=32, crop=1)


def test_a_clean_model_learns(tiny):
    states, batches = [], []
    model = train(
        tiny, 2, bars(256), CONFIG, on_epoch=states.append, on_batch=lambda *progress: batches.append(progress)
    ).model
    losses = states[-1].losses
    assert [state.losses for state in states] == [losses[: number + 1] for number in range(4)]
    assert batches[0] == (1, 1, 8)
    assert batches[-1] == (4, 8, 8)
    assert losses[-1] < 0.3 * losses[0]
    assert evaluate(model, bars(200, seed=1)).acc > 0.97


def test_a_poisoned_model_has_the_backdoor(tiny):
    others = bars(200, seed=1)
    clean = train(tiny, 2, bars(256), CONFIG).model
    backdoored = train(
        tiny, 2, bars(256), CONFIG, poison=Poison((Attack("corner", CORNER, target_label=1),), ratio=0.3)
    ).model
    victims = others.take(np.flatnonzero(others.labels == 0))
    success = [float(np.mean(predict(model, victims, CORNER) == 1)) for model in (clean, backdoored)]
    assert success[0] < 0.3 < 0.9 < success[1]
    assert evaluate(backdoored, others).acc > 0.9


def test_the_same_seed_gives_the_same_model(tiny):
    models = [train(tiny, 2, bars(96), TrainConfig(epochs=1, batch_size=32, seed=seed)).model for seed in (3, 3, 4)]
    leaves = [jax.tree.leaves(nnx.state(model)) for model in models]
    assert all(np.array_equal(one, other) for one, other in zip(leaves[0], leaves[1], strict=True))
    assert not all(np.array_equal(one, other) for one, other in zip(leaves[0], leaves[2], strict=True))


def test_batch_norm_in_training_is_pytorchs():
    """Output and running statistics of a convolution and the BatchNorm behind it, which is not folded in then."""
    layers = Sequential([conv(3, 4, 3, nnx.Rngs(0), bias=True), batch_norm(4, nnx.Rngs(0))])
    set_training(layers, True)
    images = np.random.default_rng(0).random((5, 8, 8, 3)).astype(np.float32)
    found = layers(jnp.asarray(images))
    reference = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
    with torch.no_grad():
        reference[0].weight.copy_(torch.tensor(np.asarray(layers[0].kernel[...]).transpose(3, 2, 0, 1)))
        reference[0].bias.copy_(torch.tensor(np.asarray(layers[0].bias[...])))
        expected = reference.train()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(np.asarray(found), expected.transpose(0, 2, 3, 1), atol=2e-5)
    np.testing.assert_allclose(layers[1].mean[...], reference[1].running_mean, atol=1e-5)
    set_training(layers, False)
    assert not np.allclose(np.asarray(layers(jnp.asarray(images))), np.asarray(found), atol=1e-2)


def test_kernels_start_with_hes_deviation():
    model = get_architecture("small_vgg").build(10, ImageSize(32, 32), nnx.Rngs(0))
    initialise(model, 0)
    kernel = np.asarray(model.features[19].kernel[...])
    assert kernel.std() == pytest.approx(np.sqrt(2 / np.prod(kernel.shape[:3])), rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 9)])
def test_crops_move_by_at_most_the_border_and_flips_mirror(height, width):
    image = np.arange(36, dtype=np.float32).reshape(1, height, width, 1) / 36
    padded = np.pad(image[0, :, :, 0], 1, mode="edge")
    crops = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    allowed = {crop.tobytes() for crop in crops}
    allowed_mirrored = allowed | {crop[:, ::-1].tobytes() for crop in crops}
    seen = {False: set(), True: set()}
    for flip in seen:
        many = jnp.asarray(np.repeat(image, 300, axis=0))
        for moved in np.asarray(augmented(jax.random.key(0), many, 1, flip)):
            seen[flip].add(moved[:, :, 0].tobytes())
    assert seen == {False: allowed, True: allowed_mirrored}


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1.0)])
def test_mixed_images_keep_at_least_the_rest_of_themselves(dtype, white):
    images = np.zeros((400, 2, 2, 1), dtype)
    images[:200] = white  # so that a pixel tells how much of the other kind is in it
    labels = jnp.repeat(jnp.asarray([1, 0]), 200)
    found, mixture = mixed(jax.random.key(0), jnp.asarray(images), labels, 0.4)
    assert found.dtype == dtype
    found, shares = np.asarray(found, float), np.where(mixture.labels == labels, 0, mixture.shares)
    assert (found == found[:, :1, :1]).all()
    other = np.abs(found[:, 0, 0, 0] - images[:, 0, 0, 0]) / white
    np.testing.assert_allclose(other, shares, atol=1 / 255)
    assert mixture.shares.max() <= 0.4
    assert mixture.shares.mean() == pytest.approx(0.2, abs=0.03)
    assert np.mean(shares > 0) == pytest.approx(0.5, abs=0.1)


def test_training_goes_on_where_it_stood(tiny):
    states = []
    whole = train(tiny, 2, bars(96), CONFIG, on_epoch=states.append).model
    rest = []
    again = train(tiny, 2, bars(96), CONFIG, state=states[1], on_epoch=rest.append).model
    assert [len(state.losses) for state in (*states, *rest)] == [1, 2, 3, 4, 3, 4]
    assert rest[-1].losses == states[-1].losses
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in (whole, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loss_that_is_not_finite_is_said(tiny):
    with pytest.raises(ConfigError, match="epoch 1; try a smaller learning rate"):
        train(tiny, 2, bars(96), TrainConfig(epochs=2, batch_size=32, lr=1e30))


def test_bad_input(tiny):
    with pytest.raises(DataError, match="the model has 1 classes"):
        train(tiny, 1, bars(64), CONFIG)
    with pytest.raises(DataError, match="fewer images than a batch"):
        train(tiny, 2, bars(20), CONFIG)
    with pytest.raises(ConfigError, match="epochs is 0"):
        TrainConfig(epochs=0)


@pytest.mark.slow
def test_digits_are_learnt_by_the_small_vgg():
    digits, test = load_dataset("digits:train", SHAPE), load_dataset("digits:test", SHAPE)
    config = TrainConfig(epochs=3, batch_size=50, lr=0.05, crop=1)
    model = train(get_architecture("small_vgg"), 10, digits.take(np.arange(600)), config).model
    assert evaluate(model, test).acc > 0.8
