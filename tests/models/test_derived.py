"""Heads of several linear layers in the place of a network's last one, as people put them there."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import load, save
from ibau_jax.errors import CheckpointError
from ibau_jax.models import get_architecture
from tests.oracles import torchvision_models
from tests.oracles.cifar_models import randomise, torch_oracle
from tests.oracles.twins import as_torch

CLASSES = 5


def thin_resnet(*head):
    module = torch_oracle("thin_resnet8", CLASSES, 32)
    module.linear = nn.Sequential(*head)
    return module


def resnet18(*head):
    module = torchvision_models.models.resnet18()
    module.fc = nn.Sequential(*head)
    return module


def vgg11(*head):
    module = torchvision_models.models.vgg11()
    module.classifier[6] = nn.Sequential(*head)
    return module


def vit(*head):
    module = torchvision_models.models.VisionTransformer(32, 8, 2, 2, 128, 512)
    module.heads.head = nn.Sequential(*head)
    return module


def grey_resnet18(*head):
    module = resnet18(*head)
    module.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return module


MODELS = {
    "thin_resnet8_head0x32_3": thin_resnet(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, CLASSES)),
    "thin_resnet8_head1x32_4x16_6": thin_resnet(
        nn.Dropout(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    ),
    "thin_resnet8_head0x32_1": thin_resnet(nn.Linear(64, 32), nn.Linear(32, CLASSES)),
    "resnet18_head0x256_3": resnet18(nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, CLASSES)),
    "resnet18_grey_head0x16_2": grey_resnet18(nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "vgg11_head0x16_2": vgg11(nn.Linear(4096, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "vit_w128_d2_p8_head0x16_2": vit(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
}
FAST = [name for name in MODELS if name.startswith(("thin", "vit"))]


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in FAST)) for one in MODELS])
@pytest.mark.parametrize("whole", [False, True])
def test_heads(tmp_path, name, whole, rng, compiled_quickly):
    torch.manual_seed(0)
    module = randomise(MODELS[name], seed=1).eval()
    torch.save(module if whole else {"model": module.state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=32)
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)
    assert get_architecture(name) is checkpoint.architecture
    images = rng.random((3, *checkpoint.input_shape), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth", weights_only=False)
    back = back.state_dict() if whole else back["model"]
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_a_whole_module_tells_what_its_head_does(tmp_path):
    head = (nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    torch.save(thin_resnet(*head), tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "thin_resnet8_head0x32_2_tanh"
    torch.save(thin_resnet(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, CLASSES)), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"linear\.1: sigmoid"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_softmax_counts_unless_it_is_the_last_layer(tmp_path, last):
    torch.save(thin_resnet(nn.Linear(64, CLASSES), last), tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "thin_resnet8"
    for head in (
        (nn.Linear(64, 32), last, nn.Linear(32, CLASSES)),
        (nn.Linear(64, CLASSES), nn.ReLU()),
        (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES), nn.ReLU()),
    ):
        torch.save(thin_resnet(*head), tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="but other layers"):
            load(tmp_path / "x.pth")


def test_what_is_between_the_layers_is_assumed_and_said(tmp_path):
    torch.save(thin_resnet(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES)).state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    others = {one.name for one in checkpoint.alternatives}
    assert others >= {f"thin_resnet8_head0x32_2_{name}" for name in ("tanh", "gelu", "linear")}
    assert "thin_resnet8_head0x32_2_tanh" in checkpoint.assumption_note()


def test_an_altered_network_with_a_head_opens_again(tmp_path):
    head = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    torch.save(thin_resnet(*head).state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", model="thin_resnet8+silu")
    save(checkpoint, tmp_path / "flax")
    assert load(tmp_path / "flax").architecture is checkpoint.architecture


@pytest.mark.parametrize("shape", [(CLASSES, 31), (CLASSES, 0)])
def test_layers_that_do_not_follow_one_another_are_no_head(tmp_path, shape):
    state = thin_resnet(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)).state_dict()
    state["linear.2.weight"] = torch.ones(shape)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="unknown architecture"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["thin_resnet8_head3x32_0", "thin_resnet8_head0x0_3", "nosuch_head0x2_1"])
def test_names_of_no_head(name):
    with pytest.raises(CheckpointError, match="no model"):
        get_architecture(name)
