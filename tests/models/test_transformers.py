"""Hugging Face transformers' own models, in its spelling, both ways."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from ibau_jax.errors import CheckpointError
from tests.oracles.cifar_models import randomise
from tests.oracles.hugging_face import made, newer  # before transformers, which imports torchvision
from tests.oracles.twins import as_torch

transformers = pytest.importorskip("transformers")
CLASSES = 5
VIT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = {
    "vit_w128_d2_p8+ln_eps1e-12": ("ViT-", VIT),
    "vit_w128_d2_p8_dist_token+ln_eps1e-12": ("DeiT-", VIT),
    "vit_w128_d2_p8_distilled+ln_eps1e-12": ("DeiT-WithTeacher", VIT),
    "swin_w32_d2_2": ("Swin-", {"embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "image_size": 56}),
    "swin_t": ("Swin-", {}),
    "resnet18": ("ResNet-", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
    "resnet50": ("ResNet-", {}),
    "convnext_tiny+head_ln_eps1e-12": ("ConvNext-", {}),
    "convnextv2_tiny+head_ln_eps1e-12": ("ConvNextV2-", {}),
}


def model(name):
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    return randomise(made(kind, CLASSES, **sizes), seed=1).eval()


NAMES = [pytest.param(name, marks=() if name.startswith("vit") else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelled", [dict, newer])
def test_transformers(tmp_path, name, spelled):
    module = model(name)
    state = spelled(module.state_dict())
    torch.save(state, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)
    # A Swin transformer of transformers' takes no grids smaller than a window.
    height = checkpoint.image_size.height
    size = height if name.startswith("swin") else min(64, height)
    images = np.random.default_rng(0).random((2, size, size, 3), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).logits.numpy()
    assert expected.std() > 1e-2
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    for form in ("y.pth", "y.safetensors"):
        save(checkpoint, tmp_path / form)
    back = torch.load(tmp_path / "y.pth")
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


LABELS = {0: "cat", 1: "dog", 2: "fish", 3: "bird", 4: "cow"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that transformers has saved, and its image processor."""
    config = transformers.ViTConfig(num_labels=CLASSES, id2label=LABELS, **VIT)
    torch.manual_seed(0)
    module = randomise(transformers.ViTForImageClassification(config), seed=1).eval()
    path = tmp_path_factory.mktemp("model")
    module.save_pretrained(path)
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    processor.save_pretrained(path)
    return path, module, processor


def test_a_folder_of_transformers(folder, tmp_path):
    path, module, processor = folder
    checkpoint = load(path)
    assert checkpoint.hints.class_names == tuple(LABELS.values())
    assert checkpoint.image_size == (32, 32)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inputs = processor(list(images), return_tensors="pt")
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found = np.asarray(checkpoint.model()((images / 255).astype(np.float32)))
        expected = module(**inputs).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "flax")
    again = load(tmp_path / "flax")
    assert again.hints == checkpoint.hints
    shutil.copytree(path, tmp_path / "written")
    save(again, tmp_path / "written" / "model.safetensors")
    back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "written").state_dict()
    assert all(torch.equal(back[name], value) for name, value in module.state_dict().items())


def test_a_folder_of_several_files(folder, tmp_path):
    path, module, _ = folder
    module.save_pretrained(tmp_path / "model", max_shard_size="500KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    checkpoint, whole = load(tmp_path / "model"), load(path)
    assert all(np.array_equal(checkpoint.leaves[name], whole.leaves[name]) for name in whole.leaves)


# A small ConvNeXt's sizes.
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}
EPSILONS = {
    "vit_w128_d2_p8": ("ViT", VIT, 1e-6),
    "vit_w128_d2_p8+ln_eps1e-12": ("ViT", VIT, 1e-12),
    "vit_w128_d2_p8+ln_eps1e-5": ("ViT", VIT, 1e-5),
    "vit_w128_d2_p8_dist_token+ln_eps1e-8": ("DeiT", VIT, 1e-8),
    "convnext_w16_32_d1_2": ("ConvNext", CONVNEXT, 1e-6),
    "convnext_w16_32_d1_2+head_ln_eps1e-12": ("ConvNext", CONVNEXT, 1e-12),
    "convnextv2_w16_32_d1_2+head_ln_eps1e-12": ("ConvNextV2", CONVNEXT, 1e-12),
}


@pytest.mark.parametrize("name", EPSILONS)
def test_the_epsilon_is_the_configurations(tmp_path, name):
    kind, sizes, epsilon = EPSILONS[name]
    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, layer_norm_eps=epsilon, **sizes)
    torch.manual_seed(0)
    module = randomise(getattr(transformers, f"{kind}ForImageClassification")(config), seed=1).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # so that ε is not small beside a variance
            parameter *= 0.1 if kind.startswith("ConvNext") else 0.3
    module.save_pretrained(tmp_path / "model")
    checkpoint = load(tmp_path / "model", image_size=32)
    assert (checkpoint.architecture.name, checkpoint.alternatives) == (name, ())
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "flax")
    assert load(tmp_path / "flax").architecture.name == name


def test_a_folder_of_a_swin_transformer(tmp_path):
    module = transformers.SwinForImageClassification(transformers.SwinConfig(**MODELS["swin_w32_d2_2"][1]))
    module.save_pretrained(tmp_path)
    assert load(tmp_path).architecture.name == "swin_w32_d2_2"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    with pytest.raises(CheckpointError, match="layer_norm_eps = 1e-06"):
        load(tmp_path)


def test_without_a_configuration_a_named_model_has_its_own_epsilon(folder):
    path, _, _ = folder
    weights = path / "model.safetensors"
    assert load(weights).architecture.name == "vit_w128_d2_p8+ln_eps1e-12"
    assert load(weights, model="vit_w128_d2_p8").architecture.name == "vit_w128_d2_p8"
    assert load(path, model="vit_w128_d2_p8").architecture.name == "vit_w128_d2_p8+ln_eps1e-12"


DAMAGE = {
    "layer_norm_eps = 0.001": {"layer_norm_eps": 0.001},
    "layer_norm_eps = 3e-07": {"layer_norm_eps": 3e-07},
    "num_attention_heads = 4": {"num_attention_heads": 4},
    "hidden_act = relu": {"hidden_act": "relu"},
    "holds no settings": [],
    "can't read": "{",
    "num_attention_heads = [2]": {"num_attention_heads": [2]},
    "hidden_act = []": {"hidden_act": []},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_configuration_that_says_something_else_is_an_error(folder, tmp_path, message):
    shutil.copytree(folder[0], tmp_path / "model")
    file, change = tmp_path / "model" / "config.json", DAMAGE[message]
    config = json.loads(file.read_text())
    file.write_text(change if isinstance(change, str) else json.dumps(config | change if change else change))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "settings", [{"id2label": 5}, {"id2label": [1]}, {"image_size": {"a": []}}, {"hidden_act": None}]
)
def test_settings_without_sense_are_no_hints(folder, tmp_path, settings):
    shutil.copytree(folder[0], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert load(tmp_path / "model").architecture.name == "vit_w128_d2_p8+ln_eps1e-12"


def test_a_folder_without_weights_is_an_error(folder, tmp_path):
    shutil.copy(folder[0] / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors"):
        load(tmp_path)


def test_caffes_strides_are_told_by_the_configuration(tmp_path):
    config = transformers.ResNetConfig(num_labels=CLASSES, downsample_in_bottleneck=True)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.architecture.name == "resnet50_v1"
    assert not any(one.name == "resnet50" for one in checkpoint.alternatives)
