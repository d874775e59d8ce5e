"""Networks of RGB images whose first convolution was replaced by one of a single input, as people do for grey images."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import UnlearnConfig, load, make_dataset, save, unlearn
from ibau_jax.models import get_architecture
from tests.oracles import torchvision_models
from tests.oracles.cifar_models import randomise, torch_oracle
from tests.oracles.twins import as_torch

CLASSES = 5


def grey_resnet18():
    module = torchvision_models.models.resnet18(num_classes=CLASSES)
    module.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return module


def grey_thin_resnet():
    module = torch_oracle("thin_resnet8", CLASSES, 32)
    module.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
    return module


def grey_mobilenet():
    module = torchvision_models.models.mobilenet_v2(num_classes=CLASSES)
    module.features[0][0] = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
    return module


def grey_vit():
    module = torchvision_models.models.VisionTransformer(32, 8, 2, 2, 128, 512, num_classes=CLASSES)
    module.conv_proj = nn.Conv2d(1, 128, 8, 8)
    return module


MODELS = {
    "resnet18_grey": grey_resnet18,
    "thin_resnet8_grey": grey_thin_resnet,
    "mobilenet_v2_grey": grey_mobilenet,
    "vit_w128_d2_p8_grey": grey_vit,
}
SLOW = ("mobilenet_v2_grey",)


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in MODELS])
def test_grey(tmp_path, name, rng, compiled_quickly):
    torch.manual_seed(0)
    module = randomise(MODELS[name](), seed=1).eval()
    torch.save(module.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=32)
    assert checkpoint.architecture.name == name
    assert checkpoint.input_shape == (32, 32, 1)
    assert all(one.name.endswith("_grey") and one.channels == 1 for one in checkpoint.alternatives)
    assert get_architecture(name) is checkpoint.architecture
    images = rng.random((3, 32, 32, 1), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth")
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_an_unlearning_round(tmp_path, rng, compiled_quickly):
    torch.save(randomise(grey_thin_resnet(), seed=1).state_dict(), tmp_path / "x.pth")
    data = make_dataset(rng.random((4, 32, 32, 1), np.float32), rng.integers(0, CLASSES, 4), "tiny")
    config = UnlearnConfig(n_rounds=1, batch_size=2, K=2, inner_optim="sgd", inner_lr=0.1, lr=1e-4, portion=0.5)
    result = unlearn(load(tmp_path / "x.pth").model(), data, config)
    assert np.isfinite([result.rounds[0].inner_loss, result.rounds[0].outer_loss]).all()
