"""Networks with the names and shapes of others: computed as PyTorch computes them, and told apart by clean images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from ibau_jax import NORMALIZATIONS, load, load_dataset, make_dataset, save
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request, abstract_shapes
from ibau_jax.checkpoints.variants import check_evidence, weigh
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from ibau_jax.models import get_architecture, variants
from ibau_jax.models.alterations import FAINT
from ibau_jax.models.running_statistics import DiscrepancyExceeded, discrepancies
from ibau_jax.models.small_vgg import torch_module
from tests.checkpoints.test_conversion import random_vgg
from tests.cli.commands import EXAMPLE
from tests.oracles.cifar_models import WideResNet, randomise
from tests.oracles.look_alikes import LOOK_ALIKES, calibrated, resnet
from tests.oracles.twins import as_torch

CLASSES, SIZE = 10, 32
# Compiling is what takes time: the others are run with the slow tests.
FAST = {"wide_resnet10_1_leaky_raw", "wide_resnet10_1_raw"}


def slow_where(slow, names):
    """The names as parameters, some of them run with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if slow(name) else ()) for name in names]


ALL = slow_where(lambda name: name not in FAST, LOOK_ALIKES)


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


@pytest.mark.usefixtures("compiled_quickly")
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


def patchwork():
    """Images of 8x8 random squares: enough independent content that a hundred tell what a thousand would."""
    squares = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    return make_dataset(squares.repeat(4, 1).repeat(4, 2), np.arange(300) % CLASSES, "patchwork")


def small_vgg(activation=None, pool=None):
    """A small VGG, its activations and poolings replaced; without dropout, which random weights are not used to."""
    module = random_vgg(CLASSES)
    for index, layer in enumerate(module.features):
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.ELU) and activation:
            module.features[index] = activation
        if isinstance(layer, nn.MaxPool2d) and pool:
            module.features[index] = pool
    return module


def resnet18(pool=None, last_stride=2, epsilon=1e-5):
    """torchvision's with a 3x3 stem, its max pooling, last stride and BatchNorm's ε replaced."""
    module = resnet(18, CLASSES, kernel=3, stride=1)
    module.maxpool = pool or module.maxpool
    module.layer4[0].conv1.stride = module.layer4[0].downsample[0].stride = (last_stride, last_stride)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = epsilon
    return randomise(module, seed=1)


ALTERED = {
    "small_vgg+relu": lambda: small_vgg(nn.ReLU()),
    "small_vgg+relu6": lambda: small_vgg(nn.ReLU6()),
    "small_vgg+leaky_relu": lambda: small_vgg(nn.LeakyReLU()),
    "small_vgg+leaky_relu0.1": lambda: small_vgg(nn.LeakyReLU(0.1)),
    "small_vgg+leaky_relu0.2": lambda: small_vgg(nn.LeakyReLU(0.2)),
    "small_vgg+selu": lambda: small_vgg(nn.SELU()),
    "small_vgg+silu": lambda: small_vgg(nn.SiLU()),
    "small_vgg+gelu": lambda: small_vgg(nn.GELU()),
    "small_vgg+hardswish": lambda: small_vgg(nn.Hardswish()),
    "small_vgg+mish": lambda: small_vgg(nn.Mish()),
    "small_vgg+tanh": lambda: small_vgg(nn.Tanh()),
    "small_vgg+avg_pool": lambda: small_vgg(pool=nn.AvgPool2d(2)),
    "small_vgg+pool3": lambda: small_vgg(pool=nn.MaxPool2d(3, 2, 1)),
    "small_vgg+silu+avg_pool": lambda: small_vgg(nn.SiLU(), nn.AvgPool2d(2)),
    "small_vgg+relu+avg_pool": lambda: small_vgg(nn.ReLU(), nn.AvgPool2d(2)),
    "resnet18_small_stem_max_pool+avg_pool": lambda: resnet18(nn.AvgPool2d(3, 2, 1)),
    "resnet18_small_stem_max_pool+pool2": lambda: resnet18(nn.MaxPool2d(2)),
    "resnet18_small_stem_max_pool+pool_ceil": lambda: resnet18(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "resnet18_small_stem_max_pool+last_stride1": lambda: resnet18(last_stride=1),
    "resnet18_small_stem_max_pool+eps1e-3": lambda: resnet18(epsilon=1e-3),
}
TOLD = [name for name in ALTERED if not name.endswith(FAINT)]
FEW = ("small_vgg+leaky_relu0.2",)


@pytest.mark.parametrize("name", slow_where(lambda name: name.startswith("resnet"), ALTERED))
@pytest.mark.usefixtures("compiled_quickly")
def test_an_altered_network_computes_what_pytorch_does(name, tmp_path, rng):
    module, images = ALTERED[name]().eval(), 3 * rng.random((3, SIZE, SIZE, 3), np.float32)
    checkpoint = load(saved(module, tmp_path / "x.pth"), model=name)
    with torch.no_grad():
        expected = module(as_torch(images)).numpy()
    logits = np.asarray(checkpoint.model()(images))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    base = load(tmp_path / "x.pth", model=name.partition("+")[0]).model()(images)
    assert np.abs(np.asarray(base) - expected).max() > 1e-4 * np.abs(expected).max()  # else this would show nothing


@pytest.mark.parametrize("name", slow_where(lambda name: name not in FEW, TOLD))
def test_clean_images_tell_how_it_is_altered(name, tmp_path):
    """Statistics by PyTorch's own training mode on other images; labels say nothing."""
    module = trained_statistics(ALTERED[name](), patchwork())
    path = saved(module, tmp_path / "x.pth")
    checkpoint = load(path)
    evidence = weigh(checkpoint, patchwork().take(np.arange(200, 300)), None)
    assert evidence[0].architecture.name == name, list(map(str, evidence))
    check_evidence(evidence)
    save(checkpoint.as_variant(evidence[0].architecture), tmp_path / "flax")
    assert load(tmp_path / "flax").architecture.name == name
    save(load(tmp_path / "flax"), tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(value, back[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    "name", ["small_vgg+no", "small_vgg+", "+silu", "small_vgg+elu", "small_vgg+last_stride1", "small_vgg+relu+silu"]
)
def test_what_alters_nothing_is_no_model(name, tmp_path):
    path = saved(small_vgg(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="there is no model"):
        load(path, model=name)


@pytest.mark.slow
@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.Softplus()])
def test_a_network_that_nobody_registered_is_refused(tmp_path, function):
    module = trained_statistics(small_vgg(function), patchwork())
    checkpoint = load(saved(module, tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="another network with the same names and shapes"):
        check_evidence(weigh(checkpoint, patchwork().take(np.arange(200, 300)), None))


@pytest.mark.slow
def test_a_network_whose_weights_changed_after_its_statistics_is_no_other(tmp_path, digits):
    """Fine-tuning with frozen statistics, as unlearning does it: labels tell that it is the network all the same."""
    torch.manual_seed(0)
    module, content = torch_module(10), torch.load(EXAMPLE, weights_only=True)
    module.load_state_dict(content["net"])
    images, labels = as_torch(digits.images[:400].astype(np.float32) / 255), torch.tensor(digits.labels[:400])
    optimizer = torch.optim.Adam(module.eval().parameters(), 3e-3)
    for start in range(0, 400, 20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images[start : start + 20]), labels[start : start + 20]).backward()
        optimizer.step()
    torch.save({**content, "net": module.state_dict()}, tmp_path / "x.pth")
    others = digits.take(np.arange(400, 800))
    evidence = weigh(load(tmp_path / "x.pth"), others, None)
    assert (evidence[0].architecture.name, evidence[0].is_plausible, evidence[0].is_changed) == (
        "small_vgg",
        False,
        True,
    )
    check_evidence(evidence)
    unrelated = make_dataset(others.images, np.random.default_rng(0).permutation(others.labels), "unrelated")
    with pytest.raises(CheckpointError, match="another network with the same names and shapes"):
        check_evidence(weigh(load(tmp_path / "x.pth"), unrelated, None))


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
    (distance,), _ = discrepancies(OneNorm(mean, variance), images)
    np.testing.assert_allclose(distance, 1 - np.trapezoid(product, grid), atol=1e-4)


def test_a_model_stops_where_its_limit_is_exceeded(rng):
    images = rng.random((20, 8, 8, 1), np.float32)
    (distance,), _ = discrepancies(OneNorm(0.2, 0.1), images)
    assert discrepancies(OneNorm(0.2, 0.1), images, 1.01 * distance)[0] == distance
    with pytest.raises(DiscrepancyExceeded):
        discrepancies(OneNorm(0.2, 0.1), images, 0.99 * distance)


class OneCompiledNorm(OneNorm):
    """As a user's own model may be."""

    __call__ = nnx.jit(OneNorm.__call__)


class UnusedNorm(OneNorm):
    """Its BatchNorm reads what it recorded, whatever the mode."""

    def __call__(self, x):
        return self.bn(x, use_running_average=True).mean((1, 2))


class RectifiedNorm(nnx.BatchNorm):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


class TwoNorms(OneNorm):
    """The second reads what the first makes of the images."""

    def __init__(self):
        super().__init__(0.5, 0.1)
        self.bn = RectifiedNorm(1, rngs=nnx.Rngs(0))
        self.second = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(self.bn(x)).mean((1, 2))


class MappedNorm(OneNorm):
    """One image after another, where nothing can be recorded."""

    def __call__(self, x):
        return jax.vmap(lambda image: OneNorm.__call__(self, image[None])[0])(x)


def test_users_own_models_run_as_they_are_written(rng):
    images = rng.random((20, 8, 8, 1), np.float32)
    (distance,), _ = discrepancies(OneNorm(0.2, 0.1), images)
    (compiled,), _ = discrepancies(OneCompiledNorm(0.2, 0.1), images)
    assert compiled == pytest.approx(distance)
    assert len(discrepancies(UnusedNorm(0.2, 0.1), images)[0]) == 0
    assert len(discrepancies(MappedNorm(0.2, 0.1), images)[0]) == 0
    _, statistics = discrepancies(TwoNorms(), images)
    rectified = np.maximum(images - images.mean(), 0) / np.sqrt(images.var() + 1e-5)
    np.testing.assert_allclose(statistics["second",], [[rectified.mean()], [rectified.var()]], rtol=1e-4)


def test_every_variant_has_the_state_dict_of_its_base():
    """Else it would never be among the candidates."""
    families = ("resnet18", "resnet50_small_stem", "preact_resnet18", "wide_resnet10_1", "mobilenet_v2")
    named = [one for name in families for one in variants(get_architecture(name))[1:]]
    assert len(named) == 5 + 4 + 1 + 3 + 2
    for variant in named:
        base = get_architecture(variant.variant_of)
        assert abstract_shapes(variant, 7, base.image_sizes[0]) == abstract_shapes(base, 7, base.image_sizes[0])
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
