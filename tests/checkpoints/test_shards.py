"""Checkpoints in several files beside an index, `model.safetensors.index.json` and `pytorch_model.bin.index.json`."""

import json
import os
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ibau_jax import load, save
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.verify import verify
from ibau_jax.cli.job import load_subject
from ibau_jax.cli.options import ModelOptions
from ibau_jax.errors import CheckpointError
from tests.checkpoints.test_conversion import assert_same_tree, random_vgg

STATE = random_vgg(10, 0).state_dict()
KINDS = {
    "safetensors": ("model-0000{}-of-00003.safetensors", lambda part, path: save_file(part, path, {"format": "pt"})),
    "bin": ("pytorch_model-0000{}-of-00003.bin", torch.save),
}


def sharded(folder, kind="safetensors", **changes):
    """Three files with every third tensor, and the index, whose entries may be changed."""
    name, write = KINDS[kind]
    places = {tensor: name.format(number % 3 + 1) for number, tensor in enumerate(STATE)}
    for file in sorted(set(places.values())):
        write(OrderedDict((key, STATE[key]) for key in STATE if places[key] == file), folder / file)
    index = folder / f"{name.split('-')[0]}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {**places, **changes}}, indent=2))
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_files_beside_an_index_are_one_checkpoint(tmp_path, kind):
    """What is written is one file."""
    index = sharded(tmp_path, kind)
    checkpoint = load(index)
    assert verify(checkpoint, index) <= 1e-5
    save(checkpoint, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth")
    back = back["state_dict"] if kind == "safetensors" else back
    assert_same_tree(dict(sorted(back.items())), dict(sorted(STATE.items())))
    save(checkpoint, tmp_path / "y.safetensors")
    assert_same_tree(dict(sorted(load_file(tmp_path / "y.safetensors").items())), dict(sorted(STATE.items())))
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_size_and_the_digest_are_of_all_files(tmp_path):
    index = sharded(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert inspect_file(index, Request()).size == size
    before = load_subject(ModelOptions(index)).sha256()
    (tmp_path / "again").mkdir()
    assert load_subject(ModelOptions(sharded(tmp_path / "again"))).sha256() == before
    shard = tmp_path / "model-00002-of-00003.safetensors"
    save_file({name: tensor + 1 for name, tensor in safetensors.torch.load(shard.read_bytes()).items()}, shard)
    assert load_subject(ModelOptions(index)).sha256() != before


FIRST = next(iter(STATE))
CHANGES = {
    "another folder's": ({FIRST: "../x.safetensors"}, "can't lie beside it"),
    "an absolute path": ({FIRST: "/etc/passwd"}, "can't lie beside it"),
    "a folder below": ({FIRST: "a/x.safetensors"}, "can't lie beside it"),
    "the folder above": ({FIRST: ".."}, "can't lie beside it"),
    "Windows's": ({FIRST: "a\\x.safetensors"}, "can't lie beside it"),
    "a null": ({FIRST: "a\0"}, "can't lie beside it"),
    "no text": ({FIRST: 3}, "can't lie beside it"),
    "a file that is not there": ({FIRST: "x.safetensors"}, "x.safetensors: No such file"),
    "the index itself": (dict.fromkeys(STATE, "model.safetensors.index.json"), "no PyTorch checkpoint"),
    "another of the files": ({FIRST: "model-00002-of-00003.safetensors"}, "does not hold the tensors.*features"),
    "a tensor that is not there": ({"more": "model-00002-of-00003.safetensors"}, "does not hold the tensors.*more"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_does_not_fit_is_one_line(tmp_path, name):
    changes, message = CHANGES[name]
    index = sharded(tmp_path, **changes)
    for look in (load, lambda path: inspect_file(path, Request())):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(index)
        assert "\n" not in str(caught.value)


INDEXES = {
    "no JSON": '{"weight_map": ',
    "deep": '{"weight_map": ' + "[" * 100_000,
    "a list": '{"weight_map": []}',
    "empty": '{"weight_map": {}}',
    "text": '{"a": "weight_map", "b": {"weight_map": 1}}',
    "large": '{"weight_map": {}}' + " " * 2**21,
    "many files": json.dumps({"weight_map": {str(i): f"f{i}" for i in range(1001)}}),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_are_damaged_are_one_line(tmp_path, name):
    (tmp_path / "x.json").write_text(INDEXES[name])
    with pytest.raises(CheckpointError, match="index") as caught:
        read_torch_file(tmp_path / "x.json")
    assert len(str(caught.value)) < 500


def test_other_json_is_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    with pytest.raises(CheckpointError, match="no PyTorch checkpoint"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_files_elsewhere_and_what_is_no_file_are_not_opened(tmp_path, kind):
    (tmp_path / "here").mkdir()
    index = sharded(tmp_path / "here")
    shard = tmp_path / "here" / "model-00002-of-00003.safetensors"
    shard.rename(tmp_path / "x")
    if kind == "link":
        shard.symlink_to(tmp_path / "x")
    else:
        os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="link to another folder" if kind == "link" else "not a regular file"):
        load(index)


def test_links_within_the_folder_are_followed(tmp_path):
    index = sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.rename(tmp_path / "x")
    shard.symlink_to("x")
    assert load(index).architecture.name == load(sharded(tmp_path)).architecture.name


def test_files_of_two_formats_are_refused(tmp_path):
    index = sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    torch.save(safetensors.torch.load(shard.read_bytes()), shard)
    with pytest.raises(CheckpointError, match="several formats"):
        load(index)


def test_a_file_of_several_holds_nothing_else(tmp_path):
    index = sharded(tmp_path, "bin")
    shard = tmp_path / "pytorch_model-00002-of-00003.bin"
    torch.save({**torch.load(shard), "epoch": 3}, shard)
    with pytest.raises(CheckpointError, match="something other than tensors"):
        load(index)


def test_one_bound_is_for_all_files(tmp_path):
    """Each of them could ask for 40 MiB by itself."""
    names = [f"f{number}" for number in range(8)]
    for name in names:
        torch.save({name: torch.ones(1).expand(2**21)}, tmp_path / name)
    (tmp_path / "x.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))
    with pytest.raises(CheckpointError, match="MiB of memory"):
        read_torch_file(tmp_path / "x.json")
