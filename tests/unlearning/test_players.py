"""Players in the minimax: the hypergradient against PyTorch, who is drawn, what images get, whole small runs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.auditing import Auditor
from ibau_jax.auditing.judgement import median_size
from ibau_jax.batches import assigned_images, make_batches
from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import make_apply, split_weights
from ibau_jax.image_size import ImageSize
from ibau_jax.models.small_vgg import SmallVGG
from ibau_jax.perturbations import SPACES
from ibau_jax.perturbations.player import Player
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning import Member, initial_state, unlearn, unlearn_many
from ibau_jax.unlearning.hypergradient import hypergradient, neumann
from ibau_jax.unlearning.outer import Deltas, OuterBatch, outer_loss
from ibau_jax.unlearning.players import Drawn, Stamps, aiming_loss, deal, like_players, take_turn
from ibau_jax.unlearning.stack import Stack, learning_rates
from tests.oracles import torch_ibau
from tests.oracles.twins import as_torch, randomised, torch_twin
from tests.unlearning.test_loop import Tiny, tiny_data, vgg_data

TARGETS, STEP, HELD, ALIKE = (3, 7), 0.01, 2.0, 0.5
LAYOUTS = {  # from a space's perturbation to PyTorch's, and how it is made larger there
    "perturbation": (lambda delta: delta.transpose(2, 0, 1), lambda delta, factor: factor * delta),
    "patch": (
        lambda delta: np.concatenate([delta["mask"], delta["pattern"]], axis=2).transpose(2, 0, 1),
        lambda delta, factor: torch.cat([(factor * delta[:1]).clamp(0, 1), delta[1:]]),
    ),
    "warp": (lambda delta: delta.transpose(2, 0, 1), lambda delta, factor: factor * delta),
    "wave": (lambda delta: delta.transpose(2, 0, 1), lambda delta, factor: factor * delta),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(
    "execution", [DEFAULT_EXECUTION, pytest.param(Execution(microbatch=6), marks=pytest.mark.slow)]
)
def test_the_hypergradient_through_players_is_torchs(rng, name, execution):
    """Twelve images, seven perturbed by two players, two by an untargeted δ; it needs the implicit term, K = 3."""
    space, data, others = SPACES[name], vgg_data(rng, 12), vgg_data(rng, 9)
    model, original = (
        randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), rng),
        randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(1)), rng),
    )
    weights = split_weights(model)
    nnx.update(original, weights.rest)  # running statistics never change
    keys = jax.random.split(jax.random.key(0), len(TARGETS))
    deltas = jax.vmap(lambda key: space.init(key, (32, 32, 3)))(keys)
    deltas = jax.tree.map(lambda leaf: leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32), deltas)
    if name == "patch":
        deltas = jax.tree.map(lambda leaf: jnp.clip(leaf, 0.01, 0.45), deltas)  # where no mask reaches 1
    which = np.asarray([-1, 0, 1, -2, 1, 0, -1, 0, 1, -2, -1, 1])
    untargeted = 0.1 * rng.normal(size=(1, 32, 32, 3)).astype(np.float32)
    factor, weight = rng.uniform(1, 2, 12).astype(np.float32), rng.uniform(0, 1, 12).astype(np.float32)
    weight[which == -1] = 1

    batch, seen = (jax.tree.map(lambda a: jnp.asarray(a[0]), make_batches(some, 12)) for some in (data, others))
    aimed = jnp.asarray((which >= 0).astype(np.float32))
    stamps = Stamps(
        aimed, {name: jnp.maximum(which, 0)}, {name: aimed * factor}, jnp.asarray(factor), jnp.asarray(weight)
    )
    config = UnlearnConfig(distillation=HELD, consistency=ALIKE)
    forward = partial(make_apply(model, execution), weights.rest)
    probs = jax.nn.softmax(forward(split_weights(original).params, batch.images / 255.0))
    patched = jnp.asarray((which == -2).astype(np.float32))
    outer = OuterBatch(batch, 0.01, patched, teacher_probs=probs, stamps=stamps)
    drawn = {name: Drawn(jnp.asarray(TARGETS), deltas, jnp.ones(2))}

    @partial(jax.jit, static_argnums=1)
    def compute(params, terms):
        return hypergradient(
            partial(outer_loss, forward, config, outer=outer, execution=execution),
            lambda deltas, params: aiming_loss(forward, drawn, deltas.aiming, params, seen),
            Deltas(jnp.asarray(untargeted), {name: deltas}),
            params,
            step_size=STEP,
            solve=neumann(terms),
        )

    loss, gradient = compute(weights.params, 3)
    layout, enlarge = LAYOUTS[name]
    twin = torch_twin(model)
    each = [layout(jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), deltas)) for i in range(len(TARGETS))]
    expected_loss, expected = torch_ibau.players_hypergradient(
        twin,
        name,
        torch.tensor(np.stack(each)),
        TARGETS,
        enlarge,
        as_torch(untargeted)[0],
        (_unit(data), torch.as_tensor(data.labels), which.tolist(), factor.tolist(), torch.tensor(weight)),
        (_unit(others), torch.as_tensor(others.labels)),
        terms=3,
        step=STEP,
        teacher=torch_twin(original),
        distillation=HELD,
        consistency=ALIKE,
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-4)
    named = dict(zip(dict(twin.named_parameters()), expected, strict=True))
    for path, leaf in nnx.to_flat_state(gradient):
        found, wanted = to_torch(path, np.asarray(leaf[...])), named[torch_name(path)].numpy()
        assert np.linalg.norm(found - wanted) <= 5e-3 * np.linalg.norm(wanted), torch_name(path)


def _unit(data):
    return as_torch(data.images.astype(np.float32) / 255)


SIZES = st.sampled_from([3, 5, 8]).flatmap(lambda count: st.lists(st.floats(0.1, 10), min_size=count, max_size=count))


def players_of(sizes, spaces=tuple(SPACES), shape=(4, 4, 3)):
    """Players of these sizes, of classes and last of any other, in every space."""
    config = UnlearnConfig(spaces=spaces)
    players = like_players(config, len(sizes) - 1, shape)
    sized = {name: player._replace(size=jnp.asarray(sizes, jnp.float32)) for name, player in players.of_space.items()}
    return players._replace(of_space=sized)


@settings(max_examples=6, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_only_those_drawn_move(sizes, seed):
    rng = np.random.default_rng(seed)
    players, config = (
        players_of(sizes, ("perturbation", "patch")),
        UnlearnConfig(spaces=("perturbation", "patch"), perturbations=4),
    )
    model = nnx.Linear(48, len(sizes) - 1, rngs=nnx.Rngs(seed))
    data = Dataset(rng.random((6, 4, 4, 3), np.float32), np.arange(6) % (len(sizes) - 1))
    batch = jax.tree.map(lambda array: jnp.asarray(array[0]), make_batches(data, 6))
    graph, params = nnx.split(model)

    def forward(params, images):
        return nnx.merge(graph, params)(images.reshape(len(images), -1))

    after, drawn = take_turn(forward, config, players, params, batch, jax.random.key(seed), (4, 4, 3))
    for name, player in players.of_space.items():
        target = np.asarray(drawn[name].target)
        assert len(set(target.tolist())) == len(target) == min(4, len(sizes))
        moved = np.asarray(after.of_space[name].size) != np.asarray(player.size)
        assert set(np.flatnonzero(moved)) == set(target.tolist())
        assert (np.asarray(after.of_space[name].steps) == moved).all()
        for old, new in zip(
            jax.tree.leaves(player.perturbation), jax.tree.leaves(after.of_space[name].perturbation), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(old)[~moved], np.asarray(new)[~moved])
        bound = after.of_space[name].size * (1 + 1e-5)
        assert (jax.vmap(SPACES[name].size)(after.of_space[name].perturbation)[target] <= bound[target] + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(prominence=st.lists(st.floats(0.3, 20), min_size=2, max_size=8), seed=st.integers(0, 10**6))
def test_images_get_a_perturbation_made_larger_and_count_by_how_far_it_stands_out(prominence, seed):
    half, rng, config = len(prominence) // 2, np.random.default_rng(seed), UnlearnConfig(enlarge=3.0)
    drawn = {
        name: Drawn(jnp.arange(len(some)), None, jnp.asarray(some))
        for name, some in (("patch", prominence[:half]), ("warp", prominence[half:]))
    }
    kind, ratios = rng.integers(0, 3, 50), rng.uniform(0.1, 3, 50).astype(np.float32)
    aimed, patched = ((kind == of).astype(np.float32) for of in (1, 2))
    stamps = deal(config, drawn, *map(jnp.asarray, (aimed, patched, ratios)), jax.random.key(seed))
    factors = np.stack([np.asarray(stamps.factor[name]) for name in drawn])
    assert ((factors > 0).sum(axis=0) == aimed).all()  # one space each
    assert (np.asarray(stamps.untargeted) >= 1).all()
    assert (np.asarray(stamps.untargeted) <= 3 * (1 + 1e-6)).all()
    assert (np.asarray(stamps.weight)[kind == 0] == 1).all()
    np.testing.assert_allclose(
        np.asarray(stamps.weight)[kind == 2], np.minimum(ratios[kind == 2], 1) ** 4, rtol=1e-4, atol=1e-6
    )
    for index in np.flatnonzero(aimed):
        name = list(drawn)[int(np.argmax(factors[:, index]))]
        ratio = float(drawn[name].prominence[stamps.which[name][index]])
        assert 1 <= factors[:, index].max() <= 3 * (1 + 1e-6)
        assert float(stamps.weight[index]) == pytest.approx(np.clip(np.log2(ratio), 0, 1) ** 4, abs=1e-5)


def test_images_follow_the_odds_of_prominence():
    """With sharpness 2, one that stands out 3 times goes to nine times as many images."""
    drawn = {"patch": Drawn(jnp.arange(2), None, jnp.asarray([3.0, 1.0]))}
    everyone, nobody = jnp.ones(20000), jnp.zeros(20000)
    stamps = deal(UnlearnConfig(sharpness=2.0), drawn, everyone, nobody, everyone, jax.random.key(0))
    assert float(np.mean(np.asarray(stamps.which["patch"]) == 0)) == pytest.approx(0.9, abs=0.01)


class Shortcut(nnx.Module):
    """Tells images with a bright upper half, class 0, from others, class 2; one bright pixel leads to class 1."""

    def __init__(self):
        self.gain = nnx.Param(jnp.asarray(10.0))
        self.pixel = nnx.Param(jnp.asarray(60.0))

    def __call__(self, x):
        contrast = self.gain * (x[:, :2].mean((1, 2, 3)) - x[:, 2:].mean((1, 2, 3)))
        return jnp.stack([contrast, self.pixel * (x[:, 3, 3, 0] - 0.8), -contrast], axis=1)


def bright_halves(rng, count=80):
    labels = rng.choice([0, 2], count)
    images = rng.uniform(0, 0.2, (count, 4, 4, 3)).astype(np.float32)
    images[labels == 0, :2] += 0.5
    images[labels == 2, 2:] += 0.5
    images[:, 3, 3, 0] = 0.3
    return Dataset(images, labels)


CONFIG = replace(PRESETS["robust"], n_rounds=2, min_batches=4, batch_size=40, spaces=("perturbation", "patch"))


def test_a_planted_shortcut_stands_out_and_is_unlearned(rng):
    data = bright_halves(rng)
    config = replace(
        CONFIG, n_rounds=3, min_batches=8, lr=5.0, distillation=0.1, consistency=0.1, mirror="never", crop=0
    )
    states = []
    result = unlearn(Shortcut(), data, config, on_round=states.append)
    assert states[0].outliers[0].label == 1
    trigger = data.images.copy()
    trigger[:, 3, 3, 0] = 1.0
    asr, acc = (
        float(np.mean(np.argmax(result.model(jnp.asarray(images)), axis=1) == wanted))
        for images, wanted in ((trigger, 1), (data.images, data.labels))
    )
    assert float(np.mean(np.argmax(Shortcut()(jnp.asarray(trigger)), axis=1) == 1)) > 0.9
    assert asr < 0.1
    assert acc > 0.95


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def weights(model):
    return leaves(nnx.state(model))


def assert_same(one, other, tolerance=0.0):
    for a, b in zip(weights(one.model), weights(other.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_going_on_from_a_state_is_bit_by_bit_running_through(rng):
    model, data, states = Tiny(nnx.Rngs(0)), tiny_data(rng, 60), []
    whole = unlearn(model, data, CONFIG, on_round=states.append)
    assert set(states[0].players.of_space) == {"perturbation", "patch"}
    assert isinstance(states[0].players.of_space["patch"], Player)
    assert_same(unlearn(model, data, CONFIG, state=states[0]), whole)


def test_an_audit_spares_the_search_and_changes_nothing_else(rng):
    data, phases = bright_halves(rng), []
    config = replace(CONFIG, n_rounds=1)
    found = Auditor()(Shortcut(), data, held_out=bright_halves(rng))
    again = unlearn(Shortcut(), data, config, audit=found, on_batch=lambda phase, *counts: phases.append(phase))
    assert "outer" in phases
    assert "search" not in phases
    whole = unlearn(Shortcut(), data, config)
    assert_same(again, whole)
    other = Auditor(AuditConfig(success=0.5, steps=3))(Shortcut(), data, held_out=bright_halves(rng))
    assert_same(unlearn(Shortcut(), data, config, audit=other), whole)  # options of an audit change no weights


@pytest.mark.parametrize("execution", [DEFAULT_EXECUTION, Execution(loop="scan")])
def test_together_as_one_by_one(rng, execution):
    members = [
        Member(Tiny(nnx.Rngs(index)), tiny_data(rng, 60), replace(CONFIG, seed=index, lr=1e-3 * (index + 1)))
        for index in range(2)
    ]
    alone = unlearn_many(members, together=False)
    for one, other in zip(unlearn_many(members, execution=execution, together=True), alone, strict=True):
        assert one.status == other.status == "completed"
        assert_same(one, other, 1e-4)


def test_untargeted_perturbations_are_as_large_as_they_need_to_be(rng):
    """On the model that they were found for: at their size 90 % of other classes' images follow, a little below not."""
    data = bright_halves(rng)
    found = unlearn(Shortcut(), data, replace(CONFIG, n_rounds=1, batch_size=80)).rounds[0].perturbation

    def most(delta):
        predicted = np.argmax(Shortcut()(jnp.asarray(data.images + delta)), axis=1)
        return max(np.mean(predicted[data.labels != label] == label) for label in range(3))

    for delta in found:
        assert most(1.001 * delta) >= 0.9 > most(0.96 * delta)


def test_untargeted_perturbations_stay_in_their_ball_where_there_are_players(rng):
    config = replace(CONFIG, n_rounds=1, norm_bound=0.05)
    found = unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng, 60), config).rounds[0].perturbation
    assert np.linalg.norm(found.reshape(len(found), -1), axis=1).max() <= 0.05 * (1 + 1e-5)


def test_a_player_that_waits_no_more_than_its_turn_keeps_up_with_the_model(rng):
    """Where one class attracts all images the others' sizes are large; without it they fall to what they are alone."""
    config = UnlearnConfig(spaces=("perturbation",), perturbations=2)
    players = players_of([0.01, 40, 40, 40, 40, 40, 40], ("perturbation",))
    model = nnx.Linear(48, 6, rngs=nnx.Rngs(0))
    data = Dataset(rng.random((12, 4, 4, 3), np.float32), rng.integers(0, 6, 12))
    batch = jax.tree.map(lambda array: jnp.asarray(array[0]), make_batches(data, 12))
    graph, params = nnx.split(model)

    def forward(params, images):
        return nnx.merge(graph, params)(images.reshape(len(images), -1))

    turn = jax.jit(lambda players, key: take_turn(forward, config, players, params, batch, key, (4, 4, 3))[0])
    for seed in range(60):
        players = turn(players, jax.random.key(seed))
    sizes = np.asarray(players.of_space["perturbation"].size)
    assert sizes.max() < 5
    assert float(players.medians["perturbation"]) <= float(median_size(sizes)) * 1.01


def test_images_of_the_class_itself_leave_a_player_as_large_as_it_was(rng):
    data = Dataset(rng.random((12, 4, 4, 3), np.float32), np.zeros(12, np.int64))
    model = nnx.Linear(48, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    batch = jax.tree.map(lambda array: jnp.asarray(array[0]), make_batches(data, 12))

    def forward(params, images):
        return nnx.merge(graph, params)(images.reshape(len(images), -1))

    spaces = ("perturbation", "patch")
    config, players = UnlearnConfig(spaces=spaces, perturbations=2), players_of([3.0, 3.0, 3.0], spaces)
    for seed in range(3):
        players = take_turn(forward, config, players, params, batch, jax.random.key(seed), (4, 4, 3))[0]
    sizes = np.asarray(players.of_space["patch"].size)
    assert sizes[0] == 3.0
    assert sizes[1] != 3.0


def test_no_player_becomes_smaller_than_a_number(rng):
    """A model that says one class whatever it sees: every perturbation is enough, and its size has a least value."""
    data = tiny_data(rng, 12)
    batch = jax.tree.map(lambda array: jnp.asarray(array[0]), make_batches(data, 12))

    def forward(params, images):
        return params * jnp.eye(3)[jnp.ones(len(images), int)] + 0 * images.sum()

    spaces = ("perturbation", "wave")
    config, players = UnlearnConfig(spaces=spaces, perturbations=2), players_of([1e-30] * 4, spaces)
    turn = jax.jit(lambda players, key: take_turn(forward, config, players, jnp.ones(()), batch, key, (4, 4, 3))[0])
    for seed in range(80):
        players = turn(players, jax.random.key(seed))
    assert np.isfinite(np.asarray(players.prominence("wave"))).all()
    assert float(players.of_space["wave"].size.min()) > 0


def test_untargeted_perturbations_stay_or_are_found_anew(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng, 60)
    for renew in (False, True):
        first, second = unlearn(model, data, replace(CONFIG, renew=renew)).rounds
        assert np.array_equal(first.perturbation, second.perturbation) != renew
        assert (first.inner_loss == second.inner_loss) != renew


@pytest.mark.parametrize("together", [True, False])
def test_a_member_that_stops_at_once_does_not_disturb_another(rng, together):
    data = tiny_data(rng, 60)
    good, bad = (Member(Tiny(nnx.Rngs(0)), data, replace(CONFIG, optim="sgd", lr=lr)) for lr in (1e-3, 1e38))
    results = unlearn_many([bad, good], together=together)
    assert [result.status for result in results] == ["diverged", "completed"]
    assert_same(results[1], unlearn(good.model, data, good.config), 1e-4)


class Overflowing(Tiny):
    """Not finite for images with a pixel above `limit`."""

    def __init__(self, limit):
        super().__init__(nnx.Rngs(0))
        self.limit = nnx.BatchStat(jnp.float32(limit))

    def __call__(self, x):
        return super().__call__(x) + jnp.where(x.max(axis=(1, 2, 3)) > self.limit[...], jnp.nan, 0)[:, None]


@pytest.mark.parametrize("together", [True, False])
def test_a_member_that_is_not_finite_with_triggers_does_not_disturb_another(rng, together):
    data = tiny_data(rng, 60)
    dark = Dataset(data.images // 2, data.labels)  # as it came the model is finite for them
    bad, good = (Member(Overflowing(limit), dark, CONFIG) for limit in (0.51, np.inf))
    results = unlearn_many([bad, good, bad], together=together)
    assert [result.status for result in results] == ["diverged", "completed", "diverged"]
    assert (results[0].model, results[0].rounds) == (bad.model, ())
    assert_same(results[1], unlearn(good.model, dark, CONFIG), 1e-4)
    with pytest.raises(NotFiniteError, match="search for small triggers"):
        unlearn(bad.model, dark, CONFIG)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 60), portion=st.floats(0.01, 1.0), count=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_perturbed_images_get_the_perturbations_in_turn(size, portion, count, seed):
    which = assigned_images(jax.random.key(seed), np.ones((1, size), np.float32), portion, count)[0]
    chosen = which[which >= 0]
    assert len(chosen) == max(1, int(np.floor(portion * size + 1e-9)))
    assert np.ptp(np.bincount(chosen, minlength=count)) <= 1


def test_batches_of_a_round_and_the_learning_rate(rng):
    """Perturbed images are not mixed with others, of other rounds they are others, and the rate falls."""
    config = replace(CONFIG, mix=0.5, crop=0, mirror="never", portion=0.4, n_rounds=4)
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng, 50)
    state = replace(initial_state(model, config), players=like_players(config, 3, (4, 4, 3)))
    stack = Stack([state], [data], [config], DEFAULT_EXECUTION)
    assert stack.count == 4
    first, second = stack.outer_batches(1), stack.outer_batches(2)
    for outer in (first, second):
        perturbed = (outer.patched + outer.turn.aimed) > 0
        assert (outer.patched * outer.turn.aimed).max() == 0
        np.testing.assert_array_equal(outer.mixture.shares[perturbed], 0)
        still = outer.batch.images[perturbed]
        np.testing.assert_array_equal(still, stack.batches.images[perturbed])
        assert abs(int(outer.patched.sum()) - int(outer.turn.aimed.sum())) <= stack.count * 4
    assert not np.array_equal(first.patched, second.patched)
    assert not np.array_equal(first.turn.seed, second.turn.seed)
    rates = np.concatenate([learning_rates(config, number, 4) for number in (1, 2, 3, 4)]) / config.lr
    assert rates[[0, 8]] == pytest.approx([1, 0.5])
    assert (np.diff(rates) < 0).all()
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("count", [7, 40, 41, 119, 121, 160, 161, 201])
def test_all_batches_are_full_and_each_perturbation_has_its_own_images(rng, count):
    config = replace(CONFIG, batch_size=40, min_batches=4)
    data = Dataset(rng.random((count, 4, 4, 3), np.float32), rng.integers(0, 3, count))
    model = Tiny(nnx.Rngs(0))
    stack = Stack([initial_state(model, config)], [data], [config], DEFAULT_EXECUTION)
    real = stack.batches.weights > 0
    images, times = np.unique(stack.batches.images[real], axis=0, return_counts=True)
    assert (stack.count, len(images)) == (max(4, -(-count // 40)), count)
    assert real.all()
    assert stack.config.distillation == pytest.approx(config.distillation * min(1, 40 / count) ** 0.5)
    if count == 160:
        np.testing.assert_array_equal(stack.batches.images[real], data.images)
    else:
        assert np.ptp(times) <= 1
        place = np.arange(min(40, count)) % config.perturbations
        seen = [{image.tobytes() for image in stack.batches.images[:, 0, place == k].reshape(-1, 48)} for k in range(4)]
        assert sum(len(images) for images in seen) == count
        other = Stack([initial_state(model, config)], [data], [replace(config, seed=9)], DEFAULT_EXECUTION)
        assert not np.array_equal(stack.batches.images, other.batches.images)
        if 7 < count < 80:
            assert not np.array_equal(stack.batches.images[0], stack.batches.images[1])
