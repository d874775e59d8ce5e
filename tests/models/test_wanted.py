"""The rows of `cases/wanted_checkpoints.md`: what is recognised computes what PyTorch does, and comes back as it was."""

from contextlib import suppress

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from ibau_jax.errors import CheckpointError
from tests.conftest import SHARED
from tests.models.test_architectures import tried_size
from tests.oracles.cifar_models import randomise
from tests.oracles.twins import as_torch
from tests.wanted_rows import tables, wanted_rows

ROWS = wanted_rows(tables(SHARED)) if tables(SHARED).is_file() else []
# Public code whose networks test_architectures.py, test_timm.py and test_transformers.py compare, under the same names.
ELSEWHERE = (
    "HF transformers",
    "SCLBD/BackdoorBench",
    "akamaster/resnet_cifar10",
    "chenyaofo/pytorch-cifar-models",
    "huyvnphan/PyTorch_CIFAR10",
    "kuangliu/pytorch-cifar",
    "timm",
    "torchvision",
)
OTHERS = [row for row in ROWS if row.source not in ELSEWHERE]


def opened(path, architecture):
    """The checkpoint, of small images where the network takes them, here and in timm."""
    with suppress(CheckpointError):
        if architecture.name != "swin_t_timm":
            return load(path, model=architecture.name, image_size=tried_size(architecture.name))
    return load(path, model=architecture.name)


def distance(checkpoint, module):
    """The largest difference of logits over the largest logit."""
    images = np.random.default_rng(0).random((2, *checkpoint.input_shape), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images))
    expected = getattr(expected, "logits", expected).numpy()
    assert expected.std() > 1e-3  # a constant output would agree with anything
    return np.abs(found - expected).max() / np.abs(expected).max()


def compared(row, folder):
    """The checkpoint of a row, and how far from PyTorch each network is that its names and shapes are of."""
    torch.manual_seed(0)
    module = row.module()
    if module is None:
        pytest.skip("needs transformers")
    module = randomise(module, seed=1)
    torch.save(row.content(row.spelled(module.state_dict())), folder / "x.pth")
    checkpoint = load(folder / "x.pth")
    distances = {}
    for one in (checkpoint.architecture, *checkpoint.alternatives):
        distances[one.name] = distance(opened(folder / "x.pth", one), module)
        if distances[one.name] <= 1e-4:
            break
    return checkpoint, distances


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("row", OTHERS, ids=lambda row: f"{row.source} {row.architecture}")
def test_rows(tmp_path, row):
    checkpoint, distances = compared(row, tmp_path)
    assert min(distances.values()) <= 1e-4, distances
    save(checkpoint, tmp_path / "y.pth")
    state, back = (torch.load(tmp_path / name) for name in ("x.pth", "y.pth"))
    state, back = (tree[row.key] if row.key else tree for tree in (state, back))
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
