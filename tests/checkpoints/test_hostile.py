"""Hostile files: malicious pickles, lies about sizes, random damage. Nothing runs, nothing crashes, memory is bounded."""

import dataclasses
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibau_jax.checkpoints import load
from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.unpickle import unpickle
from ibau_jax.errors import CheckpointError
from tests.hostile_files import KEYS, Member, legacy, name, number, real, tensor, text, zipped
from tests.promise import measured, memory_promised, seconds_promised


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
    "call of an allowed module's": b"ctorch._utils\n_import_dotted_name\n(X\x02\x00\x00\x00ostR.",
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


DESCRIBED = [
    "0", "('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 1, ('1', 0, 1))", "('module', <class 'a.B'>, 'f', 's')",
    "('storage', <class 'torch.load'>, '0', 'cpu', 1)", "('storage', <class 'os.FloatStorage'>, '0', 'cpu', 1)",
    "('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 2)", "('storage', <class 'torch.FloatStorage'>, '../0', 'cpu', 1)",
]  # fmt: skip


@pytest.mark.parametrize("described", DESCRIBED)
def test_what_protocol_0_describes_in_text_is_a_storage_or_refused(tmp_path, described):
    (tmp_path / "x.pth").write_bytes(zipped(f"P{described}\n.".encode(), {"0": bytes(4)}))
    with pytest.raises(CheckpointError):
        read_torch_file(tmp_path / "x.pth")


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
    (tmp_path / "x.pth").write_bytes(zipped(pickled, storages))
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
    with pytest.raises(CheckpointError, match="refused"):
        run(b"(" + once + again + b"t.")


PROTO4 = b"\x80\x04"
ITEMS = b"](" + b"".join(text(str(i)) for i in range(20_000)) + b"eq\x000"
# What each did before it was charged or bounded, for these sizes: 250 MB to 4 GB, or 10 s to hours.
BOMBS = {
    "long names": tensor() + b"q\x010}(" + b"".join(text(f"p.{i}." + "x" * 300) + b"h\x01" for i in range(15_000)) + b"u",
    "empty sets": b"(" + b"\x8f" * 2**21 + b"t",
    "dicts of one": b"(" + b"}NNs" * 2**19 + b"t",
    "memo entries": b"N" + b"\x94" * 2**21,
    "scattered memo entries": b"N" + b"".join(b"r" + struct.pack("<I", 3 * i + 9) for i in range(10**6)),
    "floats": b"(" + (b"G" + bytes(8)) * 2**21 + b"t",
    "lists in lists": b"(" + b"]]a" * 2**19 + b"t",
    "sets of one list": ITEMS + name("__builtin__", "set") + b"q\x010(" + b"h\x01h\x00\x85R" * 400 + b"t",
    "sets of one item": b"](" + b"N" * 60_000 + b"eq\x000" + name("builtins", "set") + b"q\x010(" + b"h\x01h\x00\x85R" * 20_000 + b"t",
    "a namespace updated": b"}(" + b"".join(text(str(i)) + b"N" for i in range(20_000)) + b"uq\x000" + name("argparse", "Namespace")
    + b"q\x010(" + b"h\x01)Rh\x00b" * 3000 + b"t",
    "one namespace again": b"}(" + b"".join(text(str(i)) + b"N" for i in range(60_000)) + b"uq\x000" + name("argparse", "Namespace")
    + b")R" + b"h\x00b" * 50_000,
    "many arguments": b"(" + b"N" * 60_000 + b"tq\x000" + name("torch", "Size") + b"q\x010(" + b"h\x01h\x00R" * 50_000 + b"t",
    "references to references": b"((" + b"N" * 300_000 + b"lq\x010(" + b"h\x01" * 300_000 + b"lt",
    "a name of dots": b"}" + text("a." * 100_000) + tensor() + b"s",
    "a long name": b"}" + text("w" * 20_000_000) + tensor() + b"s",
    "a wide line": b"}V" + b"a" * 9_000_000 + b"\\U0001f600\nNs",
    "escapes in lines": b"(" + b"S'" + b"\\x00" * 4_000_000 + b"'\n" * 3 + b"t",
    "numbers in lines": b"(" + b"I1\nL2L\nF3\n" * 2**19 + b"t",
    "texts in lines": b"(" + b"Va\np0\nS'b'\ng0\n" * 2**19 + b"t",
    "storages in lines": b"(" + b"P('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 1)\n" * 2**19 + b"t",
    "objects of protocol 0": b"ccopy_reg\n_reconstructor\nq\x010cx\nY\nc__builtin__\nobject\nN\x87q\x020(" + b"h\x01h\x02R" * 2**19 + b"t",
    "a wide text": b"}" + text("a" * 9_000_000 + "\U0001f600") + b"Ns",
    "one tensor by many names": b"}" + text("x") + tensor() + b"q\x00s(" + b"".join(text(f"x.{i}") + b"h\x00" for i in range(100_000)) + b"u",
    **{f"keys: {kind}": b"}(" + b"".join(KEYS[kind](i) + b"N" for i in range(1, 40_001)) + b"u"
       for kind in ("same hash", "one orbit", "multiples", "tuples", "complex", "huge", "pairs")},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_what_is_promised(tmp_path, name):
    (tmp_path / "warm.pth").write_bytes(zipped(PROTO4 + b"}" + text("w") + tensor() + b"s.", {"0": bytes(4)}))
    (tmp_path / "x.pth").write_bytes(zipped(PROTO4 + BOMBS[name] + b".", {"0": bytes(4)}, zipfile.ZIP_DEFLATED))
    for path in (tmp_path / "warm.pth", tmp_path / "x.pth"):
        result, seconds, memory = measured(lambda path=path: load(path))
    size = path.stat().st_size
    assert isinstance(result, CheckpointError), result
    assert len(str(result)) < 2000
    assert seconds < seconds_promised(size)
    assert memory < memory_promised(size)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_what_torch_writes_is_unpacked(tmp_path, method):
    (tmp_path / "x.pth").write_bytes(zipped(PROTO4 + b"}.", {"0": bytes(10**6)}, method))
    with pytest.raises(CheckpointError, match="something else than DEFLATE"):
        read_torch_file(tmp_path / "x.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_a_member_that_is_larger_than_it_says_is_not_unpacked(tmp_path):
    member = Member.honest(b"a/data.pkl", PROTO4 + b"}." + bytes(10**8), zipfile.ZIP_DEFLATED)
    lie = dataclasses.replace(member, unpacked=4)
    (tmp_path / "x.pth").write_bytes(archive([lie], [lie]))
    result, _, memory = measured(lambda: read_torch_file(tmp_path / "x.pth"))
    assert "not as large as it says" in str(result)
    assert memory < 2**25


PAIRS = b"](X\x01\x00\x00\x00aN\x86e\x85"
DIFFERENT = {
    "a dict made without its items": name("collections", "OrderedDict") + PAIRS + b"\x81",
    "a set made without its items": name("builtins", "set") + b"](Ne\x85\x81",
    "a default dict with items": name("collections", "defaultdict") + b"N" + PAIRS[:-1] + b"\x86R",
    "pairs that are counted": name("collections", "Counter") + PAIRS + b"R",
    "a parameter with other data": name("torch._utils", "_rebuild_parameter_with_state") + b"(" + tensor() + b"\x89}}" + text("data") + b"NstR",
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_pickle_would_make_something_else_of_is_refused(tmp_path, name):
    (tmp_path / "x.pth").write_bytes(zipped(PROTO4 + DIFFERENT[name] + b".", {"0": bytes(4)}))
    with pytest.raises(CheckpointError):
        read_torch_file(tmp_path / "x.pth")


EVIL = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."
GOOD = PROTO4 + b"}."


def archive(locals_: list[Member], centrals: list[Member], gaps: dict[int, bytes] | None = None) -> bytes:
    """An archive whose headers and directory may differ; gaps go before the member of that number."""
    body, directory, gaps = b"", b"", gaps or {}
    for index, (local, central) in enumerate(zip(locals_, centrals, strict=True)):
        body += gaps.get(index, b"")
        directory += dataclasses.replace(central, offset=len(body)).central()
        body += local.local()
    body += gaps.get(len(locals_), b"")
    count = len(centrals)
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)


def ambiguous_archives() -> dict[str, bytes]:
    good, evil = Member.honest(b"a/data.pkl", GOOD), Member.honest(b"a/data.pkl", EVIL)
    other = Member.honest(b"a/version", b"3\n")
    honest = archive([good, other], [good, other])
    upper = dataclasses.replace(evil, name=b"A/DATA.PKL")
    change = lambda member, **fields: dataclasses.replace(member, **fields)  # noqa: E731
    short = len(GOOD) - 1
    return {
        "one name twice": archive([evil, good], [evil, good]),
        "one name but for case": archive([upper, good], [upper, good]),
        "another name in the header": archive([good, change(other, name=b"a/data2pk")], [good, other]),
        "hidden behind a null": archive([change(good, name=b"a/data.pkl\0x")] * 1, [change(good, name=b"a/data.pkl\0x")]),
        "another size in the header": archive([change(good, packed=short, unpacked=short), other], [good, other]),
        "another checksum in the header": archive([change(good, checksum=1), other], [good, other]),
        "another method in the header": archive([change(good, method=8), other], [good, other]),
        "a member that the directory lacks": archive([good, other], [good, other], {1: evil.local()}),
        "a member before the first": archive([good, other], [good, other], {0: evil.local()}),
        "a member behind the last": archive([good, other], [good, other], {2: evil.local()}),
        "stored, of two sizes": archive([change(good, unpacked=short), other], [change(good, unpacked=short), other]),
        "sizes behind it that lie": archive([change(good, flags=8, content=GOOD + struct.pack("<4s3I", b"PK\7\x08", 1, 2, 3)), other], [change(good, flags=8), other]),
        "encrypted": archive([change(good, flags=1), other], [change(good, flags=1), other]),
        "two ends": honest + honest[-22:],
        "a comment that is an archive": honest[:-2] + struct.pack("<H", len(honest)) + honest,
        "bytes behind the end": honest + b"\0",
        "fewer entries than there are": honest[:-14] + struct.pack("<2H", 1, 1) + honest[-10:],
        "a 64-bit end of another": honest[:-22] + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 60, 0)
        + struct.pack("<4sIQI", b"PK\6\7", 0, len(honest) - 22, 1) + honest[-22:],
        "the name in an extra field": archive([change(good, extra=b"up\5\0\1abcd"), other], [change(good, extra=b"up\5\0\1abcd"), other]),
    }  # fmt: skip


AMBIGUOUS = ambiguous_archives()


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("look", [load, lambda path: inspect_file(path, Request())], ids=["load", "inspect"])
def test_archives_that_two_readers_read_differently_are_refused(tmp_path, look, name):
    (tmp_path / "x.pth").write_bytes(AMBIGUOUS[name])
    with pytest.raises(CheckpointError, match="two ways|damaged|encrypted|does not write|two members"):
        look(tmp_path / "x.pth")


def test_the_archives_are_honest_but_for_their_lies(tmp_path):
    good, other = Member.honest(b"a/data.pkl", GOOD), Member.honest(b"a/version", b"3\n", 8)
    (tmp_path / "x.pth").write_bytes(archive([good, other], [good, other]))
    assert read_torch_file(tmp_path / "x.pth").tree == {}


def test_members_are_found_as_torch_finds_them(tmp_path):
    """Whatever their case is."""
    torch.save({"w": torch.arange(3)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as lower, zipfile.ZipFile(tmp_path / "y.pth", "w") as upper:
        for entry in lower.infolist():
            upper.writestr(entry.filename.replace("archive", "x").replace("data.pkl", "DATA.PKL"), lower.read(entry))
    assert torch.load(tmp_path / "y.pth")["w"].tolist() == [0, 1, 2]
    assert read_torch_file(tmp_path / "y.pth").tree["w"].numpy().tolist() == [0, 1, 2]


def test_a_tar_archive_that_is_a_pickle_is_refused(tmp_path):
    """PyTorch takes it for a tar archive."""
    with tarfile.open(tmp_path / "x.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[:8] = b"\x80\x02}.\0\0\0\0"
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="tar archive at once"):
        read_torch_file(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "link to a pipe"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.pth"
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.pth")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path if kind == "pipe" else tmp_path / "pipe")
        if kind != "pipe":
            path.symlink_to(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_torch_file(path)


HUGE = number(10**6000)
SCALAR = name("numpy.core.multiarray", "scalar") + name("numpy", "dtype") + text("f8") + b"\x85R"
LONG = b"}" + text("net") + b"}" + text("w") + tensor() + b"ss"
PUZZLES = {
    "a huge number": HUGE,
    "a huge number as a key": b"}" + HUGE + b"Ns",
    "a huge number beside": LONG + text("acc") + HUGE + b"s",
    "a huge number in text": b"L" + b"9" * 6000 + b"L\n",
    "a huge index": b"Np" + b"9" * 900 + b"\n",
    "not a number as a key": LONG + real(float("nan")) + b"Ns",
    "a surrogate as a name": b"}" + text("\ud800") + tensor() + b"s",
    "a surrogate as a storage": b"}" + text("w") + tensor("\ud800") + b"s",
    "a shape of a million": b"}" + text("w") + tensor("0", 1, (1,) * 10**5, (1,) * 10**5) + b"s",
    "an array as a storage's description": SCALAR + b"C\x08" + bytes(8) + b"\x86RQ",
    "an empty dtype of many": name("numpy.core.multiarray", "_reconstruct") + b"NNN\x87R(K\x01" + number(2**62) + b"\x85"
    + name("numpy", "dtype") + text("S0") + b"\x85R\x89C\x00tb",
    "another protocol": b"\x80\x09N",
}  # fmt: skip


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.parametrize("wrap", [lambda p: zipped(p, {"0": bytes(4)}), legacy, bytes], ids=["zip", "legacy", "pickle"])
def test_puzzles_give_one_short_line(tmp_path, wrap, name):
    (tmp_path / "x.pth").write_bytes(wrap(b"\x80\x02" + PUZZLES[name] + b"."))
    for look in (load, lambda path: inspect_file(path, Request())):
        result, *_ = measured(lambda look=look: look(tmp_path / "x.pth"))
        if isinstance(result, Exception):
            assert isinstance(result, CheckpointError), repr(result)
            assert len(str(result)) < 1500
            assert "\n" not in str(result)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x" * 10**6), LookupError("a\nb"), RecursionError(), MemoryError()]
)
def test_whatever_a_parser_raises_is_one_line(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    torch.save({}, tmp_path / "x.pth")
    monkeypatch.setattr(zipfile, "ZipFile", broken)
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(tmp_path / "x.pth")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_damage(tmp_path, monkeypatch, stop):
    def interrupted(*_):
        raise stop

    torch.save({}, tmp_path / "x.pth")
    monkeypatch.setattr(zipfile, "ZipFile", interrupted)
    with pytest.raises(stop):
        read_torch_file(tmp_path / "x.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["huge memo index", "huge bytearray", "deep tuple as a key"])
def test_memory_stays_bounded(tmp_path, name):
    (tmp_path / "x.pth").write_bytes(zipped(TRICKS[name]))
    result, _, memory = measured(lambda: read_torch_file(tmp_path / "x.pth"))
    assert isinstance(result, CheckpointError)
    assert memory < memory_promised((tmp_path / "x.pth").stat().st_size)


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
