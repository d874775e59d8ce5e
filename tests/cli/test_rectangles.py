"""Images that are not square on the command line: trained, converted, unlearned, audited; and wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax import load
from tests.cli.commands import AUDIT, CONVERT, EVALUATE, FAST, POISON, UNLEARN, run

SIZE = (24, 32)
MODULE = """
from torch import nn
from ibau_jax.models.small_vgg import torch_module

def make(classes):
    model = torch_module(classes)
    model.classifier = nn.Linear(128 * 3 * 4, classes)
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_digits):
    """The middle of digits, and a poisoned model of them."""
    folder = tmp_path_factory.mktemp("rectangles")
    with np.load(small_digits) as digits:
        np.savez(folder / "wide.npz", x=digits["x"][:, 4:28], y=digits["y"])
        for label in range(10):
            (folder / "images" / str(label)).mkdir(parents=True)
            for number, image in enumerate(digits["x"][digits["y"] == label][:4]):
                Image.fromarray(image[:, : 30 - number]).save(folder / "images" / str(label) / f"{number}.png")
    attacks = ["--attack", "badnets:size=3,row=1,column=-4", "wanet", "--target-label", 3, 5]
    settings = ["--image-size", "24x32", "--epochs", 2, "--batch-size", 20, "--crop", 1, "--flip", "--device", "cpu"]
    done = run(*POISON, "--dataset", "wide.npz", "--out", "poisoned", *attacks, *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_model_is_trained(folder):
    result = json.loads((folder / "poisoned" / "result.json").read_text())
    assert result["config"]["image_size"] == [24, 32]
    with Image.open(folder / "poisoned" / "triggers.png") as picture:
        assert picture.size == (8 * 32 * 3, 3 * 24 * 3)
    with np.load(folder / "poisoned" / "triggers.npz") as triggers:
        assert triggers["1.grid"].shape == (24, 32, 2)
        assert triggers["0.columns"].tolist() == [28, 31]


def test_it_is_converted_and_verified(folder):
    (folder / "module.py").write_text(MODULE)
    done = run(*CONVERT, "poisoned/model.pth", "flax", "--verify", 4, "--torch-module", "module.py:make", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "24x32 images" in done.stdout
    assert json.loads((folder / "flax" / "checkpoint.json").read_text())["image_size"] == [24, 32]
    done = run(*CONVERT, "--inspect", "--json", "poisoned/model.pth", cwd=folder)
    report = json.loads(done.stdout)
    assert (report["image_size"], report["model"], report["convertible"]) == ([24, 32], "small_vgg", True)
    assert "24x32" in run(*CONVERT, "--inspect", "poisoned/model.pth", cwd=folder).stdout


def test_a_bare_state_dict_needs_the_size(folder):
    torch.save(torch.load(folder / "poisoned" / "model.pth", weights_only=True)["net"], folder / "bare.pth")
    done = run(*CONVERT, "bare.pth", "bare", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--image-size HEIGHTxWIDTH says the size" in done.stderr
    assert run(*CONVERT, "bare.pth", "bare", "--image-size", "24x32", cwd=folder).returncode == 0
    assert load(folder / "bare").input_shape == (*SIZE, 3)
    done = run(*CONVERT, "bare", "again.pth", "--image-size", "32x24", cwd=folder)
    assert done.returncode == 2
    assert "for the image size 24x32, not 32x24" in done.stderr


def test_it_unlearns(folder):
    done = run(
        *UNLEARN, "--ckpt", "poisoned/model.pth", "--dataset", "wide.npz", *FAST, "--force", "--out", "out", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert result["config"]["image_size"] == [24, 32]
    assert load(folder / "out" / "model.pth").input_shape == (*SIZE, 3)
    assert (folder / "out" / "report.html").exists()
    done = run(*EVALUATE, "--ckpt", "out/flax", "--dataset", "images", "--json", "--force", cwd=folder)
    assert 0 <= json.loads(done.stdout)["acc"] <= 1, done.stderr


@pytest.mark.slow
def test_it_is_audited(folder):
    done = run(*AUDIT, "--ckpt", "poisoned/model.pth", "--dataset", "wide.npz", "--force", "--json", cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("size", ["32x", "0x10", "x32", "32x32x3", "5000"])
def test_what_is_no_size(size, folder):
    done = run(*CONVERT, "poisoned/model.pth", "none", "--image-size", size, cwd=folder)
    assert done.returncode == 2
    assert "--image-size is N or HEIGHTxWIDTH" in " ".join(done.stderr.replace("│", " ").split())
    assert not (folder / "none").exists()


def test_images_of_another_size(folder, small_digits):
    done = run(*EVALUATE, "--ckpt", "poisoned/model.pth", "--dataset", small_digits, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has images of 32x32x3" in done.stderr
    assert "takes 24x32x3; choose other images, or --image-size 32x32" in done.stderr
