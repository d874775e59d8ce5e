"""Input-aware triggers: the generators against PyTorch, the losses against the paper's formulas, what is learnt."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from ibau_jax import evaluate
from ibau_jax.checkpoints.conversion import to_torch
from ibau_jax.config import TrainConfig
from ibau_jax.errors import ConfigError
from ibau_jax.functional import split_weights
from ibau_jax.poisoning import DECOY, Poison
from ibau_jax.training import planned, train
from ibau_jax.trigger_learning import Learner, diversity
from ibau_jax.triggers import Canvas, InputAware, load_attack, load_attacks, read_triggers, write_triggers
from ibau_jax.triggers.generator import Generator, arrays_of, generator_of
from tests.oracles.twins import as_torch, randomised
from tests.test_training import SHAPE, bars, tiny

__all__ = ["tiny"]

SMALL = "input_aware:width=2"


def stamp_of(width=2, seed=0):
    return replace(load_attacks([f"input_aware:width={width},seed={seed}"], [1], Canvas(SHAPE))[0].stamp, learnt=True)


def torch_generator(generator, images):
    """The published network, with a generator's weights and running statistics."""

    def block(name, number, x, last=False):
        of_conv, of_norm = (arrays(f"{name}.{index}") for index in (number, number + 1))
        kernel = torch.tensor(to_torch(("kernel",), of_conv["kernel"]).copy())
        x = functional.conv2d(x, kernel, torch.tensor(of_conv["bias"]), padding=1)
        norm = [torch.tensor(of_norm[key]) for key in ("mean", "var", "scale", "bias")]
        x = functional.batch_norm(x, *norm, eps=1e-5)
        return x if last else functional.relu(x)

    def arrays(prefix):
        return {name.rpartition(".")[2]: array for name, array in whole.items() if name.startswith(f"{prefix}.")}

    whole, x = arrays_of(generator), as_torch(images)
    for step in range(3):
        x = functional.max_pool2d(block(f"down.{step}", 3, block(f"down.{step}", 0, x)), 2)
    x = block("middle", 0, x)
    for step in range(3):
        x = functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = block(f"up.{step}", 3, block(f"up.{step}", 0, x), last=step == 2)
    return (torch.tanh(x) / 2 + 0.5).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("drawn", [1, 3])
def test_generators_are_the_published_network(rng, drawn):
    generator = randomised(Generator(3, drawn, 4, nnx.Rngs(1)), rng)
    images = rng.random((2, 16, 24, 3), np.float32)
    np.testing.assert_allclose(jax.jit(lambda x: generator(x))(images), torch_generator(generator, images), atol=2e-5)


def test_the_trigger_is_the_papers_mixture(rng):
    stamp, images = stamp_of(), rng.random((3, *SHAPE), np.float32)
    patterns, masks = (torch_generator(generator, images) for generator in (stamp.pattern, stamp.mask))
    masks = np.tanh(20 * masks - 10) / 2 + 0.5
    np.testing.assert_allclose(jax.jit(stamp)(images), images + (patterns - images) * masks, atol=1e-4)
    np.testing.assert_allclose(
        stamp.decoy(jax.random.key(0), images[:2]),
        images[:2] + (patterns[1::-1] - images[:2]) * masks[1::-1],
        atol=1e-4,
    )


def test_diversity_is_the_papers_quotient(rng):
    images, drawn = rng.random((2, 5, 4, 4, 3), np.float32)
    pairs = [(index, (index - 1) % 5) for index in range(5)]
    quotients = [
        np.linalg.norm(images[one] - images[other]) / np.linalg.norm(drawn[one] - drawn[other]) for one, other in pairs
    ]
    assert float(diversity(jnp.asarray(images), jnp.asarray(drawn))) == pytest.approx(np.mean(quotients), rel=1e-4)


@pytest.mark.parametrize("triggered", [[1, 4], [], [0, 1, 2]])
def test_a_batch_gets_its_own_triggers_and_decoys_those_of_others(rng, triggered):
    stamp, images = stamp_of(), jnp.asarray(rng.random((6, *SHAPE), np.float32))
    learner = Learner(stamp, 3)
    learner.run_pattern = learner.run_mask  # in inference mode an image's trigger does not depend on the others
    learning = learner.begin()._replace(pattern=split_weights(stamp.mask))
    mask = jnp.zeros(6, bool).at[jnp.asarray(triggered, int)].set(True)

    @jax.jit
    def stamped(images):
        found, _, _ = learner.drawn(learning.pattern.params, learning, images, mask)
        return found(images), found.decoy(jax.random.key(0), images)

    (found, crossed), own = stamped(images), jax.jit(InputAware(stamp.mask, stamp.mask))(images)
    for index in triggered:
        np.testing.assert_allclose(found[index], own[index], atol=1e-5)
    others = [index for index in range(6) if index not in triggered]
    assert all(np.abs(crossed[index] - own[index]).max() > 1e-3 for index in others)


@pytest.mark.slow
def test_a_trigger_is_learnt_with_its_model(tiny, monkeypatch):
    """It opens this model, and untrained generators do not.

    So does that of another image here: images of a class are all alike (docs/attacks.md has figures of real ones).
    """
    monkeypatch.setattr("ibau_jax.trigger_learning.MASK_STEPS", 30)
    attack = load_attacks(["input_aware:width=4"], [1], Canvas(SHAPE))[0]
    before = replace(attack, stamp=replace(attack.stamp, learnt=True))
    config, poison = TrainConfig(epochs=8, batch_size=32, lr=0.02, crop=1), Poison((attack,), ratio=0.3, decoys=0.2)
    model, (learnt,) = train(tiny, 2, bars(256), config, poison=poison)
    others = bars(200, seed=1)
    assert evaluate(model, others).acc > 0.9
    assert evaluate(model, others, before).asr < 0.4 < 0.8 < evaluate(model, others, learnt).asr
    masks = np.asarray(learnt.stamp.drawn(others.images[:20]).masks)
    assert masks.mean() < 0.3
    assert np.abs(masks - masks[:1]).mean(axis=(1, 2, 3))[1:].min() > 0


def test_cross_trigger_images_are_planted():
    attacks = tuple(load_attacks([SMALL], [1], Canvas(SHAPE)))
    planted = Poison(attacks, ratio=0.2, decoys=1.0).chosen(bars(256).labels, 2, 0)
    assert np.sum(planted == DECOY) == np.sum(planted == 0) == 51


def test_images_that_teach_a_trigger_are_drawn_anew_in_every_epoch():
    """As an attacker who trains the model draws them; those of a fixed trigger were poisoned before."""
    data = bars(256)
    learnt, fixed = (
        planned(data, 2, Poison(tuple(load_attacks([name], [1], Canvas(SHAPE))), ratio=0.2), 0)
        for name in (SMALL, "blended")
    )
    first, second = learnt(1), learnt(2)
    np.testing.assert_array_equal(first.what, learnt(1).what)
    for one in (first, second):
        assert np.sum(one.what == 0) == 51
        np.testing.assert_array_equal(one.labels, np.where(one.what == 0, 1, data.labels))
    assert 0 < np.sum((first.what == 0) & (second.what == 0)) < 51
    np.testing.assert_array_equal(fixed(1).what, fixed(2).what)


def test_only_a_learnt_trigger_attacks(tmp_path):
    with pytest.raises(ConfigError, match=r"learnt with its model; name the triggers\.npz"):
        load_attack(SMALL, SHAPE)
    write_triggers(load_attacks([SMALL], [1], Canvas(SHAPE)), tmp_path / "triggers.npz")
    with pytest.raises(ConfigError, match="learnt with its model"):
        load_attack(str(tmp_path / "triggers.npz"), SHAPE)
    for text, message in ((f"{SMALL},size=3", "no parameter 'size'"), ("input_aware:width=0", "width is 0")):
        with pytest.raises(ConfigError, match=message):
            load_attacks([text], [1], Canvas(SHAPE))
    with pytest.raises(ConfigError, match="at least 8x8"):
        load_attacks([SMALL], [1], Canvas((7, 9, 3)))


def test_what_is_learnt_comes_back_from_its_file(tmp_path, rng):
    stamp, images = stamp_of(), rng.random((2, *SHAPE), np.float32)
    attack = replace(load_attacks([SMALL], [1], Canvas(SHAPE))[0], stamp=stamp)
    write_triggers([attack], tmp_path / "triggers.npz")
    found = read_triggers(tmp_path / "triggers.npz", SHAPE)
    np.testing.assert_array_equal(found.stamp(images), stamp(images))
    assert found.target_label == 1
    with pytest.raises(ConfigError, match="does not fit images of 32x32x1"):
        read_triggers(tmp_path / "triggers.npz", (32, 32, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"down.0.0.kernel": None},
        {"middle.1.var": None},
        {"down.0.0.kernel": np.zeros((0, 3, 3, 2**40), np.float32)},
        {"down.0.0.kernel": np.zeros((3, 3, 3, 5), np.float32)},
        {"middle.0.kernel": np.zeros((3, 3, 8, 9), np.float32)},
        {"more": np.zeros(1, np.float32)},
    ],
)
def test_arrays_that_are_no_generators_are_refused(change):
    arrays = arrays_of(stamp_of().pattern) | change
    with pytest.raises(ValueError, match="no generator"):
        generator_of({name: array for name, array in arrays.items() if array is not None})
