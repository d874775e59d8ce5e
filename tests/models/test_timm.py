"""timm's own models, in timm's spelling, both ways."""

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from tests.oracles import torchvision_models  # noqa: F401 - before timm imports torchvision
from tests.oracles.cifar_models import randomise
from tests.oracles.twins import as_torch

timm = pytest.importorskip("timm")
CLASSES = 5
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2}
MODELS = {
    "vit_w192_d2_p8": ("vit_tiny_patch16_224", SMALL),
    "vit_w256_d2_p8": ("vit_base_patch16_224", {**SMALL, "embed_dim": 256, "num_heads": 4}),
    "resnext50_32x4d": ("resnext50_32x4d", {}),
    "wide_resnet50_2": ("wide_resnet50_2", {}),
    "vit_ti_16": ("deit_tiny_patch16_224", {}),
}


SMALLEST = ("vit_w192_d2_p8", "vit_w256_d2_p8")
NAMES = [pytest.param(name, marks=() if name in SMALLEST else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_timms(tmp_path, name, prefix):
    model, options = MODELS[name]
    torch.manual_seed(0)
    module = randomise(timm.create_model(model, num_classes=CLASSES, **options), seed=1).eval()
    state = {prefix + key: value for key, value in module.state_dict().items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)
    images = np.random.default_rng(0).random((2, *checkpoint.input_shape), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).numpy()
    assert expected.std() > 1e-2
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(checkpoint, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth")["model"]
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
