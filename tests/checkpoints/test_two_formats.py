"""Safetensors files that are pickles too: what an unpickler would run or give is refused, and no honest file is.

The witnesses are Python's two unpicklers themselves, whose `find_class` makes notes in place of imports.
"""

import io
import json
import pickle
import pickletools
import struct
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.two_formats import refuse_pickle
from ibau_jax.errors import CheckpointError
from tests.measure_two_formats import refused

MAGIC = 0x1950A86A20F9469CFC6C


def two_formats(opening, content):
    """A safetensors file of bytes, whose header's length begins with opcodes that take all up to its end for a line."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    length = int.from_bytes(opening, "little")
    return struct.pack("<Q", length) + header.ljust(length - 1) + b"\n" + content


class Noting:
    """What an unpickler does when it imports: it notes the name, and goes on with a function that notes its call."""

    def find_class(self, module, name):
        first = module.lstrip(".").partition(".")[0]
        if first not in {*sys.stdlib_module_names, "torch"}:
            raise ImportError
        self.notes.append(f"{module}.{name}")
        if ".." in module or module[:1] == ".":
            raise ImportError  # the first part was imported all the same
        return self.notes.append


class OfPython(Noting, pickle._Unpickler):
    pass


class OfC(Noting, pickle.Unpickler):
    pass


def effects(content, unpickler):
    """What an unpickler imports and gives, with scalars left out, of all pickles one after another."""
    file, notes = io.BytesIO(content), []
    while True:
        one = unpickler(file, encoding="utf-8")
        one.notes = notes
        try:
            value = one.load()
        except Exception:
            return notes
        if not isinstance(value, str | bytes | float | bool | None):
            notes.append(value)


def is_refused(content):
    try:
        refuse_pickle(io.BytesIO(content))
    except CheckpointError:
        return True
    return False


OPENINGS = [b"V1", b"S'", b"(V", b"I1", b"F1", b"L1", b"\x88V", b"]V", b"2V", b"0V", b"Vx", b"c1", b"i1", b"P1", b"p1"]
NAMES = st.sampled_from(["os", "builtins", "torch._utils", ".os", "os..x", "json.é", "nosuch", "", "a/b", '"w"'])
LINES = st.sampled_from(
    [b"1", b"01", b"-7", b"0x1F", b"010", b"1_0", b"1.5", b"x y", b"", b"\0?", b"'a'", b"7L", b"\xff"]
)


@st.composite
def opcode(draw):
    """An opcode, often with an argument that it takes."""
    one = draw(st.sampled_from(pickletools.opcodes))
    code = one.code.encode("latin1")
    if one.arg is None:
        return code
    if one.arg.name == "stringnl_noescape_pair":
        return code + draw(NAMES).encode() + b"\n" + draw(NAMES).encode() + b"\n"
    if one.arg.n == pickletools.UP_TO_NEWLINE:
        return code + draw(LINES) + b"\n"
    if one.arg.n >= 0:
        return code + draw(st.integers(0, 6)).to_bytes(one.arg.n, "little")
    text = draw(NAMES).encode()
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(one.arg.n, 4)
    return code + len(text).to_bytes(width, "little") + text


# Opcodes at random end early: these are put together so that most go on.
PHRASES = st.sampled_from(
    [
        *(code.to_bytes() for code in b"]})N(210.\x8f\x93\x94"),
        *(b"]K\x01a", b"](K\x01e", b"}K\x01K\x02s", b"(K\x01t", b"(\x90", b"(e", b"(u", b"Nb", b"q\x00", b"h\x00"),
        *(b"\x8c\x02os\x94", b"\x8c\x06system", b"cos\nsystem\n", b"(ios\nsystem\n", b"X\4\0\0\0true\x85R"),
        *(b"\x80\x04", b"\x96" + bytes(8), pickle.dumps(MAGIC, 2), pickle.dumps([1.5, "a", {"b": (1,)}], 4)[:-1]),
    ]
)
PROGRAMS = st.lists(st.one_of(PHRASES, PHRASES, opcode()), max_size=12).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(OPENINGS), PROGRAMS)
def test_what_an_unpickler_runs_or_gives_is_refused(opening, program):
    content = two_formats(opening, program + b".")
    if effects(content, OfC) or effects(content, OfPython):
        assert is_refused(content)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(OPENINGS[:7]), st.lists(PHRASES, max_size=6).map(b"".join))
def test_files_that_call_are_refused(opening, program):
    """Each ends with a call of `print`, if an unpickler gets that far."""
    content = two_formats(opening, program + b"cbuiltins\nprint\n(X\4\0\0\0trueI1\ntR.")
    called = "builtins.print" in effects(content, OfC)
    assert called <= is_refused(content)


def test_what_torch_would_load_is_refused(tmp_path):
    """The legacy format behind a text that is dropped: the weights that PyTorch reads are others than ours."""
    torch.save({"w": torch.ones(3)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    path = tmp_path / "x.pth"  # else PyTorch believes the name
    path.write_bytes(two_formats(b"V1", b"0" + (tmp_path / "legacy").read_bytes()))
    assert list(safetensors.numpy.load(path.read_bytes())) == ["w"]
    assert torch.load(path, weights_only=False)["w"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="a safetensors file and a pickle at once"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"w": [1.5]}, 4),  # plain data, which `pickle.load` gives
        pickle.dumps(MAGIC, 2),
        b"0c.json\nx\n",  # Python imports json before it finds that the name is none
        b"0cjson..!\nx\n",
        b"N" * 1200,  # too long to follow
        # The unpickler in C drops a frame's rest where the file has no `peek`, and imports.
        b"\x95\x02" + bytes(7) + b"G" + bytes(8) + b"\xff" + b"0cjson\nx\n.",
    ],
)
def test_what_is_more_than_a_scalar_or_imports_is_refused(content):
    assert is_refused(two_formats(b"V1", content))


@pytest.mark.parametrize(
    "content",
    [
        b".",  # the line itself
        b"N.G" + bytes(8) + b".",  # scalars, one after another
        b"Nb.",
        b"R" + pickle.dumps([1]),
        b"\x82\x01" + pickle.dumps([1]),
        b"c\xff\nx\n" + pickle.dumps([1]),
        b"\x80\x06" + pickle.dumps([1]),
        b"I?\n" + pickle.dumps([1]),
        b"h\0" + pickle.dumps([1]),
        b"e" + pickle.dumps([1]),
        b"s" + pickle.dumps([1]),
        b"a" + pickle.dumps([1]),
        b"\x93",
        b"00" + pickle.dumps([1]),
        b"1" + pickle.dumps([1]),
        b"X\xff\0\0\0",
    ],
)
def test_what_no_unpickler_gets_through_is_read(content, tmp_path):
    whole = two_formats(b"V1", content)
    assert not effects(whole, OfC)
    assert not effects(whole, OfPython)
    (tmp_path / "x").write_bytes(whole)
    assert read_torch_file(tmp_path / "x").tree["w"].numpy().tobytes() == content


def test_honest_files_are_read():
    """Of 20,000, one is refused (`python -m tests.measure_two_formats`): an unpickler gives an empty set of it."""
    assert refused(refuse_pickle, 500, longest=100_000) == []


def test_a_text_that_ends_within_a_name_is_honest():
    header = json.dumps({"layer1.0.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    point = 8 + header.index(b".")
    length = ord("X") + (point - 5 << 8)
    content = struct.pack("<Q", length) + header.ljust(length) + np.ones(2, np.float32).tobytes()
    assert isinstance(OfC(io.BytesIO(content)).load(), str)
    assert not is_refused(content)
