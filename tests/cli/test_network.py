"""Commands on a network that has another's names: what is assumed is said, clean images settle it, wrong ones stop."""

import json

import numpy as np
import pytest
import torch

from ibau_jax import load, load_dataset
from tests.cli.commands import CONVERT, EVALUATE, UNLEARN, run
from tests.models.test_look_alikes import made, patchwork, small_vgg, trained_statistics

NAME, BASE = "wide_resnet10_1_raw", "wide_resnet10_1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network with random weights, the statistics that digits give it, and digits labelled as it classifies them."""
    folder = tmp_path_factory.mktemp("network")
    digits = load_dataset("digits", (32, 32, 3))
    module = trained_statistics(made(NAME), digits)
    torch.save({"net": module.state_dict(), "criterion.weight": torch.ones(10)}, folder / "x.pth")
    images = digits.images[400:600]
    with torch.no_grad():
        labels = module(torch.tensor(images.transpose(0, 3, 1, 2)) / 255).argmax(1).numpy()
    np.savez(folder / "clean.npz", x=images, y=labels)
    np.savez(folder / "noise.npz", x=np.random.default_rng(0).integers(0, 256, images.shape, np.uint8), y=labels)
    return folder


def test_inspection_lists_the_candidates_and_the_evidence(folder):
    done = run(*CONVERT, "--inspect", "x.pth", cwd=folder)
    assert f"{BASE}, assumed" in " ".join(done.stdout.split())
    report = json.loads(run(*CONVERT, "--inspect", "x.pth", "--json", cwd=folder).stdout)
    assert (report["model"], report["assumed"], report["evidence"]) == (BASE, True, [])
    assert set(report["variants"]) == {BASE, NAME, f"{BASE}_leaky", f"{BASE}_leaky_raw"}
    done = run(*CONVERT, "--inspect", "x.pth", "--json", "--dataset", "clean.npz", cwd=folder)
    report = json.loads(done.stdout)
    assert (done.returncode, report["model"], report["assumed"], report["evidence"][0]["model"]) == (
        0,
        NAME,
        False,
        NAME,
    )
    assert report["evidence"][0]["discrepancy"] < 0.1 * report["evidence"][1]["discrepancy"]
    done = run(*CONVERT, "--inspect", "x.pth", "--json", "--dataset", "noise.npz", cwd=folder)
    assert (done.returncode, json.loads(done.stdout)["convertible"]) == (1, False)


def test_conversion_assumes_aloud_or_asks_clean_images(folder):
    done = run(*CONVERT, "x.pth", "assumed", cwd=folder)
    assert f"taken as {BASE}" in done.stdout
    assert json.loads((folder / "assumed" / "checkpoint.json").read_text())["alternatives"]
    done = run(*CONVERT, "x.pth", "known", "--dataset", "clean.npz", cwd=folder)
    assert (done.returncode, "taken as" in done.stdout) == (0, False), done.stderr
    assert load(folder / "known").architecture.name == NAME
    assert load(folder / "known").alternatives == ()
    done = run(*CONVERT, "x.pth", "wrong", "--dataset", "noise.npz", cwd=folder)
    assert (done.returncode, done.stderr.count("\nerror: ")) == (2, 1)
    assert "not those of the clean images" in done.stderr
    assert not (folder / "wrong").exists()


def test_what_computes_settles_an_assumption(folder):
    """The labels are the right network's own classes: nothing but the right network gets all of them."""
    done = run(*EVALUATE, "--ckpt", "x.pth", "--dataset", "clean.npz", "--json", cwd=folder)
    assert json.loads(done.stdout)["acc"] > 0.99, done.stderr
    assert f"is {NAME}" in done.stderr
    done = run(*EVALUATE, "--ckpt", "x.pth", "--dataset", "clean.npz", "--model", BASE, cwd=folder)
    assert done.returncode == 2


@pytest.mark.slow
def test_unlearning_settles_an_assumption(folder):
    settings = ["--preset", "cifar10", "--n-rounds", 1, "--K", 1, "--n-clean", 40, "--batch-size", 20, "--out", "out"]
    done = run(*UNLEARN, "--ckpt", "x.pth", "--dataset", "clean.npz", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert (result["model"], result["evidence"][0]["model"]) == (NAME, NAME)
    assert load(folder / "out" / "flax").architecture.name == NAME


@pytest.mark.slow
def test_a_network_that_is_altered(tmp_path):
    """As clean images say; another one that --model names is refused."""
    images = patchwork()
    module = trained_statistics(small_vgg(torch.nn.SiLU()), images)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    with torch.no_grad():
        labels = module(torch.tensor(images.images.transpose(0, 3, 1, 2)) / 255).argmax(1).numpy()
    np.savez(tmp_path / "clean.npz", x=images.images, y=labels)
    command = [*EVALUATE, "--ckpt", "x.pth", "--dataset", "clean.npz", "--json"]
    done = run(*command, cwd=tmp_path)
    assert json.loads(done.stdout)["acc"] > 0.99, done.stderr
    assert "is small_vgg+silu" in done.stderr
    done = run(*command, "--model", "small_vgg", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--model small_vgg+silu" in done.stderr


def test_a_file_that_names_an_altered_network(tmp_path):
    torch.save({"net": small_vgg().state_dict(), "ibau_jax": {"model": "small_vgg+silu"}}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "small_vgg+silu"
