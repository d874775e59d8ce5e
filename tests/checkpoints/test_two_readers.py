"""Files that two readers could read differently: they are refused, or read as PyTorch reads them."""

import io
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.errors import CheckpointError

ONE, OTHER = np.asarray([1, 2, 3, 4], np.float32), np.asarray([-1, -2, -3, -4], np.float32)


def tensor(key, storage=b"torch\nFloatStorage", rebuild=b"_rebuild_tensor_v2", size=4, more=b""):
    """What pickles a vector of four, its storage's key given with its opcode."""
    described = b"((X\x07\0\0\0storagec" + storage + b"\n" + key + b"X\x03\0\0\0cpuK%ctQ" % size
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n%b\n%bK\0K\x04\x85K\x01\x85\x89%b%btR" % (rebuild, described, hooks, more)


PLAIN = b"\x80\2}X\1\0\0\0w" + tensor(b"X\1\0\0\0" + b"0") + b"s."


def archive(path, pickled, storages, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as file:
        members = {"data.pkl": pickled, "byteorder": byteorder, "version": b"3\n"}
        for name, content in {**members, **{f"data/{key}": array.tobytes() for key, array in storages.items()}}.items():
            file.writestr(f"a/{name}", content)


def negated(path):
    """PyTorch keeps the sign of this tensor apart from its numbers."""
    imaginary = torch.complex(torch.zeros(4), torch.from_numpy(ONE)).conj().imag
    assert imaginary.is_neg()
    torch.save({"w": imaginary}, path)


def memorised_in_gaps(path):
    """MEMOIZE counts what is stored, so that it replaces what PUT stored at 1."""
    first, second = (tensor(b"X\1\0\0\0" + key) for key in (b"0", b"1"))
    archive(path, b"\x80\4" + first + b"q\1" + b"0" + second + b"\x940}X\1\0\0\0wh\1s.", {"0": ONE, "1": OTHER})


def memorised_far_away(path):
    """PUT stored far behind, where MEMOIZE comes twice: what is stored there again does not count again."""
    first, second = (tensor(b"X\1\0\0\0" + key) for key in (b"0", b"1"))
    content = b"\x80\4" + first + b"q\3" + b"0" + b"N\x940N\x940N\x940" + second + b"\x940}X\1\0\0\0wh\3s."
    archive(path, content, {"0": ONE, "1": OTHER})


def key_beyond_ascii(path):
    name = "é".encode()
    storages = {"é": ONE, "Ã©": OTHER}
    archive(path, b"\x80\2}X\1\0\0\0w" + tensor(b"U%c" % len(name) + name) + b"s.", storages)


def marked_as_a_folder(path):
    """PyTorch reads nothing of such a member, and leaves the tensor as the memory was."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {
            "data.pkl": PLAIN,
            "byteorder": b"little",
            "version": b"3\n",
            "data/0": ONE.tobytes(),
        }.items():
            info = zipfile.ZipInfo(f"a/{name}")
            info.external_attr = 0x10 if name == "data/0" else 0
            file.writestr(info, content)


def with_a_folders_name(path):
    archive(path, b"\x80\2}X\1\0\0\0w" + tensor(b"X\0\0\0\0") + b"s.", {"": ONE})


def named_beyond_ascii(path):
    """The Kelvin sign is k in lower case, but not to PyTorch."""
    archive(path, b"\x80\2}X\1\0\0\0w" + tensor(b"X\1\0\0\0k") + b"s.", {"\u212a": ONE})


def untyped_big_endian(path):
    described = tensor(
        b"X\1\0\0\0" + b"0", b"torch.storage\nUntypedStorage", b"_rebuild_tensor_v3", 16, b"ctorch\nfloat32\n"
    )
    archive(path, b"\x80\2}X\1\0\0\0w" + described + b"s.", {"0": ONE}, b"big")


def of_another_dtype_than_its_storage(path):
    more = b"ctorch\nfloat64\n"
    described = tensor(b"X\1\0\0\0" + b"0", rebuild=b"_rebuild_tensor_v3", size=8, more=more)
    archive(path, b"\x80\2}X\1\0\0\0w" + described + b"s.", {"0": np.repeat(ONE, 2)})


def legacy_of_a_big_endian_machine(path):
    file = io.BytesIO()
    torch.save({"w": torch.from_numpy(ONE)}, file, _use_new_zipfile_serialization=False)
    content = file.getvalue()
    place = content.index(b"\x88", content.index(b"little_endian"))
    Path(path).write_bytes(content[:place] + b"\x89" + content[place + 1 :])


FILES = [
    marked_as_a_folder,
    with_a_folders_name,
    named_beyond_ascii,
    negated,
    memorised_in_gaps,
    memorised_far_away,
    key_beyond_ascii,
    untyped_big_endian,
    of_another_dtype_than_its_storage,
    legacy_of_a_big_endian_machine,
]


@pytest.mark.parametrize("make", FILES)
def test_it_is_refused_or_read_as_pytorch_reads_it(tmp_path, make):
    path = tmp_path / "x.pth"
    make(path)
    try:
        found = read_torch_file(path).tree["w"].numpy()
    except CheckpointError:
        return
    np.testing.assert_array_equal(found, torch.load(path, weights_only=False)["w"].numpy())


@pytest.mark.parametrize(
    "make", [untyped_big_endian, legacy_of_a_big_endian_machine, memorised_in_gaps, memorised_far_away]
)
def test_honest_ones_are_read(tmp_path, make):
    make(tmp_path / "x.pth")
    assert np.isfinite(read_torch_file(tmp_path / "x.pth").tree["w"].numpy()).all()


# 32 characters each: a length that JSON's text may have.
MODULE, FUNCTION = "module_" + "m" * 25, "function_" + "f" * 23
SWALLOWED = 20  # bytes that a text's length says, the second byte of the header's length


def polyglot(path, first, more):
    """A safetensors file that PyTorch runs as a pickle: the length of its header is the opcode of a text.

    The text swallows what can't be a pickle, the rest of the length and the beginning of the JSON. What follows is the
    name of a tensor. STACK_GLOBAL is no character; the byte before, which makes it one, is the argument of BINPUT.
    """
    name = "a" * (SWALLOWED - 8) + first + "U " + MODULE + "U " + FUNCTION + "q\u00d3)R."
    header = json.dumps({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, ensure_ascii=False).encode()
    length = ord("U") + (SWALLOWED << 8) + (more << 16)
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + ONE.tobytes())


@pytest.mark.parametrize(("first", "more"), [("", 0), ("N0" * 5000, 1)])
def test_a_safetensors_file_that_is_a_pickle_is_refused(tmp_path, monkeypatch, first, more):
    path, ran = tmp_path / "x.pth", tmp_path / "ran"
    polyglot(path, first, more)
    assert len(safetensors.numpy.load(path.read_bytes())) == 1
    (tmp_path / f"{MODULE}.py").write_text(f"def {FUNCTION}():\n    open({str(ran)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(CheckpointError, match="a safetensors file and a pickle at once"):
        read_torch_file(path)
    assert not ran.exists()
    with pytest.raises(RuntimeError, match="magic number"):
        torch.load(path, weights_only=False)
    assert ran.exists()  # else this would show nothing


@pytest.mark.parametrize("first", [ord("U"), 0x80, ord("X"), ord("c"), ord("0")])
def test_honest_safetensors_files_of_any_length_are_read(tmp_path, first):
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    length = first + (20 << 8) + (1 << 16)
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + header.ljust(length) + ONE.tobytes())
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x").tree["conv1.weight"].numpy(), ONE)


def also_a_pickle(path, length, end, rest):
    """A safetensors file of one byte tensor whose header, of that length, ends in `end`, and whose data are `rest`."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(rest)], "data_offsets": [0, len(rest)]}}).encode()
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length - len(end)) + end + rest)


CALL = b"cposix\nsystem\n(X\4\0\0\0truetR."
MAGIC = b"0\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


@pytest.mark.parametrize(
    ("length", "rest"),
    [
        (0x3149, CALL),  # I1, whose line pickletools takes for no number
        (0x3146, CALL),  # F1
        (0x3156, MAGIC + CALL),  # V, and the call behind the end of the first pickle, as in the legacy format
    ],
)
def test_a_call_behind_a_line_is_found(tmp_path, length, rest):
    also_a_pickle(tmp_path / "x.pth", length, b"\n", rest)
    with pytest.raises(CheckpointError, match="a pickle at once"):
        read_torch_file(tmp_path / "x.pth")


def test_counters_of_ten_are_no_lines_of_a_pickle(tmp_path):
    """The header's length is (c, and the counters, the first tensors, end lines: but JSON is no module's name."""
    rest = (b"\n" + bytes(7)) * 2
    also_a_pickle(tmp_path / "x.pth", 0x6328, b" ", rest)
    assert read_torch_file(tmp_path / "x.pth").tree["w"].numpy().tobytes() == rest
