"""Other heads in the place of a network's last layer or classifier, or beside its body, as people put them there."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import load, save
from ibau_jax.checkpoints.variants import weigh
from ibau_jax.data import Dataset
from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models import get_architecture
from ibau_jax.models.layers import ABSTRACT
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


def vgg11_bn(head):
    module = torchvision_models.models.vgg11_bn()
    module.classifier = head
    return module


def alexnet(head):
    module = torchvision_models.models.alexnet()
    module.classifier = head
    return module


def with_classifier(name, *head):
    module = getattr(torchvision_models.models, name)()
    module.classifier = nn.Sequential(*head)
    return module


def vit_heads(*head):
    module = torchvision_models.models.VisionTransformer(32, 8, 2, 2, 128, 512)
    module.heads = nn.Sequential(*head)
    return module


def without_bias(module, name):
    layer = getattr(module, name)
    setattr(module, name, nn.Linear(layer.in_features, CLASSES, bias=False))
    return module


def two_layers(features, width=16):
    """As tutorials have them: dropout, a hidden layer, ReLU."""
    return nn.Dropout(0.2), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, CLASSES)


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
    "thin_resnet8_head0x32_1bn_4": thin_resnet(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, CLASSES)
    ),
    "thin_resnet8_head0x32_2bn_4": thin_resnet(
        nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, CLASSES)
    ),
    "thin_resnet8_head0bn_2x32nobias_3bn_6nobias": thin_resnet(
        *(nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(32, CLASSES, bias=False)),
    ),
    "thin_resnet8_head0ln_1": thin_resnet(nn.LayerNorm(64), nn.Linear(64, CLASSES)),
    "thin_resnet8_headnobias": without_bias(torch_oracle("thin_resnet8", CLASSES, 32), "linear"),
    "thin_resnet8_head1nobias": thin_resnet(nn.Dropout(), nn.Linear(64, CLASSES, bias=False)),
    "resnet18_headnobias": without_bias(torchvision_models.models.resnet18(), "fc"),
    "vgg11_bn_classifier": vgg11_bn(nn.Linear(25088, CLASSES)),
    "vgg11_bn_classifier0x16_3": vgg11_bn(
        nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES))
    ),
    "vgg11_bn_classifier0x16_1bn_4": vgg11_bn(
        nn.Sequential(nn.Linear(25088, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES))
    ),
    "alexnet_classifier": alexnet(nn.Linear(9216, CLASSES)),
    "alexnet_classifier1x16_3": alexnet(nn.Sequential(*two_layers(9216))),
    "mobilenet_v2_classifier1x16_3": with_classifier("mobilenet_v2", *two_layers(1280)),
    "mobilenet_v3_small_classifier1x16_3": with_classifier("mobilenet_v3_small", *two_layers(576)),
    "efficientnet_b0_classifier1x16_3": with_classifier("efficientnet_b0", *two_layers(1280)),
    "vit_w128_d2_p8_classifier0x16_2": vit_heads(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "vit_w128_d2_p8_classifier0ln_1": vit_heads(nn.LayerNorm(128), nn.Linear(128, CLASSES)),
    "vit_w128_d2_p8_head0x16_2": vit(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
}
SIZES = {"alexnet": 64}  # of images; AlexNet's poolings need more than 32
FAST = [name for name in MODELS if name.startswith(("thin", "vit"))]


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in FAST)) for one in MODELS])
@pytest.mark.parametrize("whole", [False, True])
def test_heads(tmp_path, name, whole, rng, compiled_quickly):
    torch.manual_seed(0)
    module = randomise(MODELS[name], seed=1).eval()
    torch.save(module if whole else {"model": module.state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=SIZES.get(name.split("_")[0], 32))
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


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ((nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)), "head0x32_2"),
        ((nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES)), "head0x32_1bn_3"),
        ((nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, CLASSES)), "head0bn_2"),
        ((nn.BatchNorm1d(64), nn.Linear(64, CLASSES, bias=False)), "head0bn_1nobias"),
    ],
)
def test_a_head_beside_the_body(tmp_path, rng, head, name):
    body, head = torch_oracle("thin_resnet8", CLASSES, 32), nn.Sequential(*head)
    body.linear = nn.Identity()
    network = randomise(nn.ModuleDict({"backbone": body, "classifier": head}), seed=1).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name == f"thin_resnet8_{name}"
    images = rng.random((3, 32, 32, 3), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), head(body(as_torch(images))).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth")
    assert all(torch.equal(back[key], value) for key, value in network.state_dict().items())


def test_a_classifier_without_bias_beside_the_body(tmp_path):
    body = torch_oracle("thin_resnet8", CLASSES, 32)
    body.linear = nn.Identity()
    network = nn.ModuleDict({"backbone": body, "classifier": nn.Linear(64, CLASSES, bias=False)})
    torch.save(network.state_dict(), tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "thin_resnet8_headnobias"


def test_what_lies_around_a_moved_classifier_is_no_extra(tmp_path):
    """A layer that no head here has, before a classifier beside the body: without it the network is another."""
    body = torch_oracle("thin_resnet8", CLASSES, 32)
    body.linear = nn.Identity()
    head = nn.Sequential(nn.PReLU(64), nn.BatchNorm1d(64, affine=False), nn.Linear(64, CLASSES))
    torch.save(nn.ModuleDict({"backbone": body, "classifier": head}).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"may take part in what it computes: classifier\.1\.running_mean"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["thin_resnet8", "resnet18"])
def test_other_eps_and_another_head_in_a_whole_module(tmp_path, name):
    """ResNet-18's pooling is as it was: an alteration that changes nothing is none."""
    make, features = {"thin_resnet8": (thin_resnet, 64), "resnet18": (resnet18, 512)}[name]
    module = make(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
    torch.save(module, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == f"{name}_head0x32_2_tanh+eps1e-3"


@pytest.mark.slow
def test_statistics_behind_a_heads_activation_tell_it(tmp_path, rng):
    """BatchNorm that stands behind the activation has recorded what that is."""
    torch.manual_seed(0)
    module = thin_resnet(nn.Linear(64, 32), nn.Tanh(), nn.BatchNorm1d(32), nn.Linear(32, CLASSES))
    images = rng.random((200, 32, 32, 3)).astype(np.float32)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        module.train()(as_torch(images))
    torch.save(module.state_dict(), tmp_path / "x.pth")
    data = Dataset((255 * images).round().astype(np.uint8), rng.integers(0, CLASSES, 200), "random", CLASSES)
    found = weigh(load(tmp_path / "x.pth"), data, None)
    assert found[0].architecture.name == "thin_resnet8_head0x32_2bn_3_tanh"


@pytest.mark.parametrize(
    "name",
    [
        *("thin_resnet8_head", "thin_resnet8_head1", "thin_resnet8_head0x32", "thin_resnet8_head0bn_2_tanh"),
        *("convnext_tiny_head0bn_1_gelu", "thin_resnet8_head2bn_1x8_3"),
    ],
)
def test_other_names_of_no_head(name):
    with pytest.raises(CheckpointError, match="no model"):
        get_architecture(name)


@pytest.mark.parametrize("name", ["thin_resnet8_classifier0x16_2", "convnext_tiny_classifier0x16_2"])
def test_what_holds_more_than_linear_layers_is_not_replaced(name):
    with pytest.raises(CheckpointError, match="what it replaces in .* is not linear"):
        get_architecture(name).build(CLASSES, ImageSize(32, 32), ABSTRACT)


@pytest.mark.parametrize("name", ["thin_resnet8_head3x32_0", "thin_resnet8_head0x0_3", "nosuch_head0x2_1"])
def test_names_of_no_head(name):
    with pytest.raises(CheckpointError, match="no model"):
        get_architecture(name)
