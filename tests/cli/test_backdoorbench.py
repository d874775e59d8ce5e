"""The scripts on a file as BackdoorBench writes it, with its folder of triggered images beside it."""

import json

import numpy as np
import pytest
import torch

from tests.checkpoints.test_conversion import random_vgg
from tests.checkpoints.test_wild import attack_result
from tests.cli.commands import CONVERT, EVALUATE, FAST, UNLEARN, run


@pytest.mark.slow
def test_everything_is_taken_from_the_file(tmp_path):
    attack_result(tmp_path, random_vgg().state_dict(), model_name="small_vgg", target=4)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "clean.npz", x=rng.integers(0, 256, (30, 32, 32, 3), np.uint8), y=rng.integers(0, 10, 30))
    done = run(*EVALUATE, "--ckpt", "attack_result.pt", "--dataset", "clean.npz", "--json", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = json.loads(done.stdout)
    assert before["asr"] is not None

    options = [*FAST, "--force", "--n-clean", 20, "--inner-lr", 0.1, "--out", "out"]
    done = run(*UNLEARN, "--ckpt", "attack_result.pt", "--dataset", "clean.npz", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["config"]["attacks"] == [f"folder:{tmp_path}/bd_test_dataset"]
    assert (result["config"]["target_labels"], result["config"]["mean"]) == ([4], [0.4914, 0.4822, 0.4465])
    cleaned = torch.load(tmp_path / "out" / "model.pth", weights_only=False)
    assert cleaned["bd_test"]["bd_data_container"]["data_dict"][7]["other_info"] == [4, 2]
    random_vgg().load_state_dict(cleaned["model"])


@pytest.mark.slow
def test_comparing_on_real_images(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.tar")
    done = run(*CONVERT, "x.tar", "y.bin", "--verify", 5, "--dataset", "digits", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logits of 5 random images differ" in done.stdout
    assert "logits of 5 digits" in done.stdout
    done = run(*CONVERT, "x.tar", "z.bin", "--verify", 0, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --verify 0 compares nothing; give at least 1\n")
