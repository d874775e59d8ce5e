"""Weights that a file holds in another form, made by torch's own utilities and written back for them."""

import warnings
from collections import OrderedDict

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, prune

from ibau_jax import load, save
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from tests.oracles.cifar_models import randomise, torch_oracle
from tests.oracles.twins import as_torch
from tests.oracles.wrapped import with_masked_neurons

CLASSES = 5


def network():
    torch.manual_seed(0)
    return randomise(torch_oracle("thin_resnet8", CLASSES, 32), seed=1)


def layers(module):
    return [one for one in module.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]


def pruned(module):
    for layer in layers(module):
        prune.random_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(module.linear, "bias", 0.4)


def softly_masked(module):
    pruned(module)
    module.conv1.weight_mask.mul_(0.5)


def weight_normed(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in layers(module):
            nn.utils.weight_norm(layer)


def weight_normed_by_parametrization(module):
    for layer in layers(module):
        parametrizations.weight_norm(layer)


def spectral_normed(module):
    for layer in layers(module):
        nn.utils.spectral_norm(layer)
    module.train()(torch.rand(2, 3, 32, 32))  # iterates once


def spectral_normed_by_parametrization(module):
    for layer in layers(module):
        parametrizations.spectral_norm(layer)


def with_masked_neurons_without_noise(module):
    with_masked_neurons(module, noise=False)


CHANGES = [
    pruned,
    softly_masked,
    weight_normed,
    weight_normed_by_parametrization,
    spectral_normed,
    spectral_normed_by_parametrization,
    with_masked_neurons,
    with_masked_neurons_without_noise,
]


def logits(model, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(model(images))


def torch_logits(module, images):
    with torch.no_grad():
        return module.eval()(as_torch(images)).numpy()


def moved(model, rng):
    """The model with every weight a little different; none stays zero."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf * (1 + 0.01 * rng.random()) + 0.001, state))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("through_flax", [False, True])
def test_other_forms_are_read_and_written_back(tmp_path, change, through_flax, rng, compiled_quickly):
    module = network()
    change(module)
    module.eval()
    torch.save({"net": module.state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name == "thin_resnet8"
    assert checkpoint.beside_note() is None
    assert (checkpoint.masks_note() is not None) == ("mask" in change.__name__ or change is pruned)
    images = rng.random((4, 32, 32, 3), np.float32)
    np.testing.assert_allclose(logits(checkpoint.model(), images), torch_logits(module, images), rtol=1e-3, atol=1e-4)
    assert verify(checkpoint, tmp_path / "x.pth", torch_module=lambda classes: network()) <= 1e-4

    if through_flax:
        save(checkpoint, tmp_path / "flax")
        checkpoint = load(tmp_path / "flax")
    save(checkpoint, tmp_path / "y.pth")
    state, back = (torch.load(tmp_path / name)["net"] for name in ("x.pth", "y.pth"))
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)

    changed = checkpoint.with_weights(moved(checkpoint.network(), rng))
    save(changed, tmp_path / "z.pth")
    back = torch.load(tmp_path / "z.pth")["net"]
    module.load_state_dict(back)
    found, expected = logits(changed.model(), images), torch_logits(module, images)
    assert not np.allclose(found, logits(checkpoint.model(), images), rtol=1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    again = load(tmp_path / "z.pth")
    np.testing.assert_allclose(logits(again.model(), images), found, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def twice(state):
    """What MadryLab's robustness saves: the network in its attacker too, and the normalisation before both."""
    normalizer = {"new_mean": torch.full((3, 1, 1), 0.4), "new_std": torch.full((3, 1, 1), 0.2)}
    both = {f"module.normalizer.{name}": value for name, value in normalizer.items()}
    both |= {f"module.model.{name}": value for name, value in state.items()}
    both |= {f"module.attacker.normalize.{name}": value.clone() for name, value in normalizer.items()}
    return OrderedDict(both | {f"module.attacker.model.{name}": value.clone() for name, value in state.items()})


def test_a_network_that_is_there_twice_is_written_twice(tmp_path, rng, compiled_quickly):
    module = network()
    torch.save({"model": twice(module.state_dict())}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.normalization.mean == pytest.approx((0.4,) * 3)
    save(checkpoint, tmp_path / "y.pth")
    state, back = (torch.load(tmp_path / name)["model"] for name in ("x.pth", "y.pth"))
    assert all(torch.equal(back[name], state[name]) for name in state)
    changed = checkpoint.with_weights(moved(checkpoint.network(), rng))
    save(changed, tmp_path / "z.pth")
    back = torch.load(tmp_path / "z.pth")["model"]
    for name in module.state_dict():
        assert torch.equal(back[f"module.model.{name}"], back[f"module.attacker.model.{name}"])
        assert name.endswith("tracked") or not torch.equal(back[f"module.model.{name}"], state[f"module.model.{name}"])


def test_two_networks_that_differ_are_not_one(tmp_path):
    state = twice(network().state_dict())
    state["module.attacker.model.linear.bias"] += 1
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"tensors beside it may take part.*--leave-out"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("change", [weight_normed, weight_normed_by_parametrization])
def test_an_output_that_became_zero_is_zero_in_torch_too(tmp_path, change, rng):
    module = network()
    change(module)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    model = checkpoint.network()
    kernel = model.conv1.kernel
    kernel.set_value(kernel.get_value().at[..., 0].set(0))
    save(checkpoint.with_weights(model), tmp_path / "y.pth")
    module.load_state_dict(torch.load(tmp_path / "y.pth"))
    images = rng.random((2, 32, 32, 3), np.float32)
    np.testing.assert_allclose(torch_logits(module, images), logits(model, images), rtol=1e-3, atol=1e-3)


def test_a_spectral_norm_along_another_axis_is_not_folded(tmp_path):
    module = network()
    nn.utils.spectral_norm(module.layer1[0].conv1, dim=1)
    module.train()(torch.rand(2, 3, 32, 32))
    torch.save(module.eval().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="layer1.0.conv1.weight"):
        load(tmp_path / "x.pth")


def test_a_mask_of_another_shape_is_no_mask(tmp_path):
    module = network()
    pruned(module)
    state = module.state_dict()
    state["conv1.weight_mask"] = torch.ones(3)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="conv1.weight"):
        load(tmp_path / "x.pth")
