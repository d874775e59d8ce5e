"""PyTorch to Flax and back: bit-exact, complete, and with the same logits."""

import json
import zipfile
from collections import OrderedDict
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.checkpoints import load, read_hints, save
from ibau_jax.checkpoints.conversion import to_flax, to_torch, torch_name
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from ibau_jax.models import get_architecture
from tests.oracles.twins import as_torch


def random_vgg(num_classes=10, seed=0):
    """A small VGG with random statistics, in PyTorch."""
    torch.manual_seed(seed)
    model = get_architecture("small_vgg").torch_module(num_classes)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        else:
            buffer.random_(1, 10**9)
    return model.eval()


def assert_same_file(one, other):
    """Both files hold the same tree: keys in order, dtypes and bits."""
    one, other = (torch.load(path, map_location="cpu", weights_only=True) for path in (one, other))
    assert_same_tree(one, other)


def assert_same_tree(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for item, its in zip(one, other, strict=True):
            assert_same_tree(item, its)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one.detach().flatten().view(torch.uint8), other.detach().flatten().view(torch.uint8))
        assert one.shape == other.shape
    else:
        assert one == other


WRAPS = {
    "net": lambda state: {"net": state, "acc": 1.5, "epoch": 3},
    "model": lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {0: {"m": torch.ones(3)}}, "lr": 0.1}},
    "state_dict": lambda state: {"state_dict": state, "args": {"size": torch.Size([1, 2])}},
    "model_state_dict": lambda state: OrderedDict(model_state_dict=state),
    "netC": lambda state: {"netC": state, "best": [1, (2, 3)]},
    "bare": lambda state: state,
    "nested": lambda state: {"model": {"state_dict": state}},
    "module": lambda state: OrderedDict((f"module.{name}", value) for name, value in state.items()),
    "compiled": lambda state: {"net": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    "parameters": lambda state: {
        "net": {n: torch.nn.Parameter(v) if v.is_floating_point() else v for n, v in state.items()}
    },
}


@pytest.mark.parametrize("name", WRAPS)
def test_round_trip_keeps_wrapper_order_and_bits(tmp_path, name):
    source, folder, back = tmp_path / "x.pth", tmp_path / "flax", tmp_path / "y.pth"
    torch.save(WRAPS[name](random_vgg().state_dict()), source)
    save(load(source), folder)
    save(load(folder), back)
    assert_same_file(source, back)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_keeps_every_float_dtype(tmp_path, form, dtype):
    model = random_vgg().to(dtype)
    torch.save({"net": model.state_dict()}, tmp_path / "x.pth", _use_new_zipfile_serialization=form == "zip")
    save(load(tmp_path / "x.pth"), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "y.pth")
    assert_same_file(tmp_path / "x.pth", tmp_path / "y.pth")


def test_the_published_checkpoints_round_trip(tmp_path, shared_checkpoints):
    for path in shared_checkpoints:
        save(load(path), tmp_path / path.stem)
        save(load(tmp_path / path.stem), tmp_path / path.name)
        assert_same_file(path, tmp_path / path.name)


def test_the_code_it_came_from_loads_it(tmp_path):
    model = random_vgg(43)
    torch.save({"net": model.state_dict(), "acc": 98.0}, tmp_path / "x.pth")
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    fresh = get_architecture("small_vgg").torch_module(43)
    fresh.load_state_dict(torch.load(tmp_path / "y.pth", weights_only=True)["net"])
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), model(images))


def test_safetensors_both_ways(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_vgg()
    save_file(model.state_dict(), tmp_path / "x.safetensors", {"format": "pt", "by": "test"})
    save(load(tmp_path / "x.safetensors"), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "y.safetensors")
    back = load_file(tmp_path / "y.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert (tmp_path / "x.safetensors").stat().st_size == (tmp_path / "y.safetensors").stat().st_size


def test_writing_is_deterministic_and_storages_are_aligned(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    for name in ("a.pth", "b.pth"):
        save(load(tmp_path / "x.pth"), tmp_path / name)
    content = (tmp_path / "a.pth").read_bytes()
    assert content == (tmp_path / "b.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                extra = int.from_bytes(content[entry.header_offset + 28 : entry.header_offset + 30], "little")
                assert (entry.header_offset + 30 + len(entry.filename) + extra) % 64 == 0
    torch.load(tmp_path / "a.pth", mmap=True, weights_only=True)


@pytest.mark.parametrize("num_classes", [2, 10, 43, 200])
def test_logits_match_torch(tmp_path, num_classes):
    model = random_vgg(num_classes)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.num_classes) == ("small_vgg", num_classes)
    images = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = model(as_torch(images)).numpy()
    logits = np.asarray(checkpoint.model()(jnp.asarray(images)))
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)
    assert verify(checkpoint, tmp_path / "x.pth") <= 1e-5


def test_logits_of_the_published_checkpoints_match_torch(shared, shared_checkpoints):
    for path in shared_checkpoints:
        data = "gtsrb" if path.name.startswith("gtsrb") else "cifar10"
        images = np.load(shared / "data" / f"{data}_test.npz")["x"][:200].astype(np.float32) / 255
        checkpoint = load(path)
        model = checkpoint.architecture.torch_module(checkpoint.num_classes)
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["net"])
        with torch.no_grad():
            expected = model.eval()(as_torch(images)).numpy()
        logits = np.asarray(checkpoint.model()(jnp.asarray(images)))
        assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


@given(
    shape=st.one_of(st.tuples(*[st.integers(1, 4)] * 4), st.tuples(*[st.integers(1, 4)] * 2)),
    name=st.sampled_from(["kernel", "weight", "scale"]),
)
@settings(max_examples=50, deadline=None)
def test_the_rule_is_invertible(shape, name):
    tensor = np.arange(np.prod(shape)).reshape(shape)
    path = ("features", 0, name)
    np.testing.assert_array_equal(to_torch(path, to_flax(path, tensor)), tensor)


def test_names():
    assert torch_name(("features", 0, "kernel")) == "features.0.weight"
    assert torch_name(("layer1", 2, "bn1", "mean")) == "layer1.2.bn1.running_mean"
    assert torch_name(("classifier", "bias")) == "classifier.bias"


def broken(**changes):
    state = random_vgg().state_dict()
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


def test_all_problems_are_listed_at_once(tmp_path):
    state = broken(features__3__bias=None, features__8__weight=torch.ones(64, 32, 5, 5), extra__weight=torch.ones(2))
    torch.save({"net": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "x.pth", model="small_vgg")
    message = str(caught.value)
    assert "1 missing: features.3.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 misshapen: features.8.weight (64, 32, 5, 5) instead of (64, 32, 3, 3)" in message
    with pytest.raises(CheckpointError, match=r"unknown architecture.*as small_vgg: 1 missing"):
        load(tmp_path / "x.pth")


def test_the_number_of_classes_can_be_overruled_but_must_fit(tmp_path):
    torch.save({"net": random_vgg(10).state_dict()}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", num_classes=10).num_classes == 10
    with pytest.raises(CheckpointError, match=r"classifier.weight \(10, 2048\) instead of \(43, 2048\)"):
        load(tmp_path / "x.pth", model="small_vgg", num_classes=43)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"conv.weight": torch.ones(3, 3)}, "unknown architecture: .*conv.weight.*--model"),
        ({"net": {"a": 1}}, "no state dict"),
        ([1, 2], "no state dict in the file; it holds a list"),
        ({"classifier.weight": torch.zeros(10**9, 0)}, "unknown architecture"),
        ({}, "an empty dict"),
    ],
)
def test_other_trees_are_refused_with_a_reason(tmp_path, tree, message):
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_unknown_models_are_refused(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no model 'resnet0'.*small_vgg"):
        load(tmp_path / "x.pth", model="resnet0")


def test_counters_may_be_absent_as_before_pytorch_0_4_1(tmp_path):
    state = OrderedDict((n, v) for n, v in random_vgg().state_dict().items() if not n.endswith("num_batches_tracked"))
    torch.save(state, tmp_path / "x.pth")
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    assert_same_file(tmp_path / "x.pth", tmp_path / "y.pth")


def test_new_weights_come_back_in_the_files_dtype(tmp_path):
    torch.save({"net": random_vgg().half().state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    model = checkpoint.model()
    model.classifier.bias[...] = model.classifier.bias[...] + 1.0
    save(checkpoint.with_weights(model), tmp_path / "y.pth")
    one, other = (torch.load(tmp_path / name, weights_only=True)["net"] for name in ("x.pth", "y.pth"))
    for name in one:
        assert one[name].dtype == other[name].dtype
        if name == "classifier.bias":
            np.testing.assert_allclose(other[name].float(), one[name].float() + 1, atol=1e-3)
        else:
            assert torch.equal(one[name], other[name])


def test_verify_finds_a_wrong_conversion(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    path = ("features", 3, "kernel")
    flipped = replace(checkpoint, leaves={**checkpoint.leaves, path: checkpoint.leaves[path][::-1]})
    with pytest.raises(CheckpointError, match="differ from PyTorch's"):
        verify(flipped, tmp_path / "x.pth")


def test_damaged_flax_folders_are_refused(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    folder = tmp_path / "flax"
    with pytest.raises(CheckpointError, match="no Flax checkpoint"):
        load(tmp_path)
    for damage in (
        lambda: (folder / "checkpoint.json").write_text("{"),
        lambda: (folder / "checkpoint.json").write_text(json.dumps({"version": 99})),
        lambda: (folder / "checkpoint.json").write_text(json.dumps({"version": 2, "model": "small_vgg"})),
        lambda: (folder / "envelope.pth").write_bytes(b"PK"),
        lambda: (folder / "envelope.pth").unlink(),
        lambda: (folder / "leaves" / "manifest.ocdbt").unlink(),
        lambda: (folder / "checkpoint.json").write_text(
            (folder / "checkpoint.json").read_text().replace('"num_classes": 10', '"num_classes": 11')
        ),
    ):
        save(load(tmp_path / "x.pth"), folder)
        damage()
        with pytest.raises(CheckpointError):
            load(folder)


def test_a_flax_folder_that_gives_tensors_the_names_of_others_is_refused(tmp_path):
    """What is computed would be another model than what is written back; the digest is of the weights alone."""
    torch.save(random_vgg().state_dict(), tmp_path / "x.pth")
    save(load(tmp_path / "x.pth"), tmp_path / "flax")
    manifest = json.loads((tmp_path / "flax" / "checkpoint.json").read_text())
    for one, other in (("features.1.weight", "features.1.bias"), ("features.0.weight", "features.3.weight")):
        names = manifest["state_dict"]["names"]
        swapped = {**names, one: names[other], other: names[one]}
        content = {**manifest, "state_dict": {**manifest["state_dict"], "names": swapped}}
        (tmp_path / "flax" / "checkpoint.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="checkpoint.json is damaged: it gives tensors the names of others"):
            load(tmp_path / "flax")
    (tmp_path / "flax" / "checkpoint.json").write_text(json.dumps(manifest))
    assert load(tmp_path / "flax").architecture.name == "small_vgg"


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    """Fault injection: the disk is full half-way."""
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    for name in ("y.pth", "z.safetensors", "flax"):
        save(checkpoint, tmp_path / name)
    before = sorted(path for path in tmp_path.rglob("*"))
    content = (tmp_path / "y.pth").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    for name in ("y.pth", "z.safetensors", "flax"):
        with pytest.raises(OSError, match="No space"):
            save(checkpoint, tmp_path / name)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "y.pth").read_bytes() == content


def test_hints_are_data_of_known_kinds():
    good = read_hints({"ibau_jax": {"dataset": "digits:test", "attack": "badnets", "target_label": 3}})
    assert (good.dataset, good.attack, good.target_label) == ("digits:test", "badnets", 3)
    bad = read_hints({"ibau_jax": {"dataset": "/etc/passwd", "attack": "/tmp/x.png", "target_label": "3"}})
    assert (bad.dataset, bad.attack, bad.target_label) == (None, None, None)
    assert read_hints({"ibau_jax": 7}).dataset is None


def test_models_are_nnx_modules_in_inference_mode(tmp_path):
    torch.save({"net": random_vgg().state_dict()}, tmp_path / "x.pth")
    model = load(tmp_path / "x.pth").model()
    assert isinstance(model, nnx.Module)
    images = jnp.ones((2, 32, 32, 3))
    np.testing.assert_array_equal(model(images), model(images))
