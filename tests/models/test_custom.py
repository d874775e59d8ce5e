"""A user's own module: the worked example of docs/custom_model.md, as its reader would do it."""

import re
import sys

import numpy as np
import pytest
import torch

from ibau_jax import load, save
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from tests.cli.commands import CONVERT, UNLEARN, run
from tests.conftest import ROOT

LENET = f"{ROOT}/examples/lenet.py:LeNet"


@pytest.fixture
def net(tmp_path):
    """net.py as the documentation has it, and a checkpoint of its class."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "custom_model.md").read_text(), re.DOTALL)
    assert blocks[1] == (ROOT / "examples" / "lenet.py").read_text()
    (tmp_path / "net.py").write_text(blocks[0])
    scope = {}
    exec(blocks[0], scope)
    torch.manual_seed(0)
    module = scope["Net"](6)
    torch.save({"state_dict": module.state_dict(), "epoch": 2}, tmp_path / "net.pth")
    return module


def test_the_worked_example(tmp_path, net):
    checkpoint = load(tmp_path / "net.pth", model=LENET)
    assert (checkpoint.num_classes, checkpoint.input_shape) == (6, (32, 32, 3))
    assert verify(checkpoint, tmp_path / "net.pth", torch_module=lambda classes: type(net)(classes)) <= 1e-5
    save(checkpoint, tmp_path / "flax")
    with pytest.raises(CheckpointError, match="name it again by --model"):
        load(tmp_path / "flax")
    save(load(tmp_path / "flax", model=LENET), tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.slow
def test_its_commands(tmp_path, net):
    done = run(
        *CONVERT, "net.pth", "net_flax", "--model", LENET, "--verify", "--torch-module", "net.py:Net", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "logits of 64 random images differ" in done.stdout
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "clean.npz", x=rng.integers(0, 256, (20, 32, 32, 3), np.uint8), y=rng.integers(0, 6, 20))
    options = [
        "--dataset",
        "clean.npz",
        "--preset",
        "cifar10",
        "--n-rounds",
        "1",
        "--batch-size",
        "5",
        "--inner-lr",
        "0.1",
        "--out",
        "cleaned",
    ]
    done = run(*UNLEARN, "--ckpt", "net.pth", "--model", LENET, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cleaned = torch.load(tmp_path / "cleaned" / "model.pth", weights_only=True)
    type(net)(6).load_state_dict(cleaned["state_dict"])
    assert cleaned["epoch"] == 2


WRONG = {
    "nosuch.py:Net": "no file",
    "bad.py:Net": "fails: ZeroDivisionError",
    "good.py:Missing": "has no 'Missing'",
    "good.py:Plain": "no Flax NNX module class",
    "good.py:Unbuildable": "can't be built",
    "good.py:Random": "random state",
    "good.py:Small": "misshapen: fc2.bias",
    "good.py:Few": "not logits of the shape",
    "good.py:Looks": "under jax.jit: TracerBoolConversionError",
    "data.txt:Net": "must end with .py",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_modules_are_refused_with_a_reason(tmp_path, net, spec):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "data.txt").write_text("x\n")
    (tmp_path / "good.py").write_text(
        "from flax import nnx\nfrom examples.lenet import LeNet\n"
        "class Plain: pass\n"
        "class Unbuildable(nnx.Module):\n    def __init__(self): pass\n"
        "class Random(LeNet):\n    def __init__(self, n, size, rngs):\n"
        "        super().__init__(n, size, rngs)\n        self.dropout = nnx.Dropout(0.5, rngs=rngs)\n"
        "class Small(LeNet):\n    def __init__(self, n, size, rngs):\n"
        "        super().__init__(n, size, rngs)\n"
        "        self.fc2, self.fc3 = nnx.Linear(120, 80, rngs=rngs), nnx.Linear(80, n, rngs=rngs)\n"
        "class Few(LeNet):\n    def __call__(self, x): return super().__call__(x)[:, :4]\n"
        "class Looks(LeNet):\n    def __call__(self, x): return super().__call__(x if x.sum() > 0 else -x)\n"
    )
    sys.path.insert(0, str(ROOT))
    try:
        with pytest.raises(CheckpointError, match=WRONG[spec]) as caught:
            load(tmp_path / "net.pth", model=str(tmp_path / spec))
    finally:
        sys.path.remove(str(ROOT))
    assert "\n" not in str(caught.value)
