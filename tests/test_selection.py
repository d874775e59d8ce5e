"""Which rounds are kept: those that images which do not unlearn find accurate, with the short cut closed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax.aims import Suspects
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.member import Member, initial_state
from ibau_jax.metrics import predict
from ibau_jax.minimax import unlearn, unlearn_many
from ibau_jax.result import Round, Standing
from ibau_jax.selection import ENLARGED, follow, hold_out, is_over, judge, measure
from tests.test_minimax import Tiny, tiny_data

CONFIG = UnlearnConfig(n_rounds=3, batch_size=10, K=1, inner_lr=0.1, held_out=0.25)


class Brightness(nnx.Module):
    """Class 1 where the first pixel is brighter than one half; class 2 where the last one is above 0.9."""

    def __call__(self, x):
        first = 10 * (x[:, 0, 0, 0] - 0.5)
        return jnp.stack([-first, first, 1000 * (x[:, -1, -1, 0] - 0.9)], axis=1)


def brightness_data(rng, wrong=0):
    labels = np.arange(40) % 2
    images = np.full((40, 4, 4, 1), 0.2, np.float32)
    images[labels == 1, 0, 0] = 0.8
    labels[:wrong] = 1 - labels[:wrong]
    return Dataset(images, labels)


def suspects(value):
    delta = np.zeros((1, 4, 4, 1), np.float32)
    delta[0, -1, -1] = value / ENLARGED
    return Suspects.of_search(np.asarray([2], np.int32), np.full(3, value, np.float32), delta)


@pytest.mark.parametrize(("value", "share"), [(0.75, 1.0), (0.65, 0.0)])
def test_standing_counts_right_answers_and_who_follows_the_enlarged_perturbation(rng, value, share):
    data = brightness_data(rng, wrong=10)
    found = measure(Brightness(), data.take(np.arange(30)), data.take(np.arange(30, 40)), suspects(value))
    assert found == Standing(2 / 3, share, 30)
    assert found.score == 2 / 3 - share


def test_images_of_the_class_itself_do_not_follow(rng):
    data, zero = brightness_data(rng, wrong=10), np.zeros((4, 4, 1), np.float32)
    assert follow(Brightness(), data.take(np.flatnonzero(data.labels == 1)), np.zeros(20), 1, zero) == 0.0
    assert follow(Brightness(), data, np.zeros(40), 1, zero) == 0.25  # those that are wrong anyway, taken for moved
    assert follow(Brightness(), data, predict(Brightness(), data), 1, zero) == 0.0


@given(size=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_images_that_measure_do_not_unlearn(size, share, seed):
    images = np.arange(size, dtype=np.float32).reshape(size, 1, 1, 1) / size
    config = UnlearnConfig(held_out=share, seed=seed)
    count = round(share * size)
    if not 0 < count < size:
        with pytest.raises(ConfigError, match="held_out"):
            hold_out(Dataset(images, np.zeros(size, np.int64)), config)
        return
    unlearns, measures = hold_out(Dataset(images, np.zeros(size, np.int64)), config)
    assert len(measures) == count
    assert sorted(np.concatenate([unlearns.images, measures.images]).ravel()) == list(images.ravel())


def test_a_round_that_costs_accuracy_is_taken_back(rng):
    """Nothing may be lost, and a huge learning rate loses much: the model stays as it came."""
    data, states = tiny_data(rng, 40), []
    model = Tiny(nnx.Rngs(0))
    labels = np.asarray(jnp.argmax(model(jnp.asarray(data.images, jnp.float32) / 255), axis=1))  # all right at first
    data = Dataset(data.images, labels.astype(np.int64))
    config = replace(CONFIG, lr=3.0, max_acc_drop=0.0)
    result = unlearn(model, data, config, on_round=states.append)
    assert result.kept_round == 0
    assert [done.undone for done in result.rounds] == [True] * 3
    assert result.rounds[0].standing.acc < states[0].initial.acc == 1.0
    for a, b in zip(jax.tree.leaves(nnx.state(result.model)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)
    free = unlearn(model, data, replace(config, max_acc_drop=1.0))
    assert not any(done.undone for done in free.rounds)


def test_one_members_undone_round_does_not_disturb_another(rng):
    members = [
        Member(Tiny(nnx.Rngs(index)), tiny_data(rng, 40), replace(CONFIG, lr=lr, max_acc_drop=0.1))
        for index, lr in enumerate([3.0, 1e-4])
    ]
    alone = [unlearn(member.model, member.clean_set, member.config) for member in members]
    for together in (True, False):
        both = unlearn_many(members, together=together)
        for one, other in zip(both, alone, strict=True):
            assert [done.undone for done in one.rounds] == [done.undone for done in other.rounds]
            assert one.kept_round == other.kept_round


def kept(accuracies, images=10000, found_after=0):
    """The kept round of rounds with these accuracies; None is one that is undone. Suspects were found after some."""
    state, model = initial_state(Tiny(nnx.Rngs(0)), CONFIG), {}
    state = replace(state, suspects=replace(suspects(1.0), found_after=np.asarray([found_after])))
    for number, acc in enumerate(accuracies, 1):
        standing = Standing(acc or 0.0, 0.0, images)
        done = Round(number, np.zeros((1, 4, 4, 3)), 0.0, 0.0, 0.0, 0.0, standing, undone=acc is None)
        model[number] = Tiny(nnx.Rngs(number))
        state = state.undone(done) if done.undone else state.after(done, model[number], None)
    if state.kept_round:
        assert state.kept is model[state.kept_round]
    return state.kept_round


def test_the_last_round_within_a_standard_error_of_the_best_is_kept():
    assert kept([0.5, 0.7, 0.7, 0.6]) == 3
    assert kept([None, 0.4, None]) == 2
    assert kept([None, None]) == 0
    assert kept([0.9, 0.8], images=9) == 2  # a standard error is 0.1 there
    assert kept([0.9, 0.8], images=8) == 2
    assert kept([0.9, 0.79], images=9) == 1


def test_rounds_before_a_search_do_not_compare_with_those_after_it():
    assert kept([0.9, 0.8, 0.5], found_after=2) == 3
    assert kept([0.9, 0.8, 0.5, 0.7], found_after=2) == 4
    assert kept([0.9, 0.8, None], found_after=2) == 1


def test_few_images_take_back_only_what_chance_can_not_explain(rng):
    """Drops of 0.075 and 0.2, where 0.05 is allowed."""
    before = initial_state(Brightness(), CONFIG)
    for wrong, undone in ((5, False), (10, True)):  # 0.875 and 0.75, two standard errors 0.10 and 0.14
        held_out = brightness_data(rng, wrong=wrong)
        state = replace(before, initial=Standing(0.95, 0.0, 40), suspects=suspects(0.0))
        done = Round(1, np.zeros((1, 4, 4, 1)), 0.0, 0.0, 0.0, 0.0)
        found = judge(state, done, Brightness(), held_out, held_out, CONFIG)
        assert found.standing.acc == 1 - wrong / 40
        assert found.undone == undone


def test_a_round_after_another_search_compares_with_the_one_before_it(rng):
    """0.75 is more than two standard errors, 0.14, below 0.95, and not below 0.85; a round that was undone is no round."""
    measured, done = brightness_data(rng, wrong=10), Round(1, np.zeros((1, 4, 4, 1)), 0.0, 0.0, 0.0, 0.0)
    first = replace(done, standing=Standing(0.85, 0.0, 40))
    state = replace(initial_state(Brightness(), CONFIG), initial=Standing(0.95, 0.0, 40), rounds=(first,))
    for found_after, rounds, undone in (
        (0, (first,), True),
        (1, (first,), False),
        (2, (first, replace(done, number=2, undone=True, standing=Standing(0.1, 0.0, 40))), False),
    ):
        suspected = suspects(0.0).and_more(replace(suspects(0.75), found_after=np.asarray([found_after])))
        suspected = suspected if found_after else suspects(0.0)
        after = replace(state, suspects=suspected, rounds=rounds)
        last = replace(done, number=len(rounds) + 1)
        found = judge(after, last, Brightness(), measured, measured, CONFIG)
        assert found.undone == undone
        assert found.standing.residual == measure(Brightness(), measured, measured, suspects(0.0)).residual < 1.0


def test_it_stops_when_the_short_cut_is_closed(rng):
    """Any residue will do: the first round is the last, of several members as of one, and going on changes nothing."""
    config, states = replace(CONFIG, closed=1.0, max_acc_drop=1.0), []
    members = [Member(Tiny(nnx.Rngs(index)), tiny_data(rng, 40), config) for index in range(2)]
    alone = unlearn(members[0].model, members[0].clean_set, config, on_round=states.append)
    assert len(alone.rounds) == alone.kept_round == 1
    assert [len(found.rounds) for found in unlearn_many(members, together=True)] == [1, 1]
    again = unlearn(members[0].model, members[0].clean_set, config, state=states[0], on_round=states.append)
    assert len(states) == len(again.rounds) == 1
    assert not is_over(states[0], replace(config, min_rounds=2))
    assert not is_over(states[0], replace(config, closed=0.0)) or states[0].rounds[0].standing.residual == 0.0
    undone = replace(states[0], rounds=(replace(states[0].rounds[0], undone=True),))
    assert not is_over(undone, config)
