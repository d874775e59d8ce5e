"""Hugging Face transformers' own models, in its spelling, both ways."""

import re

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from tests.oracles import torchvision_models  # noqa: F401 - before transformers imports torchvision
from tests.oracles.cifar_models import randomise
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
    "vit_w128_d2_p8": ("ViT", VIT),
    "resnet18": ("ResNet", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
    "resnet50": ("ResNet", {}),
    "convnext_tiny": ("ConvNext", {}),
}
# Of transformers 5, by those of transformers 4; the files on the hub have either.
NEWER = {
    r"\.encoder\.layer\.": ".layers.",
    r"attention\.attention\.(query|key|value)": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}


def model(name):
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **sizes)
    torch.manual_seed(0)
    return randomise(getattr(transformers, f"{kind}ForImageClassification")(config), seed=1).eval()


def newer(state):
    for old, new in NEWER.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


NAMES = [pytest.param(name, marks=() if name.startswith("vit") else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelled", [dict, newer])
def test_transformers(tmp_path, name, spelled):
    module = model(name)
    state = spelled(module.state_dict())
    torch.save(state, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)
    size = min(64, checkpoint.image_size)
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
