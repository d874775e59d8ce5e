"""Hostile files: malicious pickles, lies about sizes, random damage. Nothing runs, nothing crashes, memory is bounded."""

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibau_jax.checkpoints import load
from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.unpickle import unpickle
from ibau_jax.errors import CheckpointError


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


MARKER = "/tmp/ibau_jax_was_here"
CALLS = {
    "posix.system": Calls(os.system, f"touch {MARKER}"),
    "builtins.eval": Calls(eval, f"open({MARKER!r}, 'w')"),
    "builtins.exec": Calls(exec, f"open({MARKER!r}, 'w')"),
    "builtins.getattr": Calls(getattr, "text", "upper"),
    "builtins.__import__": Calls(__import__, "os"),
    "torch.serialization.load": Calls(torch.load, MARKER),
    "subprocess.Popen": Calls(subprocess.Popen, ["touch", MARKER]),
    "io.open": Calls(io.open, MARKER, "w"),
}


def zipped(pickled: bytes, **storages: bytes) -> bytes:
    """A file as torch.save writes it, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return file.getvalue()


def legacy(pickled: bytes) -> bytes:
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*head, pickled, pickle.dumps([], protocol=2)])


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert not os.path.exists(MARKER)


@pytest.mark.parametrize("wrap", [zipped, legacy])
@pytest.mark.parametrize(
    "place", [lambda call: call, lambda call: {"net": {"w": [call]}}, lambda call: Calls(set, [call])]
)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_and_named(tmp_path, wrap, place, name):
    (tmp_path / "x.pth").write_bytes(wrap(pickle.dumps(place(CALLS[name]), protocol=2, fix_imports=False)))
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(tmp_path / "x.pth")
    assert name in str(caught.value)
    assert "allow list" in str(caught.value)


def run(pickled: bytes, **storages: bytes):
    return unpickle(io.BytesIO(pickled), Budget(len(pickled)))


TRICKS = {
    "stack_global": pickle.PROTO + b"\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "memoised names": pickle.PROTO + b"\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.",
    "inst": b"(S'id'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'id'\no.",
    "newobj": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n)}\x92.",
    "ext": b"\x80\x02\x82\x01.",
    "call a string": b"X\x02\x00\x00\x00id)R.",
    "call a tensor function through a list": b"]ctorch._utils\n_rebuild_tensor_v2\na)R.",
    "build on a global": b"ccollections\nOrderedDict\n}b.",
    "build with a method": b"ccollections\nOrderedDict\n)RX\x05\x00\x00\x00itemsK\x01b.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.",
    "attribute of an allowed module": b"ctorch._utils\n_import_dotted_name\n.",
    "nested torch.load": b"ctorch.storage\n_load_from_bytes\n(C\x01.tR.",
    "set of itself": b"c__builtin__\nset\n(]q\x00h\x00aatR.",
    "list in itself": b"]q\x00h\x00a.",
    "dict in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    "number for a bytearray": b"c__builtin__\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x02tR.",
    "object array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01(K\x01tcnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR\x89](K\x01etb.",
    "structured dtype": b"cnumpy\ndtype\n(X\x05\x00\x00\x00i4,i4\x89\x88tR.",
    "dtype of another kind": b"cnumpy\ndtype\n(X\x02\x00\x00\x00V9\x89\x88tR.",
    "defaultdict of eval": b"ccollections\ndefaultdict\n(c__builtin__\neval\ntR.",
    "no stop": b"\x80\x02}",
    "empty stack": b".",
    "mark left": b"(.",
    "unknown memo": b"h\x07.",
    "huge memo index": b"Nr\xff\xff\xff\x7f0h\x01.",
    "huge string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "huge text number": b"I" + b"9" * 5000 + b"\n.",
    "deep tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
    "persistent id without storages": b"NQ.",
    "out of band buffer": b"\x80\x05\x97.",
}  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused(name):
    with pytest.raises(CheckpointError) as caught:
        run(TRICKS[name])
    assert "\n" not in str(caught.value)


def test_the_modules_named_are_not_imported(tmp_path):
    """In a fresh process: a refused global's module is not imported, nor is torch by an allowed one."""
    (tmp_path / "bad.pth").write_bytes(zipped(b"\x80\x02cantigravity\nfly_by_night\n)R."))
    torch.save({"w": torch.ones(2), "s": torch.Size([1])}, tmp_path / "good.pth")
    program = f"""
import sys
from pathlib import Path
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.errors import CheckpointError
read_torch_file(Path({str(tmp_path / "good.pth")!r}))
try:
    read_torch_file(Path({str(tmp_path / "bad.pth")!r}))
except CheckpointError as error:
    assert "antigravity.fly_by_night" in str(error)
    assert not {{"antigravity", "torch"}} & set(sys.modules)
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"


def storage_call(key: str, count: int, size: tuple, stride: tuple, kind: str = "FloatStorage") -> bytes:
    """A pickle of one tensor over one storage, with any numbers."""

    class Persistent:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", Named(f"torch {kind}"), key, "cpu", count) if isinstance(obj, Persistent) else None

        def save_named(self, obj):
            module, name = obj.text.split()
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

        dispatch = {**pickle._Pickler.dispatch}

    class Named:
        def __init__(self, text):
            self.text = text

    Pickler.dispatch[Named] = Pickler.save_named
    out = io.BytesIO()
    pickler = Pickler(out, protocol=2)
    pickler.write(pickle.PROTO + b"\x02")
    pickler.save(Named("torch._utils _rebuild_tensor_v2"))
    pickler.save((Persistent(), 0, size, stride, False, {}))
    pickler.write(pickle.REDUCE + pickle.STOP)
    return out.getvalue()


LIES = {
    "storage larger than the archive's": (storage_call("0", 25 * 10**9, (1,), (1,)), {"0": b"\0" * 64}),
    "tensor larger than its storage": (storage_call("0", 16, (10**6, 10**6), (10**6, 1)), {"0": b"\0" * 64}),
    "expanded to 100 GB": (storage_call("0", 16, (25 * 10**9,), (0,)), {"0": b"\0" * 64}),
    "negative stride": (storage_call("0", 16, (4,), (-1,)), {"0": b"\0" * 64}),
    "negative size": (storage_call("0", 16, (-4,), (1,)), {"0": b"\0" * 64}),
    "huge empty": (storage_call("0", 16, (0, 2**62, 2**62), (1, 1, 1)), {"0": b"\0" * 64}),
    "sizes and strides differ": (storage_call("0", 16, (2, 2), (1,)), {"0": b"\0" * 64}),
    "no such storage": (storage_call("7", 16, (2,), (1,)), {"0": b"\0" * 64}),
    "unknown storage type": (storage_call("0", 16, (2,), (1,), "EvilStorage"), {"0": b"\0" * 64}),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_about_sizes_are_refused(tmp_path, name):
    pickled, storages = LIES[name]
    (tmp_path / "x.pth").write_bytes(zipped(pickled, **storages))
    with pytest.raises(CheckpointError):
        read_torch_file(tmp_path / "x.pth").tree.numpy()


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", storage_call("0", 75 * 2**20, (1,), (1,)))
        archive.writestr("archive/data/0", b"\0" * (300 * 2**20))
    assert (tmp_path / "x.pth").stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="memory"):
        read_torch_file(tmp_path / "x.pth")


def test_exponentially_shared_lists_are_no_work(tmp_path):
    """Thirty levels of [x, x] are thirty lists, but a billion when walked without care: as the tree, and as keys."""
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(30)
    )
    (tmp_path / "zip.pth").write_bytes(zipped(laughs + b"."))
    with pytest.raises(CheckpointError, match="no state dict"):
        load(tmp_path / "zip.pth")
    content = legacy(pickle.dumps({}, protocol=2)).removesuffix(pickle.dumps([], protocol=2))
    (tmp_path / "legacy.pth").write_bytes(content + laughs + b"](h\x1eh\x1ee.")
    with pytest.raises(CheckpointError):
        load(tmp_path / "legacy.pth")


def test_copies_of_a_memoised_list_are_charged():
    """A megabyte of file that asks for a set of the same long list again and again."""
    items = b"".join(b"J" + struct.pack("<i", number) for number in range(20_000))
    once = b"c__builtin__\nset\nq\x01(](" + items + b"eq\x000h\x00tR"
    again = b"h\x01(h\x00tR" * 20_000
    with pytest.raises(CheckpointError, match="memory"):
        run(b"(" + once + again + b"t.")


def limited_load(path) -> str:
    """Loads a file in a process that may take 3 GB of address space beyond what it starts with."""
    program = f"""
import resource, sys
from pathlib import Path
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.errors import CheckpointError
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
try:
    read_torch_file(Path({str(path)!r}))
    print('read')
except CheckpointError as error:
    print('refused', error)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
@pytest.mark.parametrize("name", ["huge memo index", "huge bytearray", "deep tuple as a key"])
def test_memory_stays_bounded(tmp_path, name):
    (tmp_path / "x.pth").write_bytes(zipped(TRICKS[name]))
    assert limited_load(tmp_path / "x.pth").startswith("refused")


def sample_file(form: str) -> bytes:
    file = io.BytesIO()
    state = {"net": {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}, "acc": 1.5, "list": [1, (2, "x")]}
    torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


SAMPLES = {form: sample_file(form) for form in ("zip", "legacy")}


@pytest.mark.parametrize("form", SAMPLES)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=0, max_size=6)), min_size=1, max_size=5
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_are_read_or_refused(tmp_path, form, edits):
    """Any damage gives a tree or our error, never another exception."""
    content = bytearray(SAMPLES[form])
    for place, new in edits:
        start = int(place * len(content))
        content[start : start + max(1, len(new))] = new
    (tmp_path / "x.pth").write_bytes(content)
    try:
        load(tmp_path / "x.pth")
    except CheckpointError as error:
        assert "\n" not in str(error)


@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_mutated_pickles_are_read_or_refused(edits):
    """The same without the archive's checksums, which catch most damage before the unpickler sees it."""
    with zipfile.ZipFile(io.BytesIO(SAMPLES["zip"])) as archive:
        pickled = bytearray(archive.read("archive/data.pkl"))
    for place, new in edits:
        start = int(place * len(pickled))
        pickled[start : start + len(new)] = new
    try:
        unpickle(io.BytesIO(bytes(pickled)), Budget(len(pickled)), lambda pid: None)
    except CheckpointError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_read_or_refused(content):
    try:
        run(content)
    except CheckpointError:
        pass
