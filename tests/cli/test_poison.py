"""Making a poisoned model as a user does: what is written, what the other commands make of it, wrong input."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax.cli.options import DeviceOptions, parse
from ibau_jax.cli.poison import run as poison
from ibau_jax.cli.poison_options import PoisonOptions
from ibau_jax.errors import ConfigError, IbauError
from ibau_jax.models.small_vgg import torch_module
from ibau_jax.triggers import Attack, read_triggers
from ibau_jax.triggers.attack import together
from tests.cli.commands import EVALUATE, POISON, run

SMALL = ["--epochs", 2, "--batch-size", 20, "--crop", 1, "--lr", 0.02, "--device", "cpu"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, small_digits):
    folder = tmp_path_factory.mktemp("poisoned")
    attacks = ["--attack", "badnets:size=3,row=1,column=1", "sig", "--target-label", 3, 5]
    done = run(*POISON, "--dataset", small_digits, "--out", "out", *attacks, *SMALL, cwd=folder, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_what_is_written(poisoned):
    folder, done = poisoned
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.pth", "result.json", "triggers.npz", "triggers.png"
    ]  # fmt: skip
    assert not list(folder.parent.glob(".*"))
    result = json.loads((folder / "result.json").read_text())
    assert result["config"]["attacks"] == ["badnets:size=3,row=1,column=1", "sig"]
    assert result["config"]["target_labels"] == [3, 5]
    assert (result["config"]["n_training"], result["config"]["n_test"]) == (108, 12)
    assert all(0 <= result["metrics"][name] <= 1 for name in ("acc", "asr", "ra"))
    torch_module(10).load_state_dict(torch.load(folder / "model.pth", weights_only=True)["net"])
    with Image.open(folder / "triggers.png") as picture:
        assert picture.size == (8 * 32 * 3, 3 * 32 * 3)
    for text in ("epoch 2/2", "badnets:size=3,row=1,column=1 (to class 3), sig (to class 5)", "model.pth written"):
        assert text in done.stdout


@pytest.mark.slow
def test_other_commands_find_the_triggers(poisoned, small_digits):
    """Unasked, beside the checkpoint, with their targets."""
    folder, _ = poisoned
    found = run(*EVALUATE, "--ckpt", folder / "model.pth", "--dataset", small_digits, "--json", cwd=folder.parent)
    assert found.returncode == 0, found.stderr
    metrics = json.loads(found.stdout)
    module = torch_module(10)
    module.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["net"])
    with np.load(small_digits) as data:
        images, labels = data["x"].astype(np.float32) / 255, data["y"]
    patched, waves = images.copy(), images + 20 / 255 * np.sin(2 * np.pi * 6 * np.arange(32) / 32)[None, None, :, None]
    patched[:, 1:4, 1:4] = 1
    hits = []
    for stamped, target in ((patched, 3), (np.clip(waves, 0, 1).astype(np.float32), 5)):
        with torch.no_grad():
            said = module.eval()(torch.tensor(stamped.transpose(0, 3, 1, 2))).argmax(1).numpy()
        hits.append(said[labels != target] == target)
    assert metrics["asr"] == pytest.approx(np.concatenate(hits).mean(), abs=0.01)  # an image on the border may differ


def options_of(out, data, **choices):
    return PoisonOptions(
        **{"dataset": str(data), "out": out, "device": DeviceOptions("cpu", compile_cache=False), "epochs": 2}
        | {"batch_size": 20, "crop": 1, "lr": 0.02, "target_label": (3,), "ratio": 0.2}
        | choices
    )


@pytest.mark.slow
def test_an_interrupted_training_goes_on_bit_by_bit(tmp_path, small_digits, monkeypatch, compiled_quickly):
    """With a trigger that is learnt too: its state is the larger one."""
    monkeypatch.setattr("ibau_jax.trigger_learning.MASK_STEPS", 5)
    options = partial(options_of, attack=("input_aware:width=2",))
    poison(options(tmp_path / "whole", small_digits))
    with monkeypatch.context() as patched:
        patched.setattr("ibau_jax.cli.poison.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            poison(options(tmp_path / "broken", small_digits))
    last = tmp_path / ".broken.partial" / "epoch-00002"
    (last / "state.json").write_text("{")  # as if the machine had gone down while it was written
    with pytest.raises(ConfigError, match="lr changed"):
        poison(options(tmp_path / "broken", small_digits, lr=0.03, resume=True))
    poison(options(tmp_path / "broken", small_digits, resume=True))
    for name in ("model.pth", "triggers.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert read_triggers(tmp_path / "whole" / "triggers.npz", (32, 32, 3)).stamp.learnt
    assert not (tmp_path / ".broken.partial").exists()


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_clean_model_has_no_triggers(tmp_path, small_digits):
    poison(options_of(tmp_path / "clean", small_digits, attack=("none",), target_label=(), epochs=1))
    assert sorted(file.name for file in (tmp_path / "clean").iterdir()) == ["model.pth", "result.json"]
    assert json.loads((tmp_path / "clean" / "result.json").read_text())["metrics"]["asr"] is None
    jax.clear_caches()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "nosuch", "--target-label", 3], "'nosuch' is no attack and no file"),
        (["--attack", "badnets"], "attacks: 1, target labels: 0"),
        (["--attack", "badnets", "--target-label", 12], "the target label 12 is no class"),
        (["--attack", "none", "--target-label", 3], "says nothing with --attack none"),
        (["--attack", "trojan_wm", "--target-label", 3], "name its folder by --trigger-dir"),
        (["--target-label", 3, "--ratio", 1.5], "the poison ratio is 1.5"),
        (["--target-label", 3, "--ratio", 0.5, "--clean-label"], "choose another poison ratio"),
        (["--target-label", 3, "--model", "nosuch"], "there is no model 'nosuch'"),
        (["--target-label", 3, "--epochs", 0], "epochs is 0"),
        (["--target-label", 3, "--batch-size", 2000], "fewer images than a batch of 2000"),
        (["--target-label", 3, "--batch-size", 20, "--resume"], "no interrupted run to resume"),
    ],
)
def test_wrong_input_writes_nothing(tmp_path, monkeypatch, small_digits, arguments, message):
    line = ["poison.py", "--dataset", small_digits, "--out", tmp_path / "out", "--device", "cpu", *arguments]
    monkeypatch.setattr("sys.argv", [str(word) for word in line])
    given = parse(PoisonOptions)
    with pytest.raises(IbauError) as raised:
        poison(given)
    assert message in " ".join(str(raised.value).split())
    assert not list(tmp_path.iterdir())


def test_results_are_not_overwritten(poisoned, small_digits):
    folder, _ = poisoned
    done = run(*POISON, "--dataset", small_digits, "--out", folder, "--target-label", 3, *SMALL, cwd=folder.parent)
    assert done.returncode == 2
    assert "already holds model.pth, triggers.npz, triggers.png, result.json; add --overwrite" in done.stderr


def test_an_attack_names_all_of_a_model():
    two = together([Attack("badnets", None, target_label=3), Attack("sig", None, target_label=5)])
    assert two.description == "badnets (to class 3), sig (to class 5)"
    assert Attack("badnets_all2all", None, all_to_all=True).description == "badnets_all2all (all to all)"
