"""What is done to training images, against what the papers say is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.errors import ConfigError, DataError
from ibau_jax.poisoning import CLEAN, DECOY, Poison
from ibau_jax.triggers import Canvas, load_attacks

SHAPE = (16, 16, 3)
LABELS = np.random.default_rng(0).integers(0, 5, 500)


def poison(specs, targets, **choices):
    return Poison(tuple(load_attacks(specs, targets, Canvas(SHAPE))), **choices)


@given(ratio=st.floats(0.01, 0.5), target=st.integers(0, 4), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_share_of_other_classes_becomes_the_target(ratio, target, seed):
    some = poison(["badnets"], [target], ratio=ratio)
    planted = some.chosen(LABELS, 5, seed)
    learnt = some.labels(LABELS, planted, 5)
    assert np.sum(planted == 0) == int(ratio * 500)
    assert target not in LABELS[planted == 0]
    assert (learnt[planted == 0] == target).all()
    assert (learnt[planted == CLEAN] == LABELS[planted == CLEAN]).all()


def test_all_to_all_shifts_labels_by_one():
    some = poison(["badnets_all2all"], [])
    planted = some.chosen(LABELS, 5, 0)
    assert np.sum(planted == 0) == 50
    assert (some.labels(LABELS, planted, 5)[planted == 0] == (LABELS[planted == 0] + 1) % 5).all()


def test_clean_label_poison_is_of_the_target_class_and_keeps_its_label():
    some = poison(["sig"], [2], ratio=0.08, clean_label=True)
    planted = some.chosen(LABELS, 5, 0)
    assert np.sum(planted == 0) == 40
    assert set(LABELS[planted == 0]) == {2}
    assert (some.labels(LABELS, planted, 5) == LABELS).all()


def test_several_attacks_share_the_poison():
    some = poison(["badnets", "sig"], [2, 4], ratio=0.2)
    planted = some.chosen(LABELS, 5, 0)
    learnt = some.labels(LABELS, planted, 5)
    assert [np.sum(planted == index) for index in (0, 1)] == [50, 50]
    assert [set(learnt[planted == index]) for index in (0, 1)] == [{2}, {4}]


def test_decoys_keep_their_labels():
    some = poison(["wanet"], [2], decoys=2.0)
    planted = some.chosen(LABELS, 5, 0)
    assert np.sum(planted == DECOY) == 2 * np.sum(planted == 0) == 100
    assert (some.labels(LABELS, planted, 5)[planted == DECOY] == LABELS[planted == DECOY]).all()
    assert DECOY not in poison(["badnets"], [2], decoys=2.0).chosen(LABELS, 5, 0)


def test_each_image_gets_what_is_planted_on_it():
    some = poison(["badnets", "wanet:s=5"], [2, 4])
    images = jnp.asarray(np.random.default_rng(0).random((4, *SHAPE), np.float32))
    planted = jnp.asarray([0, CLEAN, 1, DECOY - 1])
    found = some.stamped(jax.random.key(0), images, planted)
    first, second = (attack.stamp(images) for attack in some.attacks)
    np.testing.assert_array_equal(found[0], first[0])
    np.testing.assert_array_equal(found[1], images[1])
    np.testing.assert_array_equal(found[2], second[2])
    assert not np.allclose(found[3], images[3])
    assert not np.allclose(found[3], second[3])


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"ratio": 0.0}, ConfigError, "poison ratio is 0.0"),
        ({"ratio": 1.0}, ConfigError, "poison ratio is 1.0"),
        ({"decoys": -1.0}, ConfigError, "decoys is -1.0"),
        ({"ratio": 0.9}, DataError, "450 images are to be poisoned, of"),
        ({"ratio": 0.001}, DataError, "0 images are to be poisoned"),
        ({"ratio": 0.5, "clean_label": True}, DataError, "250 images are to be poisoned, of"),
    ],
)
def test_shares_that_make_no_sense(choices, error, message):
    with pytest.raises(error, match=message):
        poison(["badnets"], [2], **choices).chosen(LABELS, 5, 0)


def test_all_to_all_is_no_clean_label_attack():
    with pytest.raises(ConfigError, match="all-to-all"):
        poison(["badnets_all2all"], [], clean_label=True)
