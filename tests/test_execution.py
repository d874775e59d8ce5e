"""Parts of a batch, recomputation, precision: the same result, other memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.batches import filled_size, in_parts, make_batches
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.image_size import ImageSize
from ibau_jax.models.small_vgg import SmallVGG
from ibau_jax.unlearning import initial_state, unlearn
from ibau_jax.unlearning.loop import compile_round
from ibau_jax.unlearning.stack import Stack
from tests.oracles.twins import randomised
from tests.unlearning.test_loop import Tiny, tiny_data, vgg_data
from tests.unlearning.test_stack import CONFIG, assert_alike, small_net

SPARING = [Execution(microbatch=4), Execution(microbatch=4, loop="scan"), Execution(remat=True)]


@pytest.mark.parametrize("execution", SPARING, ids=str)
def test_sparing_memory_changes_nothing(rng, execution):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    config = replace(CONFIG, portion=0.3)
    plain = unlearn(model, data, config)
    assert_alike([unlearn(model, data, config, execution=execution)], [plain], 1e-5)


@pytest.mark.slow
def test_parts_of_a_convolutional_nets_batch(rng):
    model, data = randomised(small_net(0), rng), vgg_data(rng, 8)
    config = replace(CONFIG, n_rounds=1, K=2, inner_lr=0.1)
    plain = unlearn(model, data, config)
    assert_alike([unlearn(model, data, config, execution=Execution(microbatch=3))], [plain], 1e-5)


def temporary_bytes(execution):
    """What the compiled outer step needs beside its arguments."""
    rng = np.random.default_rng(0)
    model, data = SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), vgg_data(rng, 40)
    config = replace(CONFIG, batch_size=40, K=2)
    stack = Stack([initial_state(model, config)], [data], [config], execution)
    return compile_round(stack).outer.call.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_parts_and_recomputation_need_less_memory():
    """XLA:CPU gains from recomputation only where there is much of it; scanned parts are what accelerators do."""
    whole = temporary_bytes(Execution())
    assert temporary_bytes(Execution(remat=True)) < 0.85 * whole
    assert temporary_bytes(Execution(microbatch=10, loop="scan")) < 0.5 * whole


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    plain = unlearn(model, data, CONFIG)
    half = unlearn(model, data, CONFIG, execution=Execution(precision="bfloat16"))
    for leaf in jax.tree.leaves(nnx.state(half.model, nnx.Param)):
        assert leaf.dtype == jnp.float32
    difference = abs(half.rounds[0].outer_loss / plain.rounds[0].outer_loss - 1)
    assert 1e-6 < difference < 2e-2  # bfloat16 has eight bits


def test_tf32_is_float32_where_there_is_none(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    results = [unlearn(model, data, CONFIG, execution=Execution(precision=p)) for p in ("float32", "tf32")]
    assert_alike(results[:1], results[1:], 1e-6)


@pytest.mark.parametrize("wrong", [{"precision": "float64"}, {"microbatch": 0}, {"devices": 0}], ids=str)
def test_choices_that_make_no_sense(wrong):
    with pytest.raises(ConfigError):
        Execution(**wrong)


def test_more_devices_than_there_are(rng):
    with pytest.raises(ConfigError, match="--devices 4096"):
        unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng), CONFIG, execution=Execution(devices=4096))


@given(size=st.integers(1, 200), microbatch=st.none() | st.integers(1, 64), spread=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_batches_are_filled_up_to_equal_parts(size, microbatch, spread):
    effective = microbatch and -(-microbatch // spread) * spread
    filled = filled_size(size, effective, spread)
    parts = 1 if effective is None else -(-filled // effective)
    assert filled >= size
    assert filled % (parts * spread) == 0
    assert filled - size < parts * spread  # no more filling than equal parts need
    assert effective is None or filled // parts <= effective


def test_parts_hold_every_image_once(rng):
    array = np.arange(12)
    assert sorted(np.ravel(in_parts(array, 3))) == list(range(12))
    batches = make_batches(vgg_data(rng, 25), 10, filled=12)
    assert batches.images.shape == (3, 12, 32, 32, 3)
    assert batches.weights.sum(1).tolist() == [10, 10, 5]
