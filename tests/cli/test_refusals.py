"""What `scripts/unlearn.py` can't do: one line, exit code 2, and nothing left behind."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch

from ibau_jax.checkpoints import load, save
from tests.cli.commands import EXAMPLE, FAST, UNLEARN, run, unlearn


def broken_file(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    return tmp_path / "broken.pth"


def saved(tmp_path, tree):
    torch.save(tree, tmp_path / "saved.pth")
    return tmp_path / "saved.pth"


def images(tmp_path, x, y):
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return ["--ckpt", EXAMPLE, "--dataset", tmp_path / "images.npz"]


def zeros(*shape):
    return np.zeros(shape, np.uint8)


def link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


def flax(tmp_path):
    save(load(EXAMPLE), tmp_path / "flax")
    return tmp_path / "flax"


def at_home(tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "run" / "model.pth")
    return ["--ckpt", tmp_path / "run" / "model.pth", "--out", tmp_path / "run"]


def data_at_home(tmp_path):
    """Images where a run's Flax folder goes."""
    (tmp_path / "run" / "flax").mkdir(parents=True)
    np.savez(tmp_path / "run" / "flax" / "d.npz", x=zeros(9, 32, 32, 3), y=np.zeros(9, int))
    return [
        "--ckpt",
        EXAMPLE,
        "--dataset",
        tmp_path / "run" / "flax" / "d.npz",
        "--out",
        tmp_path / "run",
        "--overwrite",
    ]


BAD = {
    "missing file": (lambda t: ["--ckpt", "nosuch.pth"], "can't read nosuch.pth"),
    "truncated file": (lambda t: ["--ckpt", broken_file(t, EXAMPLE.read_bytes()[:50_000])], "damaged or truncated"),
    "no checkpoint": (lambda t: ["--ckpt", broken_file(t, b"MZ\x90 something else")], "no PyTorch checkpoint"),
    "forbidden global": (
        lambda t: ["--ckpt", saved(t, {"net": torch.ones(2), "log": print})],
        "builtin",
    ),
    "no state dict": (lambda t: ["--ckpt", saved(t, {"acc": 1})], "no state dict"),
    "unknown architecture": (lambda t: ["--ckpt", saved(t, {"fc.weight": torch.ones(2, 2)})], "fc.weight (2, 2)"),
    "unknown model": (lambda t: ["--ckpt", EXAMPLE, "--model", "resnet0"], "small_vgg"),
    "wrong classes": (lambda t: ["--ckpt", EXAMPLE, "--num-classes", 43], "misshapen"),
    "no data": (lambda t: ["--ckpt", saved(t, torch.load(EXAMPLE, weights_only=True)["net"])], "--dataset"),
    "unknown data": (lambda t: ["--ckpt", EXAMPLE, "--dataset", "nosuch.npz"], "no file nosuch.npz"),
    "wrong size": (lambda t: images(t, zeros(9, 28, 28, 3), np.zeros(9, int)), "28x28x3"),
    "wrong channels": (lambda t: images(t, zeros(9, 32, 32, 1), np.zeros(9, int)), "32x32x1"),
    "wrong labels": (lambda t: images(t, zeros(9, 32, 32, 3), np.full(9, 10)), "label 10"),
    "not a number": (lambda t: images(t, np.full((9, 32, 32, 3), np.nan), np.zeros(9, int)), "NaN"),
    "out of range": (lambda t: images(t, np.full((9, 32, 32, 3), 2.0), np.zeros(9, int)), "[0, 1]"),
    "no images": (lambda t: images(t, zeros(0, 32, 32, 3), np.zeros(0, int)), "empty"),
    "empty clean set": (lambda t: ["--ckpt", EXAMPLE, "--n-clean", 0], "--n-clean"),
    "batch size 0": (lambda t: ["--ckpt", EXAMPLE, "--batch-size", 0], "batch_size is 0"),
    "unknown optimiser": (lambda t: ["--ckpt", EXAMPLE, "--optim", "nosuch"], "nosuch"),
    "target out of range": (lambda t: ["--ckpt", EXAMPLE, "--target-label", 10], "target label 10"),
    "target without attack": (
        lambda t: [
            "--ckpt",
            saved(t, torch.load(EXAMPLE, weights_only=True)["net"]),
            "--dataset",
            "digits",
            "--target",
            1,
        ],
        "without --attack",
    ),
    "unknown attack": (lambda t: ["--ckpt", EXAMPLE, "--attack", "nosuch"], "badnets_all2all"),
    "no trigger file": (lambda t: ["--ckpt", EXAMPLE, "--attack", "trojan_wm"], "--trigger-dir"),
    "out is a file": (lambda t: ["--ckpt", EXAMPLE, "--out", broken_file(t, b"x")], "is a file"),
    "out below a file": (lambda t: ["--ckpt", EXAMPLE, "--out", broken_file(t, b"x") / "y"], "not a folder"),
    "nothing to resume": (lambda t: ["--ckpt", EXAMPLE, "--resume"], "no interrupted run"),
    "unknown device": (lambda t: ["--ckpt", EXAMPLE, "--device", "abacus"], "abacus"),
    "no such device": (lambda t: ["--ckpt", EXAMPLE, "--device", "tpu"], "no device"),
    "no such GPU": (lambda t: ["--ckpt", EXAMPLE, "--device", "cuda:99"], "no device"),
    "out is a dangling link": (lambda t: ["--ckpt", EXAMPLE, "--out", link(t)], "is a link to"),
    "out in the Flax folder": (lambda t: ["--ckpt", flax(t), "--out", t / "flax" / "run"], "lies in the folder"),
    "out replaces the checkpoint": (lambda t: [*at_home(t), "--overwrite"], "would replace"),
    "out replaces the data": (data_at_home, "d.npz, which is read"),
    "evaluation images of the target": (
        lambda t: images(t, np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8), np.full(60, 3)),
        "no image is left to measure badnets",
    ),
    "negative seed": (lambda t: ["--ckpt", EXAMPLE, "--seed", -1], "seed is -1"),
    "endless seed": (lambda t: ["--ckpt", EXAMPLE, "--seed", 2**63], "less than 2**32"),
    "invisible trigger": (lambda t: ["--ckpt", EXAMPLE, "--attack", "blended:alpha=1e-300"], "changes no pixel"),
    "wrong deviation": (lambda t: ["--ckpt", EXAMPLE, "--std", 0, 1, 1], "deviations positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, name):
    make, message = BAD[name]
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = unlearn(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    done = unlearn("--ckpt", EXAMPLE, "--out", tmp_path / "closed" / "run", cwd=tmp_path)
    assert (done.returncode, "permission" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path, small_digits):
    """Fault injection: no file may grow beyond 200 kB, so the first big one fails half-way."""
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *FAST]
    done = run(sys.executable, "-c", limited, *UNLEARN[1:], *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_divergence_in_the_first_round_writes_nothing(tmp_path, small_digits):
    done = unlearn(
        "--ckpt",
        EXAMPLE,
        "--dataset",
        small_digits,
        *FAST,
        "--inner-lr",
        "1e38",
        "--lr",
        "1e38",
        "--optim",
        "sgd",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "NaN or infinite" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "text"),
    [(["--relearn", 900], "choose 1 to"), (["--relearn", 3, "--clean-ckpt", "nosuch.pth"], "nosuch.pth")],
)
def test_relearning_that_can_not_be_tried(tmp_path, small_digits, wrong, text):
    done = unlearn("--ckpt", EXAMPLE, "--dataset", small_digits, *FAST, "--relearn-epochs", 2, *wrong, cwd=tmp_path)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())
