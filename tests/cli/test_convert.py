"""The conversion utility as a subprocess."""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax.checkpoints import load, save
from ibau_jax.checkpoints.checkpoint import check_can_be_saved, form_of
from ibau_jax.errors import CheckpointError
from tests.cli.commands import CONVERT, EXAMPLE, run


def test_convert_there_and_back(tmp_path):
    there = run(*CONVERT, EXAMPLE, "flax", "--verify", cwd=tmp_path, fresh=True)
    assert there.returncode == 0, there.stderr
    assert "logits of 64 random images differ" in there.stdout
    back = run(*CONVERT, "flax", "back.pth", "--verify", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    original, returned = (torch.load(path, weights_only=True) for path in (EXAMPLE, tmp_path / "back.pth"))
    assert list(original) == list(returned)
    assert all(torch.equal(original["net"][name], returned["net"][name]) for name in original["net"])
    assert original["ibau_jax"] == returned["ibau_jax"]


def test_convert_refuses(tmp_path):
    shutil.copy(EXAMPLE, tmp_path / "x.pth")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo.jpg").write_text("x")
    for arguments, message in (
        (["x.pth", "x.pth"], "there already"),
        (["nosuch.pth", "y"], "can't read"),
        (["x.pth", "precious", "--overwrite"], "something other"),
        (["x.pth", "y", "--num-classes", 3], "misshapen"),
        (["precious", "y.pth"], "no Flax checkpoint"),
        (["x.pth", "x.pth/y"], "not a folder"),
        (["x.pth", "y.onnx"], ".pth, .pt, .th"),
        (["x.pth", "y.safetensor"], "no suffix or .flax"),
    ):
        done = run(*CONVERT, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x.pth"]
    assert (tmp_path / "precious" / "photo.jpg").exists()


def test_a_failing_verification_writes_nothing(tmp_path):
    """Fault injection: torch can't be imported."""
    assert run(*CONVERT, EXAMPLE, "flax", cwd=tmp_path).returncode == 0
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    for source, target in ((EXAMPLE, "other"), ("flax", "back.pth")):
        done = run(*CONVERT, source, target, "--verify", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
        assert (done.returncode, "needs PyTorch" in done.stderr) == (2, True), done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flax", "hidden"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((f"x{suffix}", "torch") for suffix in (".pth", ".pt", ".th", ".t7", ".pth.tar", ".tar", ".ckpt", ".PTH")),
        ("x.safetensors", "safetensors"),
        *((name, "flax") for name in ("x", "x_flax", "v1.2", "lr0.001", "x.flax", "x.orbax", ".hidden", "x.")),
    ],
)
def test_a_name_says_what_is_written(name, form):
    assert form_of(Path("runs") / name) == form


@pytest.mark.parametrize("name", ["x.onnx", "x.h5", "x.safetensor", "x.npy", "x.pht", "x.pth.gz", "v1.2.zip"])
def test_an_unknown_suffix_is_an_error(name):
    with pytest.raises(CheckpointError, match="does not say what to write"):
        form_of(Path(name))


def weights(change):
    content = torch.load(EXAMPLE, weights_only=True)
    content["net"] = {name: change(name, tensor) for name, tensor in content["net"].items()}
    return content


def floats_as(dtype):
    return weights(lambda name, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype):
    torch.save(floats_as(dtype), tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "x.pth")
    message = str(raised.value)
    assert str(dtype).removeprefix("torch.") in message
    assert "classifier.bias" in message
    assert ".float()" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_are_rounded_as_pytorch_rounds_them(tmp_path, dtype):
    """The model that is measured is the one that the file holds."""
    torch.save(floats_as(dtype), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    model = checkpoint.model()
    moved = jax.tree.map(lambda leaf: leaf * 1.01 + 1e-3, nnx.state(model))
    nnx.update(model, moved)
    written = checkpoint.with_weights(model)
    save(written, tmp_path / "y.pth")
    bias = torch.tensor(np.asarray(model.classifier.bias[...])).to(dtype)
    stored = torch.load(tmp_path / "y.pth", weights_only=True)["net"]
    assert stored["classifier.bias"].dtype == dtype
    assert torch.equal(stored["classifier.bias"], bias)
    measured = written.model()
    np.testing.assert_array_equal(measured.classifier.bias[...], bias.float().numpy())
    again = written.with_weights(measured)
    assert all(again.leaves[path].tobytes() == leaf.tobytes() for path, leaf in written.leaves.items())


def test_a_weight_beyond_its_dtype_is_refused(tmp_path):
    torch.save(floats_as(torch.float16), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    model = checkpoint.model()
    model.classifier.bias[...] = model.classifier.bias[...].at[0].set(1e5)
    with pytest.raises(CheckpointError, match=r"classifier.bias has grown too large for the file's float16"):
        checkpoint.with_weights(model)


def test_what_can_not_be_written_back_is_known_before(tmp_path):
    checkpoint = load(EXAMPLE)
    check_can_be_saved(checkpoint)
    tree = {**checkpoint.envelope.tree, "args": argparse.Namespace(__reduce_ex__="x")}
    hostile = replace(checkpoint, envelope=replace(checkpoint.envelope, tree=tree))
    with pytest.raises(CheckpointError, match="beside the weights can't be written back"):
        check_can_be_saved(hostile)
