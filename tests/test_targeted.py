"""Perturbations towards suspected targets: the inner step and the hypergradient against PyTorch, who is suspected."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax import suspects
from ibau_jax.aims import Aims, Suspects, adapted, aims_of_round
from ibau_jax.auditing.search import Found
from ibau_jax.augmentation import Mixture
from ibau_jax.batches import assigned_images, make_batches
from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import make_apply, split_weights
from ibau_jax.member import Member, initial_state
from ibau_jax.minimax import unlearn, unlearn_many
from ibau_jax.models.small_vgg import SmallVGG
from ibau_jax.optimizers import make_optimizer
from ibau_jax.outer import OuterBatch, OuterConstants, outer_step
from ibau_jax.perturb import InnerConstants, inner_optimizer, inner_step
from ibau_jax.presets import PRESETS, suited
from ibau_jax.result import Round, Standing
from ibau_jax.selection import asks_for_more, may_go_deeper
from ibau_jax.stack import learning_rate
from ibau_jax.suspects import compile_scan, find_hidden, find_suspects
from tests.oracles import torch_ibau
from tests.oracles.twins import as_torch, randomised, torch_twin
from tests.test_minimax import Tiny, tiny_data, vgg_data

TARGETS = [3, 7]
CONFIG = UnlearnConfig(batch_size=12, perturbations=2, targeted=True, clip=True, optim="sgd", lr=0.01, portion=0.5, K=2)


@pytest.fixture
def case(rng):
    """A random net, a batch of 12 images, two perturbations and what they aim at."""
    model, data = randomised(SmallVGG(10, 32, nnx.Rngs(0)), rng), vgg_data(rng, 12)
    batch = jax.tree.map(lambda array: array[0], make_batches(data, 12))
    delta = 0.1 * rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    return model, batch, delta, Aims(np.asarray(TARGETS, np.int32), np.asarray([2.0, 0.5], np.float32))


def images_of(batch):
    return as_torch(batch.images.astype(np.float32) / 255)


def test_the_first_inner_step_goes_along_torchs_gradient(case):
    model, batch, _, aims = case
    zero = jnp.zeros((2, 32, 32, 3))
    step = inner_step(make_apply(model, DEFAULT_EXECUTION), CONFIG, steps=5)
    constants = InnerConstants(split_weights(model), aims)
    (found, _), _ = jax.jit(step)((zero, inner_optimizer(CONFIG, 5).init(zero)), batch, constants)

    start = torch.zeros(2, 3, 32, 32, requires_grad=True)
    gradient = torch.autograd.grad(torch_ibau.targeted_loss(torch_twin(model), start, images_of(batch), TARGETS), start)
    for index, along in enumerate(gradient[0].numpy().transpose(0, 2, 3, 1)):
        expected = -0.3 * aims.radius[index] * along / np.linalg.norm(along)
        np.testing.assert_allclose(found[index], expected, atol=2e-4 * np.abs(expected).max())


def test_perturbations_stay_in_their_balls(case):
    model, batch, _, aims = case
    carry = (jnp.zeros((2, 32, 32, 3)), inner_optimizer(CONFIG, 12).init(jnp.zeros((2, 32, 32, 3))))
    step = jax.jit(inner_step(make_apply(model, DEFAULT_EXECUTION), CONFIG, steps=12))
    losses = []
    for _ in range(12):
        carry, loss = step(carry, batch, InnerConstants(split_weights(model), aims))
        losses.append(float(loss))
    norms = np.linalg.norm(np.asarray(carry[0]).reshape(2, -1), axis=1)
    assert (norms <= aims.radius * (1 + 1e-5)).all()
    assert (norms > 0.5 * aims.radius).all()
    assert losses[-1] < losses[0]


def test_several_untargeted_perturbations_each_have_a_share_of_the_images(case):
    model, batch, delta, _ = case
    config, start = replace(CONFIG, targeted=False, inner_lr=0.5), jnp.zeros_like(delta)
    step = jax.jit(inner_step(make_apply(model, DEFAULT_EXECUTION), config))
    (found, _), _ = step((start, inner_optimizer(config, 1).init(start)), batch, InnerConstants(split_weights(model)))
    settings = {"clip": True, "optimizer": "sgd", "learning_rate": 0.5, "bound": None}
    for index in range(2):
        share = (images_of(batch)[index::2], None)
        expected = torch_ibau.perturbation(torch_twin(model), [share], **settings)[0].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(found[index], expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("execution", "distillation", "mix"),
    [
        (DEFAULT_EXECUTION, 0.0, False),
        (DEFAULT_EXECUTION, 2.0, True),
        pytest.param(Execution(microbatch=6), 2.0, True, marks=pytest.mark.slow),
        pytest.param(Execution(remat=True), 0.0, False, marks=pytest.mark.slow),
    ],
)
def test_outer_step_matches_torch(case, rng, execution, distillation, mix):
    model, batch, delta, aims = case
    original, config = randomised(SmallVGG(10, 32, nnx.Rngs(1)), rng), replace(CONFIG, distillation=distillation)
    which = np.asarray([-1, 0, 1, -1, 1, 0, -1, -1, 1, 0, -1, 1], np.int32)
    weights = split_weights(model)
    nnx.update(original, weights.rest)  # running statistics never change
    before = split_weights(original).params if distillation else None
    constants = OuterConstants(delta, batch, weights.rest, np.float32(CONFIG.lr), aims, before)
    others, shares = rng.permutation(batch.labels).astype(np.int32), rng.uniform(0, 0.5, 12).astype(np.float32)
    mixture = Mixture(others, shares) if mix else None
    outer = OuterBatch(batch, (which >= 0).astype(np.float32), np.maximum(which, 0), mixture)
    step = jax.jit(outer_step(make_apply(model, execution), config, execution))
    state = make_optimizer(CONFIG.optim, CONFIG.lr).init(weights.params)
    (params, _), _ = step((weights.params, state), outer, constants)

    twin = torch_twin(model)
    labels = torch.eye(10)[batch.labels]
    if mix:
        labels = torch.lerp(labels, torch.eye(10)[others], torch.as_tensor(shares)[:, None])
    gradients = torch_ibau.targeted_hypergradient(
        twin, as_torch(delta), images_of(batch), labels, which.tolist(),
        images_of(batch), TARGETS, terms=CONFIG.K, before=torch_twin(original), distillation=distillation,
    )  # fmt: skip
    expected = dict(zip(dict(twin.named_parameters()), gradients, strict=True))
    start = dict(nnx.to_flat_state(weights.params))
    for path, leaf in nnx.to_flat_state(params):
        moved = to_torch(path, np.asarray(start[path][...])) - to_torch(path, np.asarray(leaf[...]))
        gradient = expected[torch_name(path)].numpy()
        assert np.linalg.norm(moved / CONFIG.lr - gradient) <= 5e-3 * np.linalg.norm(gradient), path


class Shortcut(nnx.Module):
    """Tells images with a bright upper half, class 0, from others, class 2; one bright pixel leads to class 1."""

    def __init__(self):
        self.gain = nnx.Param(jnp.asarray(10.0))

    def __call__(self, x):
        contrast = self.gain * (x[:, :2].mean((1, 2, 3)) - x[:, 2:].mean((1, 2, 3)))
        return jnp.stack([contrast, 60 * (x[:, 3, 3, 0] - 0.8), -contrast], axis=1)


def test_the_class_of_a_planted_shortcut_is_suspected(rng):
    labels = rng.choice([0, 2], 80)
    images = rng.uniform(0, 0.2, (80, 4, 4, 3)).astype(np.float32)
    images[labels == 0, :2] += 0.5
    images[labels == 2, 2:] += 0.5
    images[:, 3, 3, 0] = 0.3
    data = Dataset(images, labels)
    scan = compile_scan(Shortcut(), data, DEFAULT_EXECUTION)
    found = find_suspects(scan, Shortcut(), data, UnlearnConfig(suspects=2))
    assert found.labels[0] == 1
    assert 0.4 < found.norms[0] < 0.8 < found.norms[1]  # 0.58 leads there in that pixel alone, where the contrast is 5
    second = float(found.norms[1] / found.norms[0]) - 1
    for tied, perturbations, count in ((second - 0.01, 2, 1), (second + 0.01, 2, 2), (second + 0.01, 1, 1)):
        config = UnlearnConfig(tied=tied, perturbations=perturbations)
        assert len(find_suspects(scan, Shortcut(), data, config).labels) == count
    ratio = float(np.median(found.sizes)) / found.norms[0]
    for beyond, perturbations, count in ((ratio + 0.01, 3, 1), (0.9, 3, 3), (0.9, 2, 2)):  # the median's own is 1
        config = UnlearnConfig(suspects_min_ratio=beyond, perturbations=perturbations)
        assert len(find_suspects(scan, Shortcut(), data, config).labels) == count


def twice_searched():
    """Two suspects at first, classes 4 and 9, and class 2 after two rounds."""
    first = Suspects.of_search(np.asarray([4, 9], np.int32), _sizes({4: 0.5, 9: 1.0}), np.zeros((2, 4, 4, 3)))
    return first.and_more(Suspects.of_search(np.asarray([2]), _sizes({2: 0.25}), np.ones((1, 4, 4, 3)), 2))


def test_rounds_aim_at_those_of_the_last_search_before_them():
    config, found = replace(CONFIG, perturbations=3, reach=(1.0, 1.0)), twice_searched()
    second, third = (aims_of_round(config, found, number) for number in (2, 3))
    assert (second.target.tolist(), second.radius.tolist()) == ([4, 9, 4], [0.5, 1.0, 0.5])
    assert (third.target.tolist(), third.radius.tolist()) == ([2, 2, 2], [0.25] * 3)
    assert found.known_to(2).perturbations.max() == 0.0
    assert found.known_to(3).labels.tolist() == [4, 9, 2]
    assert found.first.labels.tolist() == [4, 9]
    assert [found.found_before(number) for number in (1, 2, 3)] == [[4, 9], [], [2]]
    assert found.ratio == 6.0  # of the model as it came


def test_rounds_for_what_was_hidden_are_counted_from_the_search_for_it():
    once = twice_searched().known_to(1)
    done = Round(1, np.zeros((1, 4, 4, 3)), 0.0, 0.0, 0.0, 0.0)
    begun = replace(initial_state(Tiny(nnx.Rngs(0)), CONFIG), suspects=once)
    state, config = replace(begun, rounds=(done, done)), replace(CONFIG, hidden_rounds=1)
    assert may_go_deeper(state, config)
    assert not may_go_deeper(state, replace(config, hidden_rounds=0))
    assert not may_go_deeper(begun, config)
    again = replace(state, suspects=twice_searched(), rounds=(done, done, done))  # after the second round
    assert not may_go_deeper(again, config)
    assert may_go_deeper(again, replace(config, hidden_rounds=2))
    assert not asks_for_more(again, replace(PRESETS["robust-medium"], more_rounds=9, more_min_ratio=0.1, left_open=0.0))
    assert not may_go_deeper(replace(state, rounds=(done, replace(done, undone=True))), config)


@pytest.mark.parametrize(
    ("several", "by_patch", "searches", "hidden"),
    [
        (2.9, None, ["perturbation"], True),  # the median class's size is 3, and two classes have 1
        (3.1, None, [], False),
        (None, None, [], False),
        (2.9, 2.2, ["perturbation"], True),
        (3.1, 2.2, ["patch"], False),
        (3.1, 1.9, ["patch", "perturbation"], True),  # a patch half as large as the median class's
    ],
)
def test_others_may_be_hidden_where_several_stood_out_or_a_patch_shows_one(
    monkeypatch, rng, several, by_patch, searches, hidden
):
    done, views = Round(1, np.zeros((1, 4, 4, 3)), 0.0, 0.0, 0.0, 0.0), []

    def search(scan, *_):
        views.append(scan)
        return Found(np.zeros((3, 4, 4, 3), np.float32), np.asarray([2.0, 1.0, 2.0], np.float32))

    monkeypatch.setattr(suspects, "compile_scan", lambda model, clean_set, execution, space=suspects.PIXEL: space.name)
    monkeypatch.setattr(suspects, "run_search", search)
    config = replace(CONFIG, suspects_min_ratio=several, hidden_min_ratio=by_patch, perturbations=2)
    model = initial_state(Tiny(nnx.Rngs(0)), config)
    state = replace(model, suspects=twice_searched().known_to(1), rounds=(done, done))
    found = find_hidden(state, tiny_data(rng, 6), config, DEFAULT_EXECUTION)
    assert views == searches
    assert (found is not None) == hidden
    if found:
        assert (found.labels.tolist(), found.found_after.tolist()) == ([1, 0], [2, 2])


@pytest.mark.slow
@pytest.mark.parametrize(("folds", "more_rounds"), [(1, 0), (2, 1)])
def test_a_model_that_may_hide_more_is_searched_again_and_going_on_changes_nothing(rng, folds, more_rounds):
    model, data, states, phases, count = Tiny(nnx.Rngs(0)), tiny_data(rng, 30), [], [], 2 + more_rounds
    config = replace(
        PRESETS["robust-few"], n_rounds=2, batch_size=10, min_batches=3, perturbations=2, folds=folds, sure_ratios=None,
        suspects_min_ratio=0.9, more_rounds=more_rounds, hidden_rounds=1, more_min_ratio=0.9,
        left_open=0.0, max_acc_drop=1.0, closed=1.0,
    )  # fmt: skip
    sizes, perturbations = np.asarray([0.1, 0.1, 1.0], np.float32), np.ones((2, 4, 4, 3), np.float32)
    first = Suspects.of_search(np.asarray([0, 1], np.int32), sizes, perturbations)
    begun = replace(initial_state(model, config), suspects=first, initial=Standing(1.0, 1.0, 30))
    whole = unlearn(
        model, data, config, state=begun, on_round=states.append, on_batch=lambda phase, *_: phases.append(phase)
    )
    assert [state.suspects.found_after.tolist() for state in states] == [[0, 0]] * count + [[0, 0, count, count]]
    assert "search" in phases
    assert len(whole.rounds) == count + 1
    if folds > 1:
        assert whole.kept_round == count + 1
        assert [done.standing.images for done in whole.rounds] == [30] * (count + 1)
    for state in states:
        rest = unlearn(model, data, config, state=state)
        assert [done.standing for done in rest.rounds] == [done.standing for done in whole.rounds]
        for one, other in zip(*(jax.tree.leaves(nnx.state(found.model)) for found in (rest, whole)), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(unlearn(model, data, replace(config, hidden_rounds=0), state=begun).rounds) == count
    none_stood_out = replace(config, suspects_min_ratio=1.1, more_rounds=0, folds=1)
    assert len(unlearn(model, data, none_stood_out, state=begun).rounds) == 2
    by_patch = replace(none_stood_out, hidden_min_ratio=0.9)  # of the median class itself it is 1
    assert len(unlearn(model, data, by_patch, state=begun).rounds) == 3


def _sizes(of_classes):
    sizes = np.full(10, 3.0, np.float32)
    for label, size in of_classes.items():
        sizes[label] = size
    return sizes


@pytest.mark.parametrize(
    ("smallest", "norm_bound", "rounds", "radius"),
    [(1.0, None, 1, 15.0), (1.0, 12.0, 1, 12.0), (0.59, 20.0, 0, 8.85), (0.61, 20.0, 1, 9.15)],
)
def test_the_published_perturbation_is_bounded_by_the_suspects_and_left_out_where_one_stands_out(
    smallest, norm_bound, rounds, radius
):
    config = replace(PRESETS["robust"], norm_bound=norm_bound)
    suspects = Suspects.of_search(np.asarray([4], np.int32), _sizes({4: smallest}), np.zeros((1, 4, 4, 3)))
    found = adapted(config, suspects)
    assert found.untargeted_rounds == rounds
    assert found.min_rounds == (2 if rounds else 3)
    np.testing.assert_allclose(found.norm_bound, radius, rtol=1e-6)
    assert adapted(PRESETS["gtsrb"], suspects) == PRESETS["gtsrb"]


@pytest.mark.parametrize(
    ("smallest", "targeted", "more"),
    [(0.76, [False], 2), (0.74, [False, True], 1), (0.59, [True, True], 1), (0.31, [True, True], 1), (0.29, [True], 2)],
)
def test_the_rounds_of_a_suspect_that_stands_out(smallest, targeted, more):
    """The median class's size is 3: from a ratio of 4 to 10 a second round, above 5 no untargeted one."""
    suspects = Suspects.of_search(np.asarray([4], np.int32), _sizes({4: smallest}), np.zeros((1, 4, 4, 3)))
    found = adapted(PRESETS["robust-few"], suspects)
    assert [found.of_round(number + 1).targeted for number in range(found.n_rounds)] == targeted
    assert found.more_rounds == more
    assert adapted(found, suspects) == found


def test_few_images_have_their_own_robust_preset():
    found = [suited("robust", count) for count in (999, 1000, 2999, 3000)]
    assert found == ["robust-few", "robust-medium", "robust-medium", "robust"]
    assert suited("cifar10", 10) == "cifar10"
    assert {suited(name, count) for name in PRESETS for count in (10, 1000, 5000)} == set(PRESETS)


def test_norms_are_drawn_anew_within_reach_and_suspects_take_turns():
    config = replace(CONFIG, perturbations=5, suspects=2, reach=(2.0, 8.0))
    suspects = Suspects.of_search(np.asarray([4, 9], np.int32), _sizes({4: 0.5, 9: 2.0}), np.zeros((2, 4, 4, 3)))
    first, second = (aims_of_round(config, suspects, number) for number in (1, 2))
    assert first.target.tolist() == [4, 9, 4, 9, 4]
    times = first.radius / suspects.norms[[0, 1, 0, 1, 0]]
    assert (times >= 2).all()
    assert (times <= 8).all()
    assert not np.allclose(first.radius, second.radius)


@given(size=st.integers(1, 40), portion=st.floats(0.01, 1.0), count=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_patched_images_get_the_perturbations_in_turn(size, portion, count, seed):
    weights = np.zeros((1, 40), np.float32)
    weights[0, :size] = 1
    which = assigned_images(jax.random.key(seed), weights, portion, count)[0]
    assert (which[size:] == -1).all()
    each = np.bincount(which[which >= 0], minlength=count)
    assert each.sum() == max(1, int(portion * size + 1e-9))
    assert each.max() - each.min() <= 1


def test_batches_of_a_round_and_the_learning_rate(rng):
    done = []
    config = replace(
        PRESETS["robust"], n_rounds=2, batch_size=10, min_batches=7, perturbations=2, targeted=True, max_acc_drop=1.0
    )
    config = replace(config, untargeted_max_ratio=None, inner_lr=1e5, reach=(0.1, 0.2))
    result = unlearn(
        Tiny(nnx.Rngs(0)),
        tiny_data(rng, 40),
        config,
        execution=Execution(loop="python"),  # a scan reports a round at once
        on_batch=lambda *progress: done.append(progress),
    )
    assert [entry for entry in done if entry[0] == "outer"] == [
        ("outer", number, batch, 8)
        for number in (1, 2)
        for batch in range(1, 9)  # 36 images, 4 batches, twice
    ]
    assert done[0][0] == "search"
    untargeted, targeted = (np.linalg.norm(done.perturbation.reshape(2, -1), axis=1) for done in result.rounds)
    # on the sphere of 15 times the smallest; in balls of at most 0.2 times
    assert untargeted.min() >= (1 - 1e-5) * 15.0 / 0.2 * targeted.max()
    rates = [learning_rate(replace(config, n_rounds=3, lr=1.0), number) for number in (1, 2, 3)]
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.25])
    assert learning_rate(replace(config, schedule="constant"), 2) == config.lr


def test_going_on_from_a_state_keeps_the_suspects(rng):
    model, data, states = Tiny(nnx.Rngs(0)), tiny_data(rng, 40), []
    config = replace(PRESETS["robust"], n_rounds=3, batch_size=10, min_batches=4)
    whole = unlearn(model, data, config, on_round=states.append)
    rest = unlearn(model, data, config, state=states[0])
    tolerance = 0.0 if jax.default_backend() == "cpu" else 1e-6  # a GPU adds up in no fixed order
    for a, b in zip(jax.tree.leaves(nnx.state(whole.model)), jax.tree.leaves(nnx.state(rest.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=0)


@pytest.mark.slow
def test_members_with_and_without_an_untargeted_round_unlearn_together(rng):
    """A stack has rounds of one kind: whose suspect stands out and whose does not are stacked apart.

    Targeted rounds, which both stacks have, are compiled for each: they differ in size.
    """
    config = replace(
        PRESETS["robust"], n_rounds=2, batch_size=20, min_batches=1, perturbations=2, targeted=True, max_acc_drop=1.0
    )
    config = replace(config, inner_lr=1e5)  # beyond any ball
    members = []
    for index, smallest in enumerate((1.0, 0.1, 0.9)):
        model = Tiny(nnx.Rngs(index))
        suspects = Suspects.of_search(
            np.asarray([1], np.int32), np.asarray([1, smallest, 1], np.float32), np.zeros((1, 4, 4, 3), np.float32)
        )
        state = replace(initial_state(model, config), suspects=suspects, initial=Standing(0.5, 1.0, 4))
        members.append(Member(model, tiny_data(rng, 40), config, state))
    stacked = unlearn_many(members, together=True)
    norms = np.linalg.norm([found.rounds[0].perturbation.reshape(2, -1) for found in stacked], axis=2)
    np.testing.assert_allclose(norms[::2], [[15.0, 15.0], [13.5, 13.5]], rtol=1e-5)  # untargeted: each in its own ball
    assert (norms[1] <= 1.6 * (1 + 1e-5)).all()  # targeted: up to 16 times the smallest
    for found, alone in zip(stacked, unlearn_many(members, together=False), strict=True):
        assert found.rounds[0].outer_loss == pytest.approx(alone.rounds[0].outer_loss, rel=1e-4)
