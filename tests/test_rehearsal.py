"""Cross-fitting: parts, pooled figures, and rehearsals against runs that this test makes and counts itself."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.data import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.member import initial_state
from ibau_jax.minimax import unlearn
from ibau_jax.presets import PRESETS
from ibau_jax.rehearsal import folds_of, pooled
from ibau_jax.result import Standing
from tests.test_minimax import Tiny, tiny_data

CONFIG = replace(
    PRESETS["robust-few"],
    n_rounds=2,
    batch_size=10,
    min_batches=3,
    perturbations=2,
    targeted=True,
    sure_ratios=None,
    max_acc_drop=1.0,
    closed=0.0,
    more_rounds=0,
    hidden_rounds=0,
)


@given(count=st.integers(2, 60), parts=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_part_is_apart_from_its_rest(count, parts, seed):
    images = Dataset(np.zeros((count, 1, 1, 1), np.uint8), np.arange(count))
    if count < parts:
        with pytest.raises(ConfigError, match=f"--folds {parts} needs at least"):
            folds_of(images, parts, seed)
        return
    folds = folds_of(images, parts, seed)
    measured = np.concatenate([part.labels for _, part in folds])
    assert len(measured) == len(set(measured)) == parts * (count // parts)
    for rest, part in folds:
        assert sorted([*rest.labels, *part.labels]) == list(range(count))


def test_pooled_figures_are_those_of_all_images():
    found = pooled([Standing(0.5, 0.2, 10), Standing(0.8, 0.0, 30)])
    np.testing.assert_allclose((found.acc, found.residual, found.images), (29 / 40, 2 / 40, 40))


def right(model, images):
    return int((np.asarray(model(images.images.astype(np.float32) / 255)).argmax(1) == images.labels).sum())


@pytest.mark.slow
def test_rehearsals_count_what_runs_without_a_part_say_of_it(rng):
    model, data, states, phases = Tiny(nnx.Rngs(0)), tiny_data(rng, 31), [], []
    unlearn(model, data, CONFIG, on_round=states.append, on_batch=lambda *progress: phases.append(progress))
    begun = replace(states[0], model=model, rounds=(), rehearsed=(), initial=None, best=None)
    begun = replace(begun, optimizer_state=initial_state(model, CONFIG).optimizer_state)
    counts = np.zeros(2)
    for rest, part in folds_of(data, 3, CONFIG.seed):
        models = []
        alone = replace(CONFIG, folds=1)
        unlearn(model, rest, alone, state=begun, on_round=lambda state, models=models: models.append(state.model))
        counts += [right(after, part) for after in models]
    standings = [done.standing for done in states[-1].rounds]
    np.testing.assert_allclose([standing.acc for standing in standings], counts / 30)
    assert [standing.images for standing in standings] == [30, 30]
    assert states[0].initial.acc == pytest.approx(right(model, data) / 31)
    rehearsed = [progress for progress in phases if progress[0] == "rehearsal"]
    assert rehearsed[-1][2] == rehearsed[-1][3] == len(rehearsed)


@pytest.mark.slow
def test_going_on_rehearses_no_more(rng):
    model, data, states, phases = Tiny(nnx.Rngs(0)), tiny_data(rng, 30), [], []
    whole = unlearn(model, data, CONFIG, on_round=states.append)
    rest = unlearn(model, data, CONFIG, state=states[0], on_batch=lambda *progress: phases.append(progress[0]))
    assert set(phases) == {"inner", "outer"}
    assert [done.standing for done in rest.rounds] == [done.standing for done in whole.rounds]


def weights_of(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.mark.slow
def test_rounds_added_while_the_short_cut_is_open_are_those_of_a_longer_run(rng):
    model, data, states = Tiny(nnx.Rngs(0)), tiny_data(rng, 30), []
    phases: dict[str, list[str]] = {"planned": [], "added": []}

    def note(run):
        return lambda phase, *_: phases[run].append(phase)

    planned = unlearn(model, data, replace(CONFIG, n_rounds=3), on_batch=note("planned"))
    assert planned.rounds[1].standing.residual > 0.0
    longer = replace(CONFIG, n_rounds=1, more_rounds=2, left_open=0.0, more_min_ratio=0.5)
    found = unlearn(model, data, longer, on_round=states.append, on_batch=note("added"))
    assert [done.standing for done in found.rounds] == [done.standing for done in planned.rounds]
    assert found.kept_round == planned.kept_round
    np.testing.assert_equal(weights_of(found.model), weights_of(planned.model))
    assert sorted(phases["added"]) == sorted(phases["planned"])  # nothing is rehearsed twice

    resumed = unlearn(model, data, longer, state=states[1])
    assert [done.standing for done in resumed.rounds] == [done.standing for done in planned.rounds]
    np.testing.assert_equal(weights_of(resumed.model), weights_of(planned.model))


def test_no_round_is_added_where_none_is_called_for(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng, 30)
    closed = replace(CONFIG, n_rounds=1, more_rounds=2, left_open=1.0, more_min_ratio=0.5)
    assert len(unlearn(model, data, closed).rounds) == 1
    assert len(unlearn(model, data, replace(closed, left_open=0.0, more_min_ratio=1e6)).rounds) == 1
    assert len(unlearn(model, data, replace(closed, left_open=0.0, more_rounds=1)).rounds) == 2


@pytest.mark.slow
def test_a_round_that_is_taken_back_is_the_last(rng):
    """What rehearsals say of a second round is of one after it."""
    labels = np.arange(40) % 2
    images = np.full((40, 4, 4, 3), 40, np.uint8)
    images[labels == 1] = 200
    model = Tiny(nnx.Rngs(0))
    learnt = unlearn(model, Dataset(images, labels), replace(PRESETS["cifar10"], inner_lr=1e-6, n_rounds=40, lr=0.01))
    assert right(learnt.model, Dataset(images, labels)) == 40
    found = unlearn(learnt.model, Dataset(images, labels), replace(CONFIG, lr=30.0, max_acc_drop=0.05))
    assert [done.undone for done in found.rounds] == [True]
    assert found.kept_round == 0


@pytest.mark.slow
def test_what_costs_too_much_is_done_slower(rng):
    """A quarter of the rate is what a run of that rate does; rehearsals that still cost too much change nothing."""
    labels = np.arange(40) % 2
    images = np.full((40, 4, 4, 3), 40, np.uint8)
    images[labels == 1] = 200
    data, steep = Dataset(images, labels), replace(CONFIG, n_rounds=1, lr=30.0, max_acc_drop=0.05)
    model = unlearn(Tiny(nnx.Rngs(0)), data, replace(PRESETS["cifar10"], inner_lr=1e-6, n_rounds=40, lr=0.01)).model
    assert unlearn(model, data, replace(steep, slower=0)).kept_round == 0
    states = []
    found = unlearn(model, data, replace(steep, slower=6), on_round=states.append)
    assert found.kept_round == 1
    assert states[0].pace < 1
    planned = unlearn(model, data, replace(steep, lr=30.0 * states[0].pace, slower=0))
    np.testing.assert_allclose(weights_of(found.model)[0], weights_of(planned.model)[0], rtol=1e-6)
    before = unlearn(model, data, replace(steep, lr=120.0 * states[0].pace, slower=0))
    assert [done.undone for done in before.rounds] == [True]


def test_images_are_held_out_or_rehearse():
    with pytest.raises(ConfigError, match="held_out and folds"):
        replace(CONFIG, held_out=0.1)
