"""The conversion utility as a subprocess."""

import os
import shutil

import torch

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
