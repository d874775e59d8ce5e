"""The inner maximisation, one outer round and the round loop against PyTorch, and what happens when it goes wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.batches import assigned_images, make_batches, patched_images
from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import ConfigError, DataError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Weights, make_apply
from ibau_jax.image_size import ImageSize
from ibau_jax.loops import compile_loop
from ibau_jax.models import Normalization, Normalized
from ibau_jax.models.small_vgg import SmallVGG
from ibau_jax.optimizers import make_optimizer
from ibau_jax.perturbations import Pixel
from ibau_jax.placement import Placement
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning import initial_state, unlearn
from ibau_jax.unlearning.inner import inner_step
from ibau_jax.unlearning.outer import OuterBatch, OuterCarry, OuterConstants, outer_step
from ibau_jax.unlearning.stack import Stack
from tests.defences.twin import as_state_dict, blobs, twins
from tests.oracles import torch_ibau
from tests.oracles.twins import as_torch, randomised, torch_twin

COUNT, BATCH = 25, 10  # the last batch is half full


class Tiny(nnx.Module):
    """A net that compiles fast."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(48, 16, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.tanh(self.hidden(x.reshape(x.shape[0], -1))))


def tiny_data(rng, count=COUNT):
    return Dataset(rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), rng.integers(0, 3, count))


def vgg_data(rng, count=COUNT):
    return Dataset(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count))


def torch_batches(data, size):
    images, labels = as_torch(data.images.astype(np.float32) / 255), torch.as_tensor(data.labels)
    return list(zip(images.split(size), labels.split(size), strict=True))


ONE_DEVICE = Placement.one_device()


def loop_of(step, carry, batches, constant, execution=DEFAULT_EXECUTION):
    """The loop over batches for a stack of this one member, and what it gives, without the axis of members."""

    def first(tree):
        return jax.tree.map(lambda array: jnp.asarray(array)[None], tree)

    def member(tree):
        return jax.tree.map(lambda array: array[0], tree)

    def alone(*arguments):
        return first(step(*map(member, arguments)))

    carry, constant = ONE_DEVICE.members(first(carry)), ONE_DEVICE.members(first(constant))
    batches = jax.tree.map(lambda array: np.asarray(array)[:, None], batches)
    loop = compile_loop(alone, carry, batches, constant, execution=execution, placement=ONE_DEVICE)
    carry, losses = loop.run(carry, batches, constant)
    return member(carry), losses[:, 0]


def split(model):
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest


@pytest.mark.parametrize("preset", ["cifar10", "gtsrb"])
def test_inner_maximisation_matches_torch(rng, preset):
    model, data = randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), rng), vgg_data(rng)
    # The published steps run a random net's perturbation into saturation, where rounding decides: take smaller ones.
    config = replace(PRESETS[preset], batch_size=BATCH, inner_lr=PRESETS[preset].inner_lr / 100)
    params, rest = split(model)
    delta = jnp.zeros((1, 32, 32, 3))
    carry = (delta, make_optimizer(config.inner_optim, config.inner_lr).init(delta))
    step = inner_step(make_apply(model, DEFAULT_EXECUTION), config)
    (delta, _), _ = loop_of(step, carry, make_batches(data, BATCH), Weights(params, rest))
    found = np.asarray(Pixel().project(delta, config.norm_bound or np.inf))

    expected = torch_ibau.perturbation(
        torch_twin(model),
        torch_batches(data, BATCH),
        clip=config.clip,
        optimizer=config.inner_optim,
        learning_rate=config.inner_lr,
        bound=config.norm_bound,
    )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(found) > 1e-3
    # Adam divides by the gradient's size, so that a pixel whose gradient is all but zero may go either way.
    tolerance = 1e-4 if config.inner_optim == "sgd" else 5e-3
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


NORM = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def test_in_normalised_space_it_is_torch_on_normalised_images(rng):
    """One whole round: the oracle gets the bare net, and images that are normalised already."""
    (bare, twin), data = twins(0), blobs(20)
    config = UnlearnConfig(n_rounds=1, batch_size=10, inner_lr=0.1, optim="sgd", lr=0.01, K=2, space="normalized")
    result = unlearn(Normalized(bare, NORM), data, config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (NORM.mean, NORM.std))
    images, labels = as_torch(data.images), torch.as_tensor(data.labels)
    batches = list(zip(((images - mean) / std).split(10), labels.split(10), strict=True))
    delta = torch_ibau.perturbation(twin, batches, clip=False, optimizer="sgd", learning_rate=0.1, bound=None)
    found = result.rounds[0].perturbation
    expected = (delta * std).numpy().transpose(0, 2, 3, 1)  # in units of the image range
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    assert result.rounds[0].perturbation_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    masks = [torch.as_tensor(mask) for mask in patched_images(key, np.ones((2, 10), np.float32), config.portion)]
    optimizer = torch.optim.SGD(twin.parameters(), lr=config.lr)
    torch_ibau.outer_round(twin, delta, batches, masks, optimizer=optimizer, terms=config.K, clip=False)
    after, before = dict(twin.named_parameters()), as_state_dict(nnx.state(bare))
    for path, leaf in nnx.to_flat_state(nnx.state(result.model.model, nnx.Param)):
        name = torch_name(path)
        start = before[name].detach().numpy()
        moved = after[name].detach().numpy() - start
        assert np.linalg.norm(to_torch(path, np.asarray(leaf[...])) - start - moved) <= 5e-3 * np.linalg.norm(moved), (
            name
        )


def test_shuffled_inner_batches_hold_the_same_images(rng):
    data = tiny_data(rng)
    config = UnlearnConfig(batch_size=BATCH, shuffle=True)
    model = Tiny(nnx.Rngs(0))
    stack = Stack([initial_state(model, config)], [data], [config], DEFAULT_EXECUTION)
    rounds = [stack.inner_batches(number) for number in (1, 1, 2)]
    seen = [batches.images[batches.weights > 0].reshape(COUNT, -1) for batches in rounds]
    labels = [batches.labels[batches.weights > 0] for batches in rounds]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    by_pixels = {image.tobytes(): label for image, label in zip(data.images, data.labels, strict=True)}
    for images, of_round in zip(seen, labels, strict=True):
        assert {image.tobytes(): label for image, label in zip(images, of_round, strict=True)} == by_pixels


@pytest.mark.parametrize("clip", [False, True])
def test_outer_round_matches_torch(rng, clip):
    """A whole outer round with the same δ and the same patched images, SGD so that errors are not normalised away."""
    model, data = randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), rng), vgg_data(rng)
    config = UnlearnConfig(batch_size=BATCH, clip=clip, optim="sgd", lr=0.01, portion=0.2)
    twin, batches = torch_twin(model), make_batches(data, BATCH)
    delta = 0.1 * rng.normal(size=(1, 32, 32, 3)).astype(np.float32)
    masks = np.asarray(patched_images(jax.random.key(3), batches.weights, config.portion))

    params, rest = split(model)
    carry = OuterCarry(params, make_optimizer(config.optim, config.lr).init(params), None)
    constants = OuterConstants(delta, jax.tree.map(lambda array: array[0], batches), rest)
    step = outer_step(make_apply(model, DEFAULT_EXECUTION), config)
    (params, _, _), losses = loop_of(
        step, carry, OuterBatch(batches, np.full(len(masks), config.lr, np.float32), masks), constants
    )

    torch_masks = [torch.as_tensor(mask[weight > 0]) for mask, weight in zip(masks, batches.weights, strict=True)]
    optimizer = torch.optim.SGD(twin.parameters(), lr=config.lr)
    expected = torch_ibau.outer_round(
        twin, as_torch(delta), torch_batches(data, BATCH), torch_masks, optimizer=optimizer, terms=config.K, clip=clip
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    after, before = dict(twin.named_parameters()), dict(torch_twin(model).named_parameters())
    for path, leaf in nnx.to_flat_state(params):
        name = torch_name(path)
        start = before[name].detach().numpy()
        moved = after[name].detach().numpy() - start
        found = to_torch(path, np.asarray(leaf[...])) - start
        assert np.linalg.norm(found - moved) <= 2e-3 * np.linalg.norm(moved), name


def test_loop_forms_agree(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    config = UnlearnConfig(n_rounds=2, batch_size=BATCH, inner_lr=1.0)
    one, other = (unlearn(model, data, config, execution=Execution(loop=form)) for form in ("python", "scan"))
    assert [r.number for r in one.rounds] == [1, 2]
    for a, b in zip(jax.tree.leaves(nnx.state(one.model)), jax.tree.leaves(nnx.state(other.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one.rounds[1].outer_loss, other.rounds[1].outer_loss, rtol=1e-4)


def test_going_on_from_a_state_equals_running_through(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    states = []
    config = UnlearnConfig(n_rounds=3, batch_size=BATCH, inner_lr=1.0)
    whole = unlearn(model, data, config, on_round=states.append)
    rest = unlearn(model, data, config, state=states[0])
    assert [r.number for r in rest.rounds] == [1, 2, 3]
    for a, b in zip(jax.tree.leaves(nnx.state(whole.model)), jax.tree.leaves(nnx.state(rest.model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_model_given_is_not_changed(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    before = jax.tree.map(np.array, nnx.state(model))
    result = unlearn(model, data, UnlearnConfig(n_rounds=1, batch_size=BATCH))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(result.model)), strict=True)
    )


def test_running_statistics_stay(rng):
    model = randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), rng)
    before = jax.tree.map(np.array, nnx.state(model, nnx.BatchStat))
    result = unlearn(model, vgg_data(rng, 8), UnlearnConfig(n_rounds=1))
    after = nnx.state(result.model, nnx.BatchStat)
    assert len(jax.tree.leaves(before)) == 12
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_keeps_the_last_good_round(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    states = []
    config = UnlearnConfig(n_rounds=5, batch_size=BATCH, inner_lr=1.0)
    good = unlearn(model, data, replace(config, n_rounds=2), on_round=states.append)
    ruined = replace(
        states[1],
        optimizer_state=jax.tree.map(
            lambda a: a * jnp.asarray(jnp.nan, a.dtype) if a.dtype == jnp.float32 else a, states[1].optimizer_state
        ),
    )
    result = unlearn(model, data, config, state=ruined)
    assert result.status == "diverged"
    assert len(result.rounds) == 2
    for a, b in zip(jax.tree.leaves(nnx.state(good.model)), jax.tree.leaves(nnx.state(result.model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_divergence_in_the_first_round_leaves_no_round(rng):
    result = unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng), UnlearnConfig(inner_lr=1e38, lr=1e38, optim="sgd"))
    assert (result.status, result.rounds) == ("diverged", ())


def test_a_clean_set_smaller_than_a_batch_works(rng):
    result = unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng, 3), UnlearnConfig(n_rounds=1, batch_size=100))
    assert result.status == "completed"


def test_filling_up_a_batch_changes_nothing(rng):
    """25 images in parts of at most 10 are filled up to 27."""
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    config = UnlearnConfig(n_rounds=1, inner_lr=1.0, batch_size=25)
    exact, filled = (unlearn(model, data, config, execution=Execution(microbatch=size)) for size in (None, 10))
    np.testing.assert_allclose(exact.rounds[0].perturbation, filled.rounds[0].perturbation, rtol=1e-4, atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(nnx.state(result.model)) for result in (exact, filled)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_empty_or_unfitting_clean_sets_are_refused(rng):
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng)
    with pytest.raises(DataError, match="empty"):
        unlearn(model, data.take(np.arange(0)))
    with pytest.raises(DataError, match="label 3, but the model has 3 classes"):
        unlearn(model, Dataset(data.images, np.full(COUNT, 3)))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), portion=st.floats(0.001, 1.0), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_patched_images_are_as_many_as_published_and_real(sizes, portion, seed):
    weights = np.zeros((len(sizes), 40), np.float32)
    for row, size in zip(weights, sizes, strict=True):
        row[:size] = 1
    mask = np.asarray(patched_images(jax.random.key(seed), weights, portion))
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert not (mask * (1 - weights)).any()
    expected = [max(1, int(portion * size + 1e-9)) for size in sizes]
    assert mask.sum(1).tolist() == expected


def test_all_perturbations_are_used_where_a_batch_has_fewer_images_for_them():
    """3 images of each of 40 batches for 8 perturbations: each misses one in (5/8)^40 of all keys."""
    chosen = assigned_images(jax.random.key(0), np.ones((40, 10), np.float32), 0.3, 8)
    assert np.array_equal(np.sum(chosen >= 0, axis=1), np.full(40, 3))
    assert set(chosen[chosen >= 0]) == set(range(8))


def test_patched_images_vary_with_the_key():
    weights = np.ones((1, 100), np.float32)
    chosen = {int(np.asarray(patched_images(jax.random.key(seed), weights, 0.01)).argmax()) for seed in range(40)}
    assert len(chosen) > 20


@given(scale=st.floats(1e-3, 1e4), bound=st.floats(0.1, 100))
@settings(max_examples=30, deadline=None)
def test_projection_onto_the_ball(scale, bound):
    delta = jnp.asarray(scale * np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32))
    projected = np.asarray(Pixel().project(delta, bound))
    norm = float(np.linalg.norm(np.asarray(delta)))
    assert np.linalg.norm(projected) <= bound * (1 + 1e-5) or norm <= bound
    if norm <= bound:
        np.testing.assert_allclose(projected, delta, rtol=1e-6)
    else:  # the nearest point of the ball lies in the same direction
        np.testing.assert_allclose(
            projected / np.linalg.norm(projected), np.asarray(delta) / norm, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"n_rounds": 0}, {"K": -1}, {"lr": -1.0}, {"lr": float("nan")}, {"portion": 0.0},
        {"portion": 1.5}, {"norm_bound": 0.0}, {"optim": "nosuch"}, {"optim": "apply_updates"}, {"regularization": -1.0},
        {"perturbations": 0}, {"min_batches": 0}, {"schedule": "linear"}, {"solver": "lu"}, {"space": "lab"}, {"spaces": ("sound",)},
        {"spaces": ("patch",)}, {"spaces": ("perturbation",), "space": "normalized"}, {"enlarge": 0.5},
        {"perturbations": 4, "batch_size": 3}, {"K": 1.5}, {"n_rounds": 2.0}, {"perturbations": True}, {"optim": "magic"}, {"consistency": -1.0}, {"b2": 1.0}, {"b2": -0.5}, {"solver": "cg", "renew": False}, {"solver": "cg", "spaces": ("perturbation",)}, {"unit": (1.0,)}, {"enlarge": np.inf}, {"sharpness": np.inf}, {"distillation": np.inf},
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(wrong):
    with pytest.raises(ConfigError):
        UnlearnConfig(**wrong)


@pytest.mark.parametrize(("b2", "torchs"), [(None, 0.999), (0.95, 0.95)])
def test_the_second_moments_decay_is_torchs(rng, b2, torchs):
    weights, gradients = rng.normal(size=5), rng.normal(size=(8, 5)) * np.geomspace(1, 30, 8)[:, None]
    params, theirs = jnp.asarray(weights), torch.nn.Parameter(torch.tensor(weights))
    ours, optimizer = make_optimizer("adam", 1e-2, b2), torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, torchs))
    state = ours.init(params)
    for gradient in gradients:
        updates, state = ours.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-4)


def test_optimisers_without_a_second_moment_have_no_decay_of_one():
    assert unlearned_by("sgd", 0.95) == unlearned_by("sgd", None)
    assert unlearned_by("lion", 0.5) == unlearned_by("lion", None)
    assert unlearned_by("adam", 0.95) != unlearned_by("adam", None)


def unlearned_by(name, b2):
    params = jnp.arange(3.0)
    optimizer = make_optimizer(name, 0.1, b2)
    state = optimizer.init(params)
    for scale in (1.0, 9.0):
        updates, state = optimizer.update(scale * params, state, params)
    return updates.tolist()


@pytest.mark.parametrize(
    "wrong", [{"optim": "lbfgs"}, {"optim": "scale"}, {"inner_optim": "scale_by_adam"}, {"optim": "freeze"}]
)
def test_what_is_no_optimiser_is_refused(rng, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
        unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng, 4), UnlearnConfig(n_rounds=1, **wrong))


def test_fewer_images_than_untargeted_perturbations_are_refused(rng):
    with pytest.raises(ConfigError, match="there are 3"):
        unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng, 3), UnlearnConfig(perturbations=4))


def test_optimisers_by_optax_name(rng):
    for name in ("Adam", "SGD", "adamw", "rmsprop", "lion", "rprop", "polyak_sgd"):
        assert unlearn(Tiny(nnx.Rngs(0)), tiny_data(rng, 4), UnlearnConfig(n_rounds=1, optim=name)).rounds
