"""The tar archives of PyTorch before 0.1.10, which torch.load still reads."""

import io
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch

from ibau_jax import load, save
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.errors import CheckpointError
from tests.checkpoints.test_conversion import assert_same_tree, random_vgg
from tests.hostile_files import PRIME, name, number, old_tar, orbit, tar, text
from tests.promise import measured, memory_promised, seconds_promised

VALUES = np.arange(24, dtype=np.float32)


def saved(state: dict) -> dict[str, bytes]:
    """The members of a file that holds {"net": state, "epoch": 3}; keys are those of one process's memory."""
    keys, file = (
        {id(tensor): str(94113441268960 + 16 * place) for place, tensor in enumerate(state.values())},
        io.BytesIO(),
    )

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return keys.get(id(value))

    Pickler(file, protocol=2).dump({"net": state, "epoch": 3})
    kinds = {torch.float32: "FloatStorage", torch.int64: "LongStorage"}
    storages = [
        (int(keys[id(tensor)]) + 1, kinds[tensor.dtype], tensor.numel(), tensor.numpy().tobytes())
        for tensor in state.values()
    ]
    tensors = [
        (int(keys[id(tensor)]), int(keys[id(tensor)]) + 1, tensor.shape, tensor.stride(), 0)
        for tensor in state.values()
    ]
    return old_tar(file.getvalue(), tensors, storages)


@pytest.mark.parametrize("times", [True, False])
def test_a_tar_archive_of_an_old_pytorch_is_read_as_torch_reads_it(tmp_path, times):
    """It is written back in the format that followed it, which the same torch.load reads."""
    (tmp_path / "x.pth").write_bytes(tar(saved(dict(random_vgg().state_dict())), times))
    theirs = torch.load(tmp_path / "x.pth", weights_only=False)
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    assert_same_tree(torch.load(tmp_path / "y.pth", weights_only=False), theirs)
    assert not tarfile.is_tarfile(tmp_path / "y.pth")


REFERENCE = b"\x80\x02" + text("5") + b"Q."
STORAGE = (1, "FloatStorage", 24, VALUES.tobytes())


def test_views_of_a_storage(tmp_path):
    members = old_tar(REFERENCE, [(5, 2, (2, 3), (1, 2), 1)], [STORAGE], ((2, 1, 4, 12),))
    (tmp_path / "x.pth").write_bytes(tar(members))
    theirs = torch.load(tmp_path / "x.pth", weights_only=False).numpy()
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x.pth").tree.numpy(), theirs)


def test_a_whole_modules_class_stays_a_name(tmp_path):
    pickled = (
        b"\x80\x02"
        + name("theirs", "Net")
        + text("net.py")
        + text("import os")
        + b"\x87Q)\x81}"
        + text("w")
        + text("5")
        + b"Qsb."
    )
    (tmp_path / "x.pth").write_bytes(tar(old_tar(pickled, [(5, 1, (24,), (1,), 0)], [STORAGE])))
    tree = read_torch_file(tmp_path / "x.pth").tree
    assert str(tree.kind) == "theirs.Net"
    assert tree.attributes["w"].shape == (24,)


def changed(**members):
    good = old_tar(REFERENCE, [(5, 1, (24,), (1,), 0)], [STORAGE])
    return {**good, **members}


def with_two(first: dict, second: dict) -> bytes:
    """Two archives, one behind the other without an end between them."""
    end = tar(first, False).rindex(VALUES.tobytes()[-4:])
    blocks = -(-(end + 40) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar(first, False)[:blocks] + tar(second, False)


GOOD = changed()
EVIL = b"\x80\x02cposix\nsystem\n" + text("id") + b"\x85R."
DAMAGED = {
    "another pickle behind it": with_two(GOOD, {"pickle": EVIL}),
    "a call": tar(changed(pickle=EVIL)),
    "a member missing": tar({key: GOOD[key] for key in ("sys_info", "pickle", "storages")}),
    "something behind the end": tar(GOOD) + b"x",
    "truncated": tar(GOOD)[:5000],
    "a large storage": tar(old_tar(REFERENCE, [(5, 1, (24,), (1,), 0)], [(1, "FloatStorage", 2**40, VALUES.tobytes())])),
    "a negative storage": tar(old_tar(REFERENCE, [], [(1, "FloatStorage", -1, b"")])),
    "an unknown storage": tar(old_tar(REFERENCE, [], [(1, "load", 0, b"")])),
    "a large tensor": tar(old_tar(REFERENCE, [(5, 1, (25,), (1,), 0)], [STORAGE])),
    "an expanded tensor": tar(old_tar(REFERENCE, [(5, 1, (2**40,), (0,), 0)], [STORAGE])),
    "many axes": tar(old_tar(REFERENCE, [(5, 1, (1,) * 40, (1,) * 40, 0)], [STORAGE])),
    "a large view": tar(old_tar(REFERENCE, [(5, 2, (1,), (1,), 0)], [STORAGE], ((2, 1, 20, 5),))),
    "a view of nothing": tar(old_tar(REFERENCE, [], [STORAGE], ((2, 7, 0, 5),))),
    "no such tensor": tar(old_tar(REFERENCE, [], [STORAGE])),
    "no such storage": tar(old_tar(REFERENCE, [(5, 9, (24,), (1,), 0)], [STORAGE])),
    "a persistent id of a list": tar(changed(pickle=b"\x80\x02]Q.")),
    "tensors that are text": tar(changed(tensors=b"\x80\x02" + text("x") + b".")),
    "too few tensors": tar(changed(tensors=b"\x80\x02" + number(9) + b".")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_ones_are_one_line(tmp_path, kind):
    (tmp_path / "x.pth").write_bytes(DAMAGED[kind])
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert "allow list" in str(caught.value) or kind != "a call"


MANY = range(1, 40_000)
BOMBS = {
    "addresses that collide": old_tar(
        REFERENCE, [], [(PRIME * (i % 8) + i // 8, "FloatStorage", 0, b"") for i in MANY]
    ),
    "addresses of one orbit": old_tar(REFERENCE, [], [(orbit(i), "FloatStorage", 0, b"") for i in MANY]),
    "views that collide": old_tar(REFERENCE, [], [STORAGE], tuple((orbit(i), 1, 0, 1) for i in MANY)),
    "expanded tensors": old_tar(REFERENCE, [(i, 1, (2**20,), (0,), 0) for i in MANY], [STORAGE]),
    "members": {"pickle": b"", **{f"x{i}": b"" for i in MANY}},
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_what_is_promised(tmp_path, kind):
    (tmp_path / "warm.pth").write_bytes(tar(GOOD))
    (tmp_path / "x.pth").write_bytes(tar(BOMBS[kind], False))
    for path in (tmp_path / "warm.pth", tmp_path / "x.pth"):
        result, seconds, memory = measured(lambda path=path: read_torch_file(path))
    size = path.stat().st_size
    assert isinstance(result, CheckpointError), result
    assert seconds < seconds_promised(size)
    assert memory < memory_promised(size)


def test_headers_that_rename_members_are_refused(tmp_path):
    """Python's tarfile takes a name from an extended header; ours takes none."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for key, content in GOOD.items():
            info = tarfile.TarInfo(key)
            info.size, info.pax_headers = len(content), {"path": "storages" if key == "pickle" else key}
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "x.pth").write_bytes(file.getvalue())
    with pytest.raises(CheckpointError, match="tar archive"):
        read_torch_file(tmp_path / "x.pth")
