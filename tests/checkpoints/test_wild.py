"""Checkpoints as people have them: wrappers, prefixes, cargo, endings, and BackdoorBench's results."""

import datetime
import pathlib
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax import NORMALIZATIONS, load, save
from ibau_jax.checkpoints import read_hints
from ibau_jax.checkpoints.verify import verify
from ibau_jax.cli.job import attack_on, load_images, load_subject
from ibau_jax.cli.options import AttackOptions, DataOptions, ModelOptions
from ibau_jax.errors import CheckpointError, ConfigError, DataError
from ibau_jax.metrics import evaluate, predict
from tests.checkpoints.test_conversion import assert_same_tree, random_vgg
from tests.oracles.cifar_models import PreActResNet, randomise


def small(seed=0):
    return random_vgg(10, seed).state_dict()


def round_trip(source, target, **options):
    """The file's tree before and after, both read by torch."""
    save(load(source, **options), target)
    return [torch.load(path, weights_only=False) for path in (source, target)]


@pytest.mark.parametrize("ending", [".pth.tar", ".tar", ".pkl", ".bin", ".ckpt", ".pt", ".safetensors", "", ".jpg"])
def test_the_content_tells_the_format_not_the_ending(tmp_path, ending):
    torch.save({"state_dict": small()}, tmp_path / f"x{ending}")
    assert load(tmp_path / f"x{ending}").envelope.format == "zip"


@pytest.mark.parametrize("ending", [".pth.tar", ".tar", ".pkl", ".bin", ".ckpt", ".pt"])
def test_every_ending_of_pytorch_is_written_as_pytorch(tmp_path, ending):
    torch.save({"state_dict": small()}, tmp_path / "x.pth")
    assert_same_tree(*round_trip(tmp_path / "x.pth", tmp_path / f"y{ending}"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_dumped(tmp_path, protocol):
    state = {"net": small(), "half": torch.ones(3).half()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(state, protocol=protocol))
    checkpoint = load(tmp_path / "x.pkl")
    assert checkpoint.envelope.format == "pickle"
    assert verify(checkpoint, tmp_path / "x.pkl") <= 1e-5
    save(checkpoint, tmp_path / "y.pkl")
    assert_same_tree(pickle.loads((tmp_path / "y.pkl").read_bytes()), state)


PREFIXES = {
    "DataParallel": "module.",
    "torch.compile": "_orig_mod.",
    "Lightning": "model.",
    "compiled Lightning under DDP": "module.model._orig_mod.",
    "behind a normalisation": "1.",
    "an encoder": "backbone.model.",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes(tmp_path, name):
    state = OrderedDict((PREFIXES[name] + key, value) for key, value in small().items())
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "x.pth")
    assert_same_tree(*round_trip(tmp_path / "x.pth", tmp_path / "y.pth"))
    assert load(tmp_path / "x.pth", model="small_vgg").envelope.prefix == PREFIXES[name]
    assert verify(load(tmp_path / "x.pth"), tmp_path / "x.pth") <= 1e-5


def test_weight_averaging_and_profiling_leave_counters(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(random_vgg())
    state = averaged.state_dict()
    state["module.total_ops"], state["module.features.0.total_params"] = torch.ones(1), torch.zeros(1)
    torch.save({"model": state}, tmp_path / "x.pth")
    assert "n_averaged" in state
    assert_same_tree(*round_trip(tmp_path / "x.pth", tmp_path / "y.pth"))
    assert verify(load(tmp_path / "x.pth"), tmp_path / "x.pth") <= 1e-5


def test_one_of_several_state_dicts(tmp_path):
    first, second, third = small(1), small(2), small(3)
    tree = {
        "model": first,
        "model_ema": second,
        "ema": {"state_dict": third},
        "optimizer": {"state": {0: torch.ones(2)}},
    }
    torch.save(tree, tmp_path / "x.pth")
    for key, state in ((None, first), ("model", first), ("model_ema", second), ("ema.state_dict", third)):
        checkpoint = load(tmp_path / "x.pth", key=key)
        np.testing.assert_array_equal(checkpoint.leaves["classifier", "bias"], state["classifier.bias"].numpy())
        assert_same_tree(*round_trip(tmp_path / "x.pth", tmp_path / "y.pth", key=key))
    with pytest.raises(CheckpointError, match=r"no state dict under 'nosuch'.*'model', 'model_ema', 'ema.state_dict'"):
        load(tmp_path / "x.pth", key="nosuch")
    torch.save({"teacher": first, "student": second}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several state dicts: 'teacher', 'student'; choose one by --key"):
        load(tmp_path / "x.pth")
    torch.save({"weights": first, "trigger": {"mask": torch.ones(2), "pattern": torch.ones(2)}}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").envelope.path == ("weights",)


def test_cargo_is_kept(tmp_path):
    optimizer = torch.optim.Adam(random_vgg().parameters())
    optimizer.zero_grad()
    cargo = {
        "optimizer": optimizer.state_dict(),
        "path": pathlib.PurePosixPath("runs/best"),
        "when": datetime.datetime(2024, 2, 29, 12, 30),
        "took": datetime.timedelta(hours=3),
        "best": [1.5, None, True, (2, "x")],
    }
    torch.save({"state_dict": small(), **cargo}, tmp_path / "x.pth")
    before, after = round_trip(tmp_path / "x.pth", tmp_path / "y.pth")
    assert {key: after[key] for key in cargo} == cargo
    assert_same_tree(before["state_dict"], after["state_dict"])


def attack_result(folder, state, model_name="preactresnet18", data="cifar10", size=(32, 32, 3), target=3, **changes):
    """attack_result.pt and bd_test_dataset/ as BackdoorBench v2 stores them; image `index` is of class index % 5."""
    rng, images = np.random.default_rng(0), {}
    for index in range(20):
        label = index % 5
        path = folder / "bd_test_dataset" / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
        images[np.int64(index)] = {
            "path": f"./record/x/bd_test_dataset/{label}/{index}.png",
            "other_info": [target, label],
        }
    bd_test = {
        "bd_data_container": {
            "save_folder_path": "./record/x/bd_test_dataset",
            "data_dict": images,
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(20),
        "poison_indicator": np.ones(20),
        "save_folder_path": "./record/x/bd_test_dataset",
    }
    result = {
        "model_name": model_name,
        "num_classes": 10,
        "model": state,
        "data_path": "../data",
        "img_size": list(size),
        "clean_data": data,
        "bd_train": {**bd_test, "poison_indicator": np.zeros(50)},
        "bd_test": bd_test,
        **changes,
    }
    torch.save(result, folder / "attack_result.pt")
    return result


@pytest.fixture
def preact(tmp_path):
    torch.manual_seed(0)
    return randomise(PreActResNet(18, 10), 1)


def test_backdoorbench_attack_result(tmp_path, preact):
    """Everything that the file says is used, and everything in it comes back."""
    result = attack_result(tmp_path, preact.state_dict())
    subject = load_subject(ModelOptions(tmp_path / "attack_result.pt"))
    assert (subject.checkpoint.architecture.name, subject.checkpoint.num_classes) == ("preact_resnet18", 10)
    assert subject.checkpoint.input_shape == (32, 32, 3)
    assert subject.normalization == NORMALIZATIONS["cifar10"]
    attack = attack_on(subject, AttackOptions(), used=[0, 1, 19])
    assert attack.target_label == 3
    assert sorted(np.bincount(attack.triggered.labels).tolist()) == [3, 3, 3, 4, 4]

    images = attack.triggered
    unit = torch.as_tensor(images.images.transpose(0, 3, 1, 2) / np.float32(255))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)))
    with torch.no_grad():
        expected = preact((unit - mean) / std).argmax(1).numpy()
    np.testing.assert_array_equal(predict(subject.model, images), expected)
    others = images.labels != 3
    assert evaluate(subject.model, images, attack).asr == pytest.approx(np.mean(expected[others] == 3))

    save(subject.checkpoint, tmp_path / "y.pt")
    back = torch.load(tmp_path / "y.pt", weights_only=False)
    assert list(back) == list(result)
    assert_same_tree(back["model"], result["model"])
    assert back["bd_test"]["bd_data_container"] == result["bd_test"]["bd_data_container"]
    np.testing.assert_array_equal(back["bd_train"]["poison_indicator"], np.zeros(50))
    make = lambda classes: PreActResNet(18, classes)  # noqa: E731
    assert verify(subject.checkpoint, tmp_path / "attack_result.pt", torch_module=make) <= 1e-5


def test_backdoorbench_without_its_folder_or_its_data(tmp_path, preact):
    attack_result(tmp_path, preact.state_dict(), data="gtsrb", size=(64, 64, 3))
    shutil.rmtree(tmp_path / "bd_test_dataset")
    subject = load_subject(ModelOptions(tmp_path / "attack_result.pt"))
    assert subject.normalization is None  # BackdoorBench does not normalise GTSRB
    assert subject.checkpoint.input_shape == (64, 64, 3)
    assert attack_on(subject, AttackOptions()) is None
    chosen = load_subject(ModelOptions(tmp_path / "attack_result.pt", normalize="gtsrb", image_size=32))
    assert chosen.normalization == NORMALIZATIONS["gtsrb"]
    assert chosen.checkpoint.input_shape == (32, 32, 3)
    torch.save(
        {"model_name": "preactresnet18", "num_classes": 10, "model": preact.state_dict()},
        tmp_path / "defense_result.pt",
    )
    hints = load_subject(ModelOptions(tmp_path / "defense_result.pt")).hints
    assert (hints.source, hints.model, hints.normalization) == ("BackdoorBench", "preactresnet18", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": "big"},
        {"img_size": [10**9]},
        {"img_size": []},
        {"num_classes": [1]},
        {"clean_data": 7},
        {"bd_test": 3},
        {"bd_test": {"bd_data_container": {"data_dict": {0: {"other_info": 5}, 1: 2}}}},
        {"model_name": "nosuch"},
    ],
)
def test_hints_may_be_nonsense(tmp_path, changes):
    """The weights decide; what a hostile file says of itself is at most ignored."""
    state = small()
    shape = (32, 32, 3)
    attack_result(tmp_path, state, **changes)
    assert load(tmp_path / "attack_result.pt").input_shape == shape
    hints = read_hints(load(tmp_path / "attack_result.pt").metadata())
    assert hints.image_size in (None, 32)


def test_normalisation_options_exclude_each_other(tmp_path):
    torch.save(small(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="leave out --mean"):
        load_subject(ModelOptions(tmp_path / "x.pth", normalize="cifar10", mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ConfigError, match="3 channels"):
        load_subject(ModelOptions(tmp_path / "x.pth", mean=(0.5,), std=(0.5,)))
    with pytest.raises(ConfigError, match="deviations positive"):
        load_subject(ModelOptions(tmp_path / "x.pth", std=(0.5, 0.0, 1.0)))
    assert load_subject(ModelOptions(tmp_path / "x.pth", normalize="none")).normalization is None
    assert load_subject(ModelOptions(tmp_path / "x.pth", normalize="imagenet")).normalization.mean[0] == 0.485


def test_a_folder_of_triggered_images_must_make_sense(tmp_path, preact):
    attack_result(tmp_path, preact.state_dict())
    subject = load_subject(ModelOptions(tmp_path / "attack_result.pt"))
    images = tmp_path / "bd_test_dataset"
    for spec, message in (
        ("folder:/nosuch", "no folder /nosuch"),
        (f"folder:{tmp_path}", "bd_test_dataset is no class"),
        (f"folder:{images / '0'}", "no triggered images"),
    ):
        with pytest.raises(DataError, match=message):
            attack_on(subject, AttackOptions(spec, 3))
    (images / "77").mkdir()
    shutil.copy(images / "0" / "0.png", images / "77" / "5.png")
    attack = attack_on(subject, AttackOptions(f"folder:{images}", 3))
    with pytest.raises(DataError, match="label 77"):
        evaluate(subject.model, attack.triggered.take(np.arange(4)), attack)


def test_images_of_another_size_are_asked_for(tmp_path, preact):
    torch.save(preact.state_dict(), tmp_path / "x.pth")
    for size in (32, 64):
        subject = load_subject(ModelOptions(tmp_path / "x.pth", image_size=size))
        np.savez(tmp_path / "x.npz", x=np.zeros((2, size, size, 3), np.uint8), y=np.zeros(2))
        assert load_images(DataOptions(str(tmp_path / "x.npz")), subject).images.shape[1] == size
    with pytest.raises(CheckpointError, match="--image-size is 1 to"):
        load(tmp_path / "x.pth", image_size=0)
    torch.save(small(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"classifier.weight \(10, 2048\) instead of \(10, 8192\)"):
        load(tmp_path / "x.pth", model="small_vgg", image_size=64)
