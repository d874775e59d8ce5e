"""What windows of tokens attend with, against torchvision's and timm's; and the buffers that files have of it."""

import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax import load, save
from ibau_jax.checkpoints.fresh import fresh_checkpoint
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models import get_architecture
from ibau_jax.models.windows import in_place, in_windows, relative_position_index, shifted_mask, table_size, window_side
from ibau_jax.training import initialise
from tests.oracles.cifar_models import randomise
from tests.oracles.torchvision_models import models
from tests.oracles.transformers import swin

NAME = "swin_w32_d2_2"


@pytest.mark.parametrize("window", [1, 2, 7, 12])
def test_positions_are_torchvisions(window):
    layer = models.swin_transformer.ShiftedWindowAttention(4, [window] * 2, [0, 0], 2)
    np.testing.assert_array_equal(relative_position_index(window).ravel(), layer.relative_position_index)
    assert layer.relative_position_bias_table.shape == (table_size(window), 2)
    assert window_side(table_size(window)) == window


def test_no_window_has_another_number_of_positions():
    assert [window_side(positions) for positions in (0, 2, 168, 170, 196)] == [None] * 5


@pytest.mark.parametrize(("grid", "window"), [((8, 8), 4), ((14, 14), 7), ((28, 28), 7), ((8, 16), 4), ((6, 6), 2)])
def test_masks_are_timms(grid, window):
    swin_transformer = pytest.importorskip("timm.models.swin_transformer")
    block = swin_transformer.SwinTransformerBlock(4, grid, 1, window_size=window, shift_size=window // 2)
    np.testing.assert_array_equal(shifted_mask(grid, window, (window // 2,) * 2), block.attn_mask)


def test_windows_go_back_to_their_places(rng):
    tokens = rng.random((2, 6, 9, 5))
    windows = in_windows(tokens, 3)
    assert windows.shape == (2, 6, 9, 5)
    np.testing.assert_array_equal(windows[1, 1].reshape(3, 3, 5), tokens[1, :3, 3:6])
    np.testing.assert_array_equal(in_place(windows, (6, 9), 3), tokens)


def as_microsoft(state, grid):
    """torchvision's state dict under Microsoft's names, with its buffers, for a grid of so many patches."""
    names = [
        (r"features\.0\.0\.", "patch_embed.proj."),
        (r"features\.0\.2\.", "patch_embed.norm."),
        (r"features\.2\.", "layers.0.downsample."),
        (r"features\.1\.", "layers.0.blocks."),
        (r"features\.3\.", "layers.1.blocks."),
        (r"mlp\.0\.", "mlp.fc1."),
        (r"mlp\.3\.", "mlp.fc2."),
    ]
    renamed = OrderedDict()
    for name, value in state.items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        renamed[name] = value.reshape(49, 49) if name.endswith("index") else value
    renamed["layers.0.blocks.1.attn_mask"] = torch.from_numpy(shifted_mask((grid, grid), 7, (3, 3)))
    return renamed


@pytest.fixture
def state():
    torch.manual_seed(0)
    return randomise(swin(NAME, 5), 1).state_dict()


@pytest.mark.parametrize("spelling", ["torchvision", "microsoft"])
def test_a_computed_buffer_is_kept_and_no_weight(state, spelling, tmp_path):
    state = state if spelling == "torchvision" else as_microsoft(state, 14)
    torch.save({"model": state}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name == NAME
    assert checkpoint.beside_note() is None
    for path in (tmp_path / "y.pth", tmp_path / "flax"):
        save(checkpoint, path)
    save(load(tmp_path / "flax"), tmp_path / "z.pth")
    for name in ("y.pth", "z.pth"):
        back = torch.load(tmp_path / name)["model"]
        assert list(back) == list(state)
        assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
    report = inspect_file(tmp_path / "x.pth", Request())
    assert (report.problem, report.not_finite) == (None, {})
    assert report.parameters == sum(map(torch.numel, swin(NAME, 5).parameters()))


@pytest.mark.slow
def test_torchvisions_module_takes_the_buffers(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    make = lambda classes: swin(NAME, classes)  # noqa: E731
    assert verify(load(tmp_path / "x.pth"), tmp_path / "x.pth", torch_module=make) <= 1e-5


@pytest.mark.parametrize("buffer", ["layers.0.blocks.1.attn_mask", "layers.1.blocks.0.attn.relative_position_index"])
def test_a_buffer_of_other_values_is_another_network(state, buffer, tmp_path):
    state = as_microsoft(state, 14)
    state[buffer] = state[buffer].clone()
    state[buffer].view(-1)[5] += 1
    torch.save(state, tmp_path / "x.pth")
    own = buffer.replace("layers.0.blocks", "features.1").replace("layers.1.blocks", "features.3")
    with pytest.raises(CheckpointError, match=f"1 unexpected: {own}"):
        load(tmp_path / "x.pth")


def test_what_was_trained_here_loads_into_torchvisions_module(tmp_path):
    model = get_architecture(NAME).build(5, ImageSize(32, 32), nnx.Rngs(0))
    initialise(model, 0)
    save(fresh_checkpoint(get_architecture(NAME), 5, ImageSize(32, 32), model, {}), tmp_path / "x.pth")
    swin(NAME, 5).load_state_dict(torch.load(tmp_path / "x.pth")["net"])
    assert load(tmp_path / "x.pth").architecture.name == NAME
