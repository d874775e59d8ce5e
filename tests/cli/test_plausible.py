"""Every command that measures looks first whether the images belong to the model, and whether its logits are numbers."""

import json

import numpy as np
import pytest
import torch

from tests.cli.commands import AUDIT, COMPARE, CONVERT, EVALUATE, EXAMPLE, FAST, UNLEARN, run

COMMANDS = {
    "evaluate": EVALUATE,
    "audit": [*AUDIT, "--audit-steps", 3],
    "compare": [*COMPARE, "--n-clean", 40, "--methods", "ft", "--epochs", 1, "--out", "table"],
    "unlearn": [*UNLEARN, *FAST, "--out", "run"],
}

SHORT = ("evaluate", "unlearn")
EACH = [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def shifted(tmp_path_factory, small_digits):
    """The images whose class 3 is missing, the later ones counted on."""
    with np.load(small_digits) as data:
        x, y = data["x"], data["y"]
    path = tmp_path_factory.mktemp("shifted") / "shifted.npz"
    np.savez(path, x=x[y != 3], y=(y - (y > 3))[y != 3])
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The example with a NaN in the statistics of its first normalisation."""
    tree = torch.load(EXAMPLE, weights_only=True)
    tree["net"]["features.1.running_mean"][3] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "broken.pth"
    torch.save(tree, path)
    return path


@pytest.mark.parametrize("command", EACH)
def test_labels_that_are_not_the_models(tmp_path, shifted, command):
    done = run(*COMMANDS[command], "--ckpt", EXAMPLE, "--dataset", shifted, cwd=tmp_path)
    error = done.stderr.splitlines()[-1]
    assert (done.returncode, error[:7]) == (2, "error: "), done.stderr
    assert "Traceback" not in done.stderr
    for text in ("% rightly, but", "label 3 is the model's class 4, 4 is 5", "--class-order", "--force goes on"):
        assert text in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", EACH)
def test_logits_that_are_not_finite(tmp_path, small_digits, broken, command):
    done = run(*COMMANDS[command], "--ckpt", broken, "--dataset", small_digits, "--force", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    named, error = done.stderr.splitlines()[-2:] if command != "audit" else (done.stderr, done.stderr.splitlines()[-1])
    assert "1 in features.1.running_mean" in named
    assert error.startswith("error: ")
    assert "images of" in error
    assert "are not finite" in error
    assert "verdict" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_forced(tmp_path, shifted):
    done = run(*EVALUATE, "--ckpt", EXAMPLE, "--dataset", shifted, "--json", "--force", cwd=tmp_path)
    assert done.returncode == 0
    assert "label 3 is the model's class 4" in done.stderr
    assert done.stderr.count("\n") == 1
    with np.load(shifted) as data:
        few = np.mean(data["y"] < 3)
    assert json.loads(done.stdout)["acc"] == pytest.approx(few, abs=0.05)


def test_a_reference_of_other_classes_is_refused(tmp_path, small_digits):
    tree = torch.load(EXAMPLE, weights_only=True)
    *_, bias = (name for name in tree["net"] if name.endswith("bias"))
    for name in (bias, bias.replace("bias", "weight")):
        tree["net"][name] = tree["net"][name].roll(1, 0)
    torch.save(tree, tmp_path / "reference.pth")
    arguments = ["--relearn", 3, "--clean-ckpt", tmp_path / "reference.pth", "--out", "run"]
    done = run(*UNLEARN, *FAST, "--ckpt", EXAMPLE, "--dataset", small_digits, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'reference.pth'}: of" in done.stderr
    assert "label 0 is the model's class 1" in done.stderr


def test_converting_keeps_what_is_not_finite_and_says_so(tmp_path, broken):
    for source, target in ((broken, "flax"), ("flax", "again.pth")):
        done = run(*CONVERT, source, target, cwd=tmp_path)
        assert done.returncode == 0
        assert "not finite: 1 in features.1.running_mean" in done.stderr
        assert ("which leave no trace in a file, are taken as small_vgg has them" in done.stdout) == (source == broken)
    old, new = (torch.load(path, weights_only=True)["net"] for path in (broken, tmp_path / "again.pth"))
    assert all(new[name].numpy().tobytes() == value.numpy().tobytes() for name, value in old.items())
