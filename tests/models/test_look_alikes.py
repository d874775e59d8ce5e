"""Networks with the names and shapes of others: computed as PyTorch computes them, and told apart by clean images."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from ibau_jax import NORMALIZATIONS, load, load_dataset, make_dataset, save
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request, abstract_shapes
from ibau_jax.checkpoints.variants import check_evidence, discrepancies, weigh
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from ibau_jax.models import architectures, get_architecture, variants
from tests.checkpoints.test_conversion import random_vgg
from tests.oracles.cifar_models import WideResNet, randomise
from tests.oracles.look_alikes import LOOK_ALIKES, calibrated
from tests.oracles.twins import as_torch

CLASSES, SIZE = 10, 32
# Compiling is what takes time: the others are run with the slow tests.
FAST = {"wide_resnet10_1_leaky_raw", "wide_resnet10_1_raw"}
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LOOK_ALIKES]

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def saved(module, path):
    torch.save(module.state_dict(), path)
    return path


def made(name):
    torch.manual_seed(0)
    return randomise(LOOK_ALIKES[name](CLASSES), seed=1)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", (SIZE, SIZE, 3))


def trained_statistics(module, images, normalization=None):
    inputs = as_torch(images.images[:200].astype(np.float32) / 255)
    if normalization:
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (normalization.mean, normalization.std))
        inputs = (inputs - mean) / std
    return calibrated(module, inputs)


@pytest.mark.parametrize("name", ALL)
def test_the_variant_computes_what_pytorch_does(name, tmp_path, rng):
    module, images = made(name), rng.random((3, SIZE, SIZE, 3), np.float32)
    checkpoint = load(saved(module, tmp_path / "x.pth"), model=name, image_size=SIZE)
    assert checkpoint.alternatives == ()
    with torch.no_grad():
        expected = module(as_torch(images)).numpy()
    assert np.abs(np.asarray(checkpoint.model()(images)) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ALL)
def test_clean_images_tell_which_it_is(name, tmp_path, digits):
    """Statistics by PyTorch's own training mode on other images; labels are not needed."""
    path = saved(trained_statistics(made(name), digits), tmp_path / "x.pth")
    checkpoint = load(path, image_size=SIZE)
    assert checkpoint.architecture.name == get_architecture(name).variant_of
    assert name in [one.name for one in checkpoint.alternatives]
    others = digits.take(np.arange(400, 480))
    evidence = weigh(checkpoint, make_dataset(others.images, np.zeros(80, int), "without labels"), None)
    assert evidence[0].architecture.name == name, list(map(str, evidence))
    check_evidence(evidence)


def test_the_most_common_network_is_chosen_where_it_is_the_right_one(tmp_path, digits):
    torch.manual_seed(0)
    module = trained_statistics(randomise(WideResNet(10, 1, CLASSES), 1), digits, NORMALIZATIONS["cifar10"])
    checkpoint = load(saved(module, tmp_path / "x.pth"))
    evidence = weigh(checkpoint, digits.take(np.arange(400, 480)), NORMALIZATIONS["cifar10"])
    assert evidence[0].architecture.name == "wide_resnet10_1"
    check_evidence(evidence)


def with_activations(function):
    """A small VGG whose activations are another function."""
    module = random_vgg(CLASSES)
    for index, layer in enumerate(module.features):
        if isinstance(layer, nn.ELU):
            module.features[index] = function
    return module


@pytest.mark.parametrize("function", [nn.ReLU(), nn.SiLU(), nn.Sigmoid()])
def test_a_network_that_nobody_registered_is_refused(tmp_path, digits, function):
    module = trained_statistics(with_activations(function), digits)
    checkpoint = load(saved(module, tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="another network with the same names and shapes"):
        check_evidence(weigh(checkpoint, digits.take(np.arange(400, 480)), None))


class OneNorm(nnx.Module):
    """BatchNorm of the images themselves."""

    def __init__(self, mean, variance):
        self.bn = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
        self.bn.mean[...], self.bn.var[...] = jnp.asarray([mean]), jnp.asarray([variance])

    def __call__(self, x):
        return self.bn(x).mean((1, 2))


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.1), (0.2, 0.1), (0.5, 2.0), (3.0, 1.0)])
def test_discrepancy_is_the_squared_hellinger_distance(mean, variance, rng):
    """By numerical integration over both densities; the images' statistics are NumPy's."""
    images = rng.random((20, 8, 8, 1), np.float32)

    def density(mean, variance):
        return np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    grid = np.linspace(-20, 20, 400_001)
    product = np.sqrt(density(mean, variance) * density(images.mean(), images.var()))
    (distance,) = discrepancies(OneNorm(mean, variance), images)
    np.testing.assert_allclose(distance, 1 - np.trapezoid(product, grid), atol=1e-4)


def test_every_variant_has_the_state_dict_of_its_base():
    """Else it would never be among the candidates."""
    families = ("resnet18", "resnet50_small_stem", "preact_resnet18", "wide_resnet10_1", "mobilenet_v2")
    named = [one for one in architectures() if one.variant_of in families]
    assert len(named) == 3 + 4 + 1 + 3 + 2
    for variant in named:
        base = get_architecture(variant.variant_of)
        assert abstract_shapes(variant, 7, SIZE) == abstract_shapes(base, 7, SIZE)
        assert variants(variant) == variants(base)
        assert variants(base)[0] is base


def test_what_is_assumed_is_said_everywhere(tmp_path):
    path = saved(made("wide_resnet10_1_raw"), tmp_path / "x.pth")
    report = inspect_file(path, Request())
    assert report.variants == tuple(f"wide_resnet10_1{suffix}" for suffix in ("", "_leaky_raw", "_leaky", "_raw"))
    note = load(path).assumption_note()
    assert "taken as wide_resnet10_1, the most common" in note
    assert "wide_resnet10_1_raw" in note
    save(load(path), tmp_path / "flax")
    assert load(tmp_path / "flax").assumption_note() == note
    assert load(tmp_path / "flax", model="wide_resnet10_1_raw").assumption_note() is None
    manifest = tmp_path / "flax" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "alternatives": ["vgg16"]}))
    with pytest.raises(CheckpointError, match="other names and shapes"):
        load(tmp_path / "flax")
    del content["alternatives"]  # as an earlier version wrote it
    manifest.write_text(json.dumps(content))
    assert load(tmp_path / "flax").assumption_note() == note
    chosen = load(path).as_variant(get_architecture("wide_resnet10_1_raw"))
    save(chosen, tmp_path / "chosen")
    assert load(tmp_path / "chosen").architecture.name == "wide_resnet10_1_raw"
    assert load(tmp_path / "chosen").assumption_note() is None


def test_a_module_that_shares_the_assumption_verifies_nothing(tmp_path):
    name = "wide_resnet10_1_raw"
    path = saved(made(name), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="would share the assumption"):
        verify(load(path), path)
    with pytest.raises(CheckpointError, match="differ from PyTorch's"):
        verify(load(path), path, torch_module=LOOK_ALIKES[name])
    assert verify(load(path, model=name), path, torch_module=LOOK_ALIKES[name]) <= 1e-5
