"""Models that unlearn together: as one by one, whatever happens to one of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ibau_jax.config import UnlearnConfig
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.models.layers import Activation, Flatten, MaxPool, Sequential, batch_norm, conv, elu, linear
from ibau_jax.unlearning import Member, unlearn, unlearn_many
from tests.oracles.twins import randomised
from tests.unlearning.test_loop import BATCH, Tiny, tiny_data, vgg_data

CONFIG = UnlearnConfig(n_rounds=2, batch_size=BATCH, inner_lr=1.0)


class Matrix(nnx.Module):
    """Its layers do not say how many classes it has."""

    def __init__(self, images, classes):
        self.kernel = nnx.Param(jnp.zeros((images.images[0].size, classes)))

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.kernel[...]


def tiny_members(rng, count=3):
    """Models, seeds, learning rates and clean sets all differ."""
    return [
        Member(Tiny(nnx.Rngs(index)), tiny_data(rng), replace(CONFIG, seed=index, lr=1e-3 * (index + 1)))
        for index in range(count)
    ]


def weights(result):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(result.model, nnx.Param))])


def assert_alike(results, others, tolerance):
    for one, other in zip(results, others, strict=True):
        assert one.status == other.status
        assert np.linalg.norm(weights(one) - weights(other)) <= tolerance * np.linalg.norm(weights(other))
        for a, b in zip(one.rounds, other.rounds, strict=True):
            assert (a.number, a.outer_loss) == (b.number, pytest.approx(b.outer_loss, rel=1e-4))
            assert a.perturbation_norm == pytest.approx(b.perturbation_norm, rel=1e-4)


@pytest.mark.parametrize("execution", [Execution(), Execution(loop="scan")], ids=["python", "scan"])
def test_together_as_one_by_one(rng, execution):
    members = tiny_members(rng)
    alone = [unlearn(member.model, member.clean_set, member.config) for member in members]
    together = unlearn_many(members, execution=execution, together=True)
    assert_alike(together, alone, 1e-4)
    assert np.linalg.norm(weights(alone[0]) - weights(alone[1])) > 0.1  # members are not all the same
    assert_alike(unlearn_many(members, execution=execution, together=False), alone, 1e-6)


def small_net(seed):
    """A small VGG's first layers, which compile in seconds."""
    rngs = nnx.Rngs(seed)
    features = [
        conv(3, 32, 3, rngs, bias=True),
        batch_norm(32, rngs),
        Activation(elu),
        conv(32, 32, 3, rngs),
        MaxPool(4),
    ]
    return Sequential([*features, Flatten(), linear(32 * 8 * 8, 10, rngs)])


@pytest.mark.slow
def test_convolutional_nets_together_as_one_by_one(rng):
    """Convolutions of several models at once are other operations (grouped ones) than those of one."""
    config = replace(CONFIG, n_rounds=1, K=2, inner_lr=0.1)
    members = [
        Member(randomised(small_net(seed), rng), vgg_data(rng, 8), replace(config, seed=seed)) for seed in range(2)
    ]
    assert_alike(unlearn_many(members, together=True), unlearn_many(members, together=False), 1e-4)


@pytest.mark.parametrize("together", [True, False])
def test_a_member_that_diverges_does_not_disturb_the_others(rng, together):
    members = tiny_members(rng)
    members[0] = replace(members[0], config=replace(members[0].config, lr=1e38))
    rounds = []
    results = unlearn_many(members, together=together, on_round=lambda index, state: rounds.append(index))
    assert [result.status for result in results] == ["diverged", "completed", "completed"]
    assert results[0].rounds == ()
    np.testing.assert_array_equal(weights(results[0]), weights(members[0]))
    assert sorted(rounds) == [1, 1, 2, 2]
    assert_alike(results[1:], unlearn_many(members[1:], together=together), 1e-5)


def test_a_learning_rate_sweep_compiles_once(rng):
    members = [replace(member, config=replace(member.config, seed=0)) for member in tiny_members(rng)]
    results = unlearn_many(members, together=False)
    assert results[0].compile_seconds > 0
    assert [result.compile_seconds for result in results[1:]] == [0.0, 0.0]


def test_members_go_on_from_their_states(rng):
    members, states = tiny_members(rng), {}
    whole = unlearn_many(members, together=True, on_round=lambda index, state: states.setdefault(index, state))
    assert all(len(state.rounds) == 1 for state in states.values())
    resumed = [replace(member, state=states[index]) for index, member in enumerate(members)]
    assert_alike(unlearn_many(resumed, together=True), whole, 0.0)


def test_members_that_do_not_fit_together_are_refused(rng):
    member = tiny_members(rng, 1)[0]
    other_size = replace(member, clean_set=tiny_data(rng, 7))
    other_constants = replace(member, config=replace(CONFIG, K=2))
    one, wider = (replace(member, model=Matrix(member.clean_set, classes)) for classes in (10, 11))
    for pair in ((member, other_size), (member, other_constants), (one, wider)):
        with pytest.raises(ConfigError, match="one architecture"):
            unlearn_many(pair)
