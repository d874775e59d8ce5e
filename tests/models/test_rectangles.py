"""Images that are not square: the logits are PyTorch's, or the network is refused in one line."""

import contextlib

import jax
import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import load, save
from ibau_jax.checkpoints.hints import read_hints
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models import get_architecture
from tests.models.test_architectures import CLASSES, torch_model
from tests.oracles.cifar_models import randomise
from tests.oracles.twins import as_torch

# Names of networks that take any size, an image's size and, where that decides how large the last layer is, its name.
ANY_SIZE = [
    ("resnet18", (96, 160)),
    ("resnet_basic_1_2_1_1_small_stem_w8", (60, 80)),
    ("preact_resnet18", (64, 101)),
    ("thin_resnet20_w24_shortcut", (17, 40)),
    ("convnext_w16_32_d1_2", (128, 64)),
    ("swin_w32_d2_2", (40, 56)),
    ("regnet_y_w8_24_d2_1_g12", (60, 80)),
    ("shufflenet_v2_w16_32_64_d2_1_1_l32", (128, 64)),
    ("wide_resnet16_1", (29, 32)),
]
SLOW_ANY_SIZE = [
    ("alexnet", (96, 64)),
    ("densenet121", (40, 56)),
    ("efficientnet_b0", (60, 80)),
    ("googlenet", (64, 96)),
    ("inception_v3", (96, 128)),
    ("mobilenet_v3_small", (60, 80)),
    ("squeezenet1_1", (60, 80)),
    ("vgg11", (96, 160)),
    ("mnasnet0_5", (96, 160)),
    ("dla_cifar", (29, 32)),
    ("dpn26_cifar", (29, 32)),
    ("shufflenet_v2_x0_5_cifar", (29, 32)),
    ("pnasnet_b_cifar", (29, 32)),
    ("googlenet_cifar", (29, 32)),
]
SIZED = [
    ("resnet18_cifar_64", (64, 32), "linear"),
    ("resnet18_cifar_64", (60, 80), "linear"),
    ("small_vgg", (30, 50), "classifier"),
    ("resnet18_cifar_64_w16", (60, 80), "linear"),
    ("mobilenet_v1_cifar", (50, 70), "linear"),
    ("resnext11_2x2d_cifar", (40, 67), "linear"),
    ("densenet_cifar_k4_1_2_1_1", (50, 70), "linear"),
    ("vgg11_bn_cifar", (64, 101), "classifier"),
    ("lenet", (24, 40), "fc1"),
    ("lenet_nad", (24, 32), "fc1"),
    ("mnist_examples", (64, 101), "fc1"),
    ("mnist_wanet", (28, 44), "linear6"),
]
FAST_SIZED = {"small_vgg", "resnet18_cifar_64_w16", "lenet", "lenet_nad", "mnist_wanet", "densenet_cifar_k4_1_2_1_1"}


def resized(module, last, size, channels):
    """The module with a last layer, or a first linear one, for images of a size, as its author would make it."""
    features = []
    hook = getattr(module, last).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].shape[1]))
    with contextlib.suppress(RuntimeError):  # of another size than the layer takes
        module(torch.zeros(1, channels, *size))
    hook.remove()
    setattr(module, last, nn.Linear(features[0], getattr(module, last).out_features))
    return randomise(module, seed=1)


def assert_alike(checkpoint, module, size):
    images = np.random.default_rng(0).random((2, *size, checkpoint.architecture.channels), np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected, found = module.eval()(as_torch(images)).numpy(), np.asarray(checkpoint.model()(images))
    assert expected.shape == found.shape == (2, CLASSES)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def saved(module, path):
    torch.save({"net": module.state_dict()}, path)
    return path


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(
    ("name", "size"), [*ANY_SIZE, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_ANY_SIZE)]
)
def test_networks_of_any_size(name, size, tmp_path):
    module = torch_model(name, get_architecture(name).image_sizes[0].height)
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=size)
    channels = checkpoint.architecture.channels
    assert (checkpoint.architecture.name, checkpoint.input_shape) == (name, (*size, channels))
    assert f"{size[0]}x{size[1]} images" in checkpoint.summary()
    assert_alike(checkpoint, module, size)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(
    ("name", "size", "last"),
    [pytest.param(*one, marks=() if one[0] in FAST_SIZED else pytest.mark.slow) for one in SIZED],
)
def test_networks_whose_weights_are_for_one_size(name, size, last, tmp_path):
    architecture = get_architecture(name)
    module = torch_model(name, architecture.image_sizes[0].height)
    module = resized(module, last, size, architecture.channels)
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=size, model=name)
    assert_alike(checkpoint, module, size)
    with pytest.raises(CheckpointError, match="misshapen"):
        load(tmp_path / "x.pth", model=name, image_size=32 if size != (32, 32) else 64)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("preact_resnet18", (32, 40)),
        ("resnet18_cifar", (32, 40)),
        ("thin_resnet20", (40, 32)),
        ("wide_resnet16_1", (40, 48)),
        ("senet18", (29, 32)),
    ],
)
def test_a_pooling_that_may_leave_a_part_out_is_refused(name, size, tmp_path):
    """In PyTorch `avg_pool2d(4)` takes 4x4 of 4x5 places, and nothing says whether the file's network has it."""
    module = torch_model(name, 32)
    with torch.no_grad():
        assert module.eval()(torch.zeros(1, 3, *size)).shape == (1, CLASSES)
    with pytest.raises(CheckpointError, match=rf"{name} takes no images of {size[0]}x{size[1]}: it averages maps of"):
        load(saved(module, tmp_path / "x.pth"), image_size=size, model=name)
    report = inspect_file(tmp_path / "x.pth", Request(name, image_size=ImageSize(*size)))
    assert "it averages maps of" in report.problem


def test_images_that_are_too_small_are_refused(tmp_path):
    path = saved(torch_model("alexnet", 224), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="alexnet takes no images of 40x200: .* too small"):
        load(path, image_size=(40, 200))


def timms(name, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=CLASSES, **options), seed=1)


@pytest.mark.parametrize(
    ("name", "timms_name", "options"),
    [
        ("vit_w192_d2_p8", "vit_tiny_patch16_224", {"depth": 2, "img_size": (32, 48), "patch_size": 8}),
        ("mixer_s_32", "mixer_s32_224", {"img_size": (64, 96)}),
    ],
)
def test_networks_of_patches(name, timms_name, options, tmp_path):
    """Positions and tokens are in row order, whatever the grid."""
    module, size = timms(timms_name, **options), options["img_size"]
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=size)
    assert checkpoint.architecture.name == name
    assert_alike(checkpoint, module, size)
    with pytest.raises(CheckpointError, match="misshapen"):  # its grid is not told by the number of tokens
        load(tmp_path / "x.pth")


SMALL_SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "strict_img_size": False}


def test_timms_swin(tmp_path):
    module = timms("swin_tiny_patch4_window7_224", **SMALL_SWIN, img_size=(64, 96))
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=(64, 96))
    assert_alike(checkpoint, module, (64, 96))
    with pytest.raises(CheckpointError, match="takes no images of 32x96: a grid of 4x12 tokens is one window"):
        load(tmp_path / "x.pth", image_size=(32, 96))


@pytest.mark.slow
def test_timms_vgg(tmp_path):
    """Where only the height is less than seven places, only the height is stretched."""
    module = timms("vgg11")
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=(96, 256))
    assert checkpoint.architecture.name == "vgg11_timm"
    assert_alike(checkpoint, module, (96, 256))


class Chain(nn.Module):
    """A chain as people write it."""

    def __init__(self, channels, places):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.fc1, self.fc2 = nn.Linear(16 * places, 20), nn.Linear(20, CLASSES)

    def forward(self, x):
        x = self.features(x).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(("channels", "size"), [(3, (24, 32)), (1, (64, 101)), (3, (60, 80))])
def test_a_plain_chain(channels, size, tmp_path):
    torch.manual_seed(0)
    module = randomise(Chain(channels, (size[0] // 4) * (size[1] // 4)), seed=1)
    path = saved(module, tmp_path / "x.pth")
    checkpoint = load(path, image_size=size)
    name = checkpoint.architecture.name
    assert name.startswith(f"chain{channels}x{size[0]}x{size[1]}-features.0=8_k3_p1-")
    assert get_architecture(name) == checkpoint.architecture
    assert_alike(checkpoint, module, size)
    save(checkpoint, tmp_path / "flax")
    assert load(tmp_path / "flax").input_shape == (*size, channels)
    with pytest.raises(CheckpointError, match="unknown architecture"):
        load(path, image_size=(size[0] + 8, size[1]))


def test_a_chain_of_averages_takes_its_images_size(tmp_path):
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip
    checkpoint = load(saved(randomise(module, seed=1), tmp_path / "x.pth"), image_size=(24, 32))
    assert checkpoint.architecture.name.startswith("chain3x24x32-0=8_k3")


def test_a_layer_behind_flattened_pixels(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(24 * 40, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    checkpoint = load(saved(randomise(module, seed=1), tmp_path / "x.pth"), image_size=(24, 40))
    assert checkpoint.architecture.name == "chain1x24x40-flat-1=16-relu-3=classes"
    assert_alike(checkpoint, module, (24, 40))


@pytest.mark.parametrize(
    ("config", "preprocessor", "size"),
    [
        ({"image_size": [96, 160]}, {}, (96, 160)),
        ({"image_size": 96}, {}, (96, 96)),
        ({}, {"size": {"height": 96, "width": 160}}, (96, 160)),
        ({}, {"size": {"shortest_edge": 96}}, (96, 96)),
        ({}, {"size": {"shortest_edge": 256}, "crop_size": {"height": 96, "width": 160}}, (96, 160)),
        ({"image_size": [96, "160"]}, {"size": 64}, (64, 64)),
        ({"image_size": [0, 160]}, {}, None),
        ({"image_size": []}, {"size": {}}, None),
    ],
)
def test_what_transformers_say_of_images(config, preprocessor, size):
    assert read_hints({"config.json": config, "preprocessor_config.json": preprocessor}).image_size == size


def test_what_others_say_of_images():
    backdoorbench = {"model_name": "preactresnet18", "num_classes": 10, "img_size": (24, 40, 3)}
    assert read_hints(backdoorbench).image_size == (24, 40)
    assert read_hints({"ibau_jax": {"image_size": [24, 40]}}).image_size == (24, 40)


def test_a_file_that_says_the_size_of_its_images(tmp_path):
    state = randomise(Chain(3, 6 * 8), seed=1).state_dict()
    torch.save({"net": state, "ibau_jax": {"image_size": [24, 32]}}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").input_shape == (24, 32, 3)


def test_names_of_chains_say_a_size_in_one_way():
    steps = "-flat-fc1=classes"
    assert get_architecture(f"chain1x28{steps}").image_sizes == ((28, 28),)
    assert get_architecture(f"chain1x28x20{steps}").image_sizes == ((28, 20),)
    for size in ("28x28", "028", "0", "28x", "28x0"):
        with pytest.raises(CheckpointError):
            get_architecture(f"chain1x{size}{steps}")
