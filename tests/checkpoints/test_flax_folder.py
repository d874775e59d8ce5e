"""Flax folders from strangers, and damaged ones: one CheckpointError, whatever they hold."""

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch

from ibau_jax.checkpoints import load, save
from ibau_jax.checkpoints.flax_store import read_leaves, write_leaves
from ibau_jax.errors import CheckpointError, ConfigError
from tests.cli.commands import EXAMPLE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "flax"
    save(load(EXAMPLE), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "flax")


def changed(**entries):
    def change(folder):
        manifest = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**manifest, **entries}))

    return change


def raw(text):
    return lambda folder: (folder / "checkpoint.json").write_text(text)


def envelope(tree):
    return lambda folder: torch.save(tree(), folder / "envelope.pth")


def as_floats(dtype):
    def tree():
        content = torch.load(EXAMPLE, weights_only=True)
        return {**content, "net": {name: torch.empty(0, dtype=dtype) for name in content["net"]}}

    return tree


def flipped(folder):
    for file in (folder / "leaves").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 255
            file.write_bytes(data)


def truncated(folder):
    largest = max((folder / "leaves").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    largest.write_bytes(largest.read_bytes()[:1000])


def another_weight(folder):
    """One bit of a weight, where no checksum but our own sees it."""
    values = np.ascontiguousarray(next(leaf for leaf in load(folder).leaves.values() if leaf.size > 1000)).tobytes()
    file = next(file for file in (folder / "leaves").rglob("*") if file.is_file() and values in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(values) + len(values) // 2] ^= 1
    file.write_bytes(content)


def with_link(folder):
    (folder / "leaves" / "link").symlink_to("/etc/passwd")


TAMPERED = {
    "infinite": changed(num_classes=float("inf")),
    "1e400": raw('{"version": 2, "num_classes": 1e400}'),
    "half a class": changed(num_classes=1.5),
    "true": changed(image_size=True),
    "three sides": changed(image_size=[32, 32, 3]),
    "a side of nothing": changed(image_size=[32, 0]),
    "a size as text": changed(image_size="32"),
    "another shape of images": changed(image_size=[24, 32]),
    "no classes": changed(num_classes=-1),
    "a million classes": changed(num_classes=10**6),
    "deep": raw("[" * 100_000),
    "list": raw("[]"),
    "huge": raw(" " * 2**21),
    "version text": changed(version="2" * 10**5),
    "model number": changed(model=5),
    "model long": changed(model="m" * 10**5),
    "state_dict list": changed(state_dict=[]),
    "path number": changed(state_dict={"path": 5, "prefix": ""}),
    "path of numbers": changed(state_dict={"path": [0], "prefix": ""}),
    "path elsewhere": changed(state_dict={"path": ["acc", "x"], "prefix": ""}),
    "prefix number": changed(state_dict={"path": ["net"], "prefix": 5}),
    "prefix of others": changed(state_dict={"path": ["net"], "prefix": "module."}),
    "source_format": changed(source_format="../../evil"),
    "source_format list": changed(source_format=["zip"]),
    "source_protocol": changed(source_protocol=6),
    "source_protocol text": changed(source_protocol="2"),
    "envelope list": envelope(lambda: [{"x": torch.zeros(1)}]),
    "envelope texts": envelope(lambda: {"net": dict.fromkeys(torch.load(EXAMPLE, weights_only=True)["net"], "x")}),
    "envelope of another dtype": envelope(as_floats(torch.float16)),
    "envelope of integers": envelope(as_floats(torch.int8)),
    "no envelope": lambda folder: (folder / "envelope.pth").unlink(),
    "no leaves": lambda folder: shutil.rmtree(folder / "leaves"),
    "no Orbax manifest": lambda folder: (folder / "leaves" / "manifest.ocdbt").unlink(),
    "a flipped byte": flipped,
    "another weight": another_weight,
    "truncated": truncated,
    "link": with_link,
    "pipe": lambda folder: os.mkfifo(folder / "leaves" / "pipe"),
    "manifest that is a pipe": lambda folder: ((folder / "checkpoint.json").unlink(), os.mkfifo(folder / "checkpoint.json")),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_it_is_refused_in_one_short_line(folder, capfd, name):
    TAMPERED[name](folder)
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        load(folder)
    assert len(str(raised.value)) < 700
    for thread in threading.enumerate():  # what threads print comes late
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(0.1)
    assert capfd.readouterr() == ("", "")


def test_declared_sizes_are_bounded_by_the_folder(tmp_path):
    """An array of 16 GB without a stored piece, as zeros take none, in a folder of a few kilobytes."""
    import tensorstore

    write_leaves({("a",): np.ones(3, np.float32)}, tmp_path / "leaves")
    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/leaves/"}}
    count = 4 * 10**9
    metadata = {"shape": [count], "chunks": [count], "dtype": "<f4", "compressor": None}
    spec = {"driver": "zarr", "kvstore": place, "path": "big", "metadata": metadata}
    tensorstore.open(spec, create=True).result()
    np.testing.assert_array_equal(read_leaves(tmp_path / "leaves", {("a",): (3,)})["a",], np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="size does not justify"):
        read_leaves(tmp_path / "leaves", {("big",): (count,)})


@pytest.mark.parametrize(
    ("name", "metadata"), [("compressed", {"compressor": {"id": "zlib", "level": 1}}), ("in pieces", {"chunks": [1]})]
)
def test_arrays_in_forms_that_are_not_written_are_refused(tmp_path, name, metadata):
    import tensorstore

    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/leaves/"}}
    metadata = {"shape": [3], "chunks": [3], "dtype": "<f4", "compressor": None} | metadata
    spec = {"driver": "zarr", "kvstore": place, "path": "a", "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(np.ones(3, np.float32)).result()
    with pytest.raises(CheckpointError, match=name):
        read_leaves(tmp_path / "leaves", {("a",): (3,)})
