"""--inspect: what a file is, without converting it; and nothing in it runs."""

import json
import os
import pickle

import pytest
import torch

from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.errors import CheckpointError
from tests.checkpoints.test_conversion import random_vgg
from tests.checkpoints.test_hostile import CALLS, MARKER
from tests.cli.commands import CONVERT, EXAMPLE, run
from tests.oracles.cifar_models import randomise, torch_oracle

# torch pickles by protocol 2, which has Python 2's names.
NAMES_OF_PYTHON_2 = {f"{old}.{attribute}": f"{new}.{attribute}" for old, new, attribute in [
    *[("__builtin__", "builtins", attribute) for attribute in ("eval", "exec", "getattr", "__import__")],
    ("commands", "subprocess", "Popen"),
    ("_io", "io", "open"),
]}  # fmt: skip


def looked_at(path, **known):
    return inspect_file(path, Request(**known))


def test_other_state_dicts_of_arrays_are_told(tmp_path):
    state = {name: tensor.numpy() for name, tensor in random_vgg().state_dict().items()}
    torch.save({"state_dict": state, "model_ema": dict(state)}, tmp_path / "x.pth")
    assert looked_at(tmp_path / "x.pth").other_state_dicts == ("model_ema",)


def test_what_is_found(tmp_path):
    state = random_vgg(43).half().state_dict()
    ema = random_vgg(43).state_dict()
    tree = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "model_ema": ema, "epoch": 7, "best": [1, 2]}
    torch.save(tree, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    report = looked_at(tmp_path / "x.ckpt")
    assert (report.format, report.wrapper, report.other_state_dicts) == ("legacy", "state_dict", ("model_ema",))
    assert (report.model, report.num_classes, report.image_size) == ("small_vgg", 43, (32, 32))
    assert report.prefix == "module."
    assert report.entries == {"model_ema": "OrderedDict of 44", "epoch": "7", "best": "list of 2"}
    assert report.parameters == sum(tensor.numel() for tensor in random_vgg(43).parameters())
    assert report.dtypes == {"float16": 38, "int64": 6}
    assert report.problem is None
    assert report.refused_globals == ()
    assert report.normalization is None


def test_runners_up_say_why_not(tmp_path):
    torch.save(randomise(torch_oracle("resnet18_cifar", 10, 32), 0).state_dict(), tmp_path / "x.pth")
    report = looked_at(tmp_path / "x.pth")
    assert report.model == "resnet18_cifar"
    assert "resnet18_cifar" not in report.runners_up
    assert next(iter(report.runners_up)) == "resnet18_cifar_64"
    assert report.runners_up["resnet18_cifar_64"] == "1 misshapen: linear.weight (10, 512) instead of (10, 2048)"


def test_a_file_that_can_not_be_converted_says_why(tmp_path):
    torch.save({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}, tmp_path / "x.pth")
    report = looked_at(tmp_path / "x.pth")
    assert (report.model, report.parameters) == (None, 8)
    assert report.keys == {"a.weight": (2, 3), "a.bias": (2,)}
    assert "unknown architecture" in report.problem
    assert (
        "does not fit small_vgg; 38 missing" in looked_at(tmp_path / "x.pth", model="small_vgg", num_classes=2).problem
    )
    torch.save([1, 2], tmp_path / "y.pth")
    assert "no state dict" in looked_at(tmp_path / "y.pth").problem
    with pytest.raises(CheckpointError, match="no PyTorch checkpoint"):
        looked_at(EXAMPLE.parent / "lenet.py")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("zipped", [True, False])
def test_globals_outside_the_allow_list_are_named_and_not_run(tmp_path, name, zipped):
    tree = {"net": random_vgg().state_dict(), "cargo": [CALLS[name]]}
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    report = looked_at(tmp_path / "x.pth")
    (found,) = report.refused_globals
    assert NAMES_OF_PYTHON_2.get(found, found) == name
    assert report.model == "small_vgg"
    assert "outside the allow list" in report.problem
    assert not os.path.exists(MARKER)
    with pytest.raises(CheckpointError, match="allow list"):
        read_torch_file(tmp_path / "x.pth")


def test_a_whole_pickled_model_is_looked_at(tmp_path):
    torch.save({"model": random_vgg()}, tmp_path / "x.pth")
    report = looked_at(tmp_path / "x.pth")
    assert "torch.nn.modules.container.Sequential" in report.unknown_classes
    assert (report.refused_globals, report.wrapper, report.model) == ((), "model", "small_vgg")
    assert report.problem is None
    (tmp_path / "y.pkl").write_bytes(pickle.dumps({"a": pytest.approx(1)}))
    assert looked_at(tmp_path / "y.pkl").unknown_classes


def test_the_command(tmp_path):
    torch.save({"net": random_vgg().state_dict(), "evil": CALLS["posix.system"]}, tmp_path / "evil.pth")
    done = run(*CONVERT, "--inspect", EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("PyTorch (zip)", "small_vgg", "under 'net'", "no global outside the allow list"):
        assert text in done.stdout
    done = run(*CONVERT, "--inspect", "evil.pth", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["refused_globals"] == ["posix.system"]
    assert report["convertible"] is False
    for arguments, message in (
        (["--inspect", EXAMPLE, "out"], "leave it out"),
        ([EXAMPLE], "name OUT"),
        (["--inspect", "nosuch.pth"], "can't read"),
        (["--inspect", "."], "is a folder"),
    ):
        done = run(*CONVERT, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
