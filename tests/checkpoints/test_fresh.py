"""A model trained here as PyTorch's own file: loaded by torch, strictly, and the same logits."""

import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax.checkpoints import fresh_checkpoint, load, save
from ibau_jax.image_size import ImageSize
from ibau_jax.models import get_architecture
from ibau_jax.training import initialise
from tests.oracles.cifar_models import torch_oracle


def trained(name):
    architecture = get_architecture(name)
    model = architecture.build(7, ImageSize(32, 32), nnx.Rngs(0))
    initialise(model, 0)
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = rng.normal(0, 0.1, module.mean.shape).astype(np.float32)
            module.var[...] = rng.uniform(0.5, 2, module.var.shape).astype(np.float32)
    return architecture, model


@pytest.mark.slow
def test_pytorch_loads_a_residual_net(tmp_path):
    architecture, model = trained("preact_resnet18")
    save(fresh_checkpoint(architecture, 7, ImageSize(32, 32), model, {}), tmp_path / "model.pth")
    torch_oracle("preact_resnet18", 7, 32).load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True)["net"])
    assert load(tmp_path / "model.pth").summary() == "preact_resnet18, 7 classes, 32x32 images"


def test_pytorch_gives_the_same_logits(tmp_path):
    architecture, model = trained("small_vgg")
    save(fresh_checkpoint(architecture, 7, ImageSize(32, 32), model, {"acc": 12.5, "epoch": 3}), tmp_path / "model.pth")
    stored = torch.load(tmp_path / "model.pth", weights_only=True)
    assert (stored["acc"], stored["epoch"]) == (12.5, 3)
    module = architecture.torch_module(7)
    assert set(module.state_dict()) == set(stored["net"])
    module.load_state_dict(stored["net"])
    images = np.random.default_rng(1).random((4, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = module.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(model(images), expected, atol=2e-4 * np.abs(expected).max())
    again = load(tmp_path / "model.pth")
    assert (again.architecture.name, again.num_classes, again.image_size) == ("small_vgg", 7, (32, 32))
    np.testing.assert_array_equal(again.model()(images), model(images))
