"""What each defence follows, against PyTorch autograd; BatchNorm in training mode where the defence has it so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from ibau_jax.augmentation import augmented, may_mirror
from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.defences import get_defence
from ibau_jax.defences.anp import AnpConfig, anp_losses, masks_of, name_of, norms_of, pruned, worst_noise
from ibau_jax.defences.fine_pruning import last_convolution, prune, without
from ibau_jax.defences.ft_sam import sam_gradient
from ibau_jax.defences.nad import NadConfig, nad_gradient
from ibau_jax.defences.neural_cleanse import patched_gradient
from ibau_jax.defences.sau import SauConfig, sau_gradient
from ibau_jax.defences.tuning import Sample, cross_entropy_gradient
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION
from ibau_jax.functional import make_run, split_weights, training_copy
from tests.defences.twin import blobs, flat, twins
from tests.oracles import torch_defences
from tests.oracles.twins import as_torch
from tests.unlearning.test_loop import Tiny

KEY = jax.random.key(0)


def sample(count=12):
    data = blobs(count)
    ours = Sample(jnp.asarray(data.images), jnp.asarray(data.labels), KEY)
    return ours, (as_torch(data.images), torch.tensor(data.labels))


def assert_same(found, expected, tolerance=2e-4):
    named = {torch_name(path): to_torch(path, np.asarray(leaf[...])) for path, leaf in flat(found)}
    assert set(named) == set(expected)
    whole = np.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    for name, gradient in expected.items():
        apart = np.linalg.norm(named[name] - gradient.numpy())
        assert apart <= tolerance * max(float(gradient.norm()), 0.01 * whole), name


def in_training(seed):
    model, module = twins(seed)
    copy = training_copy(model)
    return split_weights(copy), make_run(copy), module.train()


def test_fine_tuning_and_batch_norms_statistics():
    weights, run, module = in_training(0)
    ours, (images, labels) = sample()
    slope = cross_entropy_gradient(run)(weights, ours, weights)
    expected = torch_defences.gradients(module, functional.cross_entropy(module(images), labels))
    assert_same(slope.gradient, expected)
    statistics = {torch_name(path): np.asarray(leaf[...]) for path, leaf in flat(slope.rest)}
    biased = module.features[1].running_mean
    np.testing.assert_allclose(statistics["features.1.running_mean"], biased, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_sam(rho):
    weights, run, module = in_training(1)
    ours, (images, labels) = sample()
    slope = sam_gradient(run, rho, 0.1)(weights, ours, weights)
    assert_same(slope.gradient, torch_defences.sam(module, images, labels, rho, 0.1), 1e-3)


@pytest.mark.slow
def test_sau():
    (model, module), (before, before_module) = twins(2), twins(3)
    config = SauConfig(steps=3)
    ours, (images, labels) = sample(24)
    slope = sau_gradient(make_run(model), config)(split_weights(model), ours, split_weights(before))
    search = {"bound": 0.2, "steps": 3, "adversarial": 0.01, "shared": 1.0}
    expected, poisoned = torch_defences.sau(module, before_module, images, labels, **search)
    assert poisoned > 0
    assert_same(slope.gradient, expected, 1e-3)


def test_nad():
    (model, _), (teacher, teacher_module) = twins(4), twins(5)
    weights, run, module = in_training(4)
    ours, (images, labels) = sample()
    gradient = nad_gradient(run, make_run(model), NadConfig(betas=(500.0, 700.0, 900.0)))
    slope = gradient(weights, ours, split_weights(teacher))
    # The last features of 8x8, in front of the pooling, and of 4x4; two of the three weights.
    expected = torch_defences.attention_distance(module, teacher_module, images, labels, (2, 6), (700.0, 900.0))
    assert_same(slope.gradient, expected)


def test_anp_masks_and_noise():
    model, module = twins(6)
    copy, norms = training_copy(model), norms_of(model)
    weights, module = split_weights(copy), module.train()
    ours, (images, labels) = sample()
    masks = {name_of(path): jnp.linspace(0.3, 1, size) for path, size in zip(norms, (5, 6), strict=True)}
    loss = anp_losses(make_run(copy), norms, weights, ours.images, ours.labels)
    scales, shifts = worst_noise(loss, masks, KEY, 0.4)
    as_tensors = [{name: torch.tensor(np.asarray(v)) for name, v in part.items()} for part in (masks, scales, shifts)]
    expected = functional.cross_entropy(torch_defences.noisy(module, *as_tensors)(images), labels)
    np.testing.assert_allclose(loss(masks, scales, shifts), expected.item(), rtol=1e-4)
    for part in (scales, shifts):
        assert max(float(jnp.abs(noise).max()) for noise in part.values()) <= 0.8
        assert min(float(jnp.abs(noise).max()) for noise in part.values()) > 0.4  # a random one, and a step
    none = jax.tree.map(jnp.zeros_like, masks)
    assert loss(masks, scales, shifts) > loss(masks, none, none)


def test_anp_prunes_scales_below_the_threshold():
    model, module = twins(7)
    norms = norms_of(model)
    masks = {name_of(norms[0]): jnp.asarray([0.1, 0.9, 0.2, 0.19, 1.0]), name_of(norms[1]): jnp.ones(6)}
    found = pruned(model, masks, 0.2)
    with torch.no_grad():
        module.features[1].weight *= torch.tensor([0.0, 1, 1, 0, 1])
        expected = module(as_torch(blobs(5).images)).numpy()
    np.testing.assert_allclose(found(jnp.asarray(blobs(5).images)), expected, rtol=1e-3, atol=1e-4)


def test_anp_needs_batch_norm():

    with pytest.raises(ConfigError, match="has none"):
        norms_of(Tiny(nnx.Rngs(0)))


def test_anp_keeps_what_accuracy_needs():
    model = get_defence("ft")(twins(8)[0], blobs(128), quick("ft"))
    config = replace(AnpConfig(), epochs=6, batch_size=32, crop=0)
    masks = masks_of(model, blobs(128), config, DEFAULT_EXECUTION, None)
    values = np.concatenate([np.asarray(mask) for mask in masks.values()])
    assert ((values >= 0) & (values <= 1)).all()
    assert values.max() > 0.9


def test_fp_prunes_the_most_dormant_channels():
    model, module = twins(9)
    data = blobs(60)
    with torch.no_grad():
        activity = module.features[:7](as_torch(data.images)).mean((0, 2, 3)).numpy()
    last = last_convolution(model, data)
    assert (last.conv, last.norm) == (("features", 4), ("features", 5))
    np.testing.assert_allclose(last.activity, activity, rtol=1e-3, atol=1e-5)
    chosen = np.argsort(activity)[:2]
    with torch.no_grad():
        features = module.features[:7](as_torch(data.images))
        features[:, chosen] = 0
        expected = module.classifier(module.flatten(features)).numpy()
    np.testing.assert_allclose(without(model, last, chosen)(jnp.asarray(data.images)), expected, rtol=1e-3, atol=1e-4)


def test_fp_prunes_no_more_than_accuracy_allows():
    data = blobs(128)
    config = quick("fp")
    model = get_defence("ft")(twins(10)[0], data, quick("ft"))
    found = prune(model, data, config)
    accuracy = [np.mean(np.argmax(some(jnp.asarray(data.images)), 1) == data.labels) for some in (model, found)]
    assert accuracy[1] >= accuracy[0] - config.max_acc_drop
    assert any(float(jnp.abs(found.features[5].scale[...][channel])) == 0 for channel in range(6))


def test_nc_patches_a_fifth_in_turn():
    weights, run, module = in_training(11)
    ours, (images, labels) = sample(20)
    rng = np.random.default_rng(0)
    patches = [
        {"mask": jnp.asarray(rng.random((8, 8, 1))), "pattern": jnp.asarray(rng.random((8, 8, 3)))} for _ in range(2)
    ]
    slope = patched_gradient(run, patches, 0.2)(weights, ours, weights)
    images = images.clone()
    for index in range(4):
        mask, pattern = (as_torch(patches[index % 2][name][None])[0] for name in ("mask", "pattern"))
        images[index] = images[index] * (1 - mask) + mask * pattern
    assert_same(slope.gradient, torch_defences.gradients(module, functional.cross_entropy(module(images), labels)))


def quick(name):
    config = get_defence(name).config()
    return replace(config, epochs=6, batch_size=32, lr=min(config.lr, 0.05), crop=0)


def test_the_schedule_is_pytorchs_sgd_with_a_cosine():
    """Two epochs of fine-tuning, the same images in the same order."""
    model, module = twins(12)
    data, config = blobs(64), replace(get_defence("ft").config(), epochs=2, batch_size=32, crop=0, lr=0.1)
    seen = []
    found = get_defence("ft")(model, data, config, on_epoch=lambda number, count: seen.append((number, count)))
    assert seen == [(1, 2), (2, 2)]
    optimizer = torch.optim.SGD(module.train().parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    shuffled, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    for _ in range(2):
        for part in shuffled.permutation(64).reshape(2, 32):
            now, _, key = jax.random.split(key, 3)
            images = augmented(now, jnp.asarray(data.images[part]), 0, may_mirror("tolerated", model, data))
            optimizer.zero_grad()
            functional.cross_entropy(module(as_torch(images)), torch.tensor(data.labels[part])).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        expected = module.eval()(as_torch(data.images)).numpy()
    logits = found(jnp.asarray(data.images))
    # PyTorch's running variance is that of a sample, Flax's that of a population.
    assert np.linalg.norm(logits - expected) < 0.02 * np.linalg.norm(expected)
    assert np.mean(np.argmax(logits, 1) == np.argmax(expected, 1)) > 0.95
