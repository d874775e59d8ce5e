"""The reader against torch.load on files that torch writes here."""

import argparse
import codecs
import io
import json
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.unpickle import unpickle
from ibau_jax.checkpoints.values import Storage, TorchTensor, TorchValue
from ibau_jax.checkpoints.writer import write_torch_file
from ibau_jax.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Any torch tensor as NumPy, by its bytes where NumPy lacks the dtype."""
    tensor = tensor.detach().contiguous()
    names = {torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
    if tensor.dtype in names:
        raw = tensor.flatten().view(torch.uint8).numpy()
        return raw.view(getattr(ml_dtypes, names[tensor.dtype])).reshape(tuple(tensor.shape))
    return tensor.numpy()


def assert_same_as_torch(path, weights_only=True):
    """Compares with torch's own reading, tensor by tensor, bit by bit."""
    ours, theirs = read_torch_file(path).tree, torch.load(path, weights_only=weights_only)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        found, expected = ours[name].numpy(), as_numpy(tensor)
        assert found.shape == expected.shape, name
        assert found.dtype == expected.dtype, name
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, form, dtype):
    if form == "legacy" and dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2):
        dtype = torch.float32  # torch itself can't write these in the legacy format
    tensor = (torch.arange(24).reshape(2, 3, 4) % 2).to(torch.float32).to(dtype)
    torch.save({"x": tensor}, tmp_path / "x.pth", **FORMATS[form])
    assert_same_as_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("form", FORMATS)
def test_views_shared_and_empty_storages(tmp_path, form):
    base = torch.randn(6, 8)
    state = OrderedDict(
        base=base,
        row=base[3],
        column=base[:, 2],
        block=base[1:5:2, 1:7:3],
        transposed=base.t(),
        expanded=torch.ones(1, 4).expand(5, 4),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        parameter=torch.nn.Parameter(torch.randn(3)),
        no_grad=torch.nn.Parameter(torch.randn(3), requires_grad=False),
    )
    torch.save(state, tmp_path / "x.pth", **FORMATS[form])
    assert_same_as_torch(tmp_path / "x.pth")
    tree = read_torch_file(tmp_path / "x.pth").tree
    assert tree["parameter"].is_parameter
    assert tree["parameter"].requires_grad
    assert not tree["no_grad"].requires_grad


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_strided_view(tmp_path_factory, data):
    """Random as_strided views of a random storage."""
    size = data.draw(st.integers(1, 60))
    ndim = data.draw(st.integers(0, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    strides = data.draw(st.lists(st.integers(0, 7), min_size=ndim, max_size=ndim))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if reach >= size:
        return
    offset = data.draw(st.integers(0, size - 1 - reach))
    view = torch.arange(size, dtype=torch.float32).as_strided(shape, strides, offset)
    path = tmp_path_factory.mktemp("views") / "x.pth"
    torch.save({"x": view}, path, **FORMATS[data.draw(st.sampled_from(list(FORMATS)))])
    assert_same_as_torch(path)


@pytest.mark.parametrize("form", FORMATS)
def test_cargo_is_plain_data(tmp_path, form):
    cargo = {
        "epoch": 3, "acc": 84.5, "name": "net", "raw": b"\x00\xff", "no_bytes": b"", "nothing": None, "yes": True, "big": 2**70,
        "list": [1, (2, 3), {"a": 4}], "set": {1, 2}, "frozen": frozenset((5,)), "bytes": bytearray(b"ab"),
        "complex": 1 + 2j, "ordered": OrderedDict(a=1), "counter": Counter("aab"), "default": defaultdict(list, a=[1]),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "scalar": np.float64(0.5), "int": np.int64(7), "bool": np.bool_(True), "text": np.str_("abc"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3), "fortran": np.asfortranarray(np.eye(3)[:, :2]),
        "big_endian": np.arange(3, dtype=">f4"), "dtype": np.dtype("float32"), "dtype_class": type(np.dtype("float64")),
        "no_size": np.zeros((0, 2)), "strings": np.array(["a", "bcd"]),
    }  # fmt: skip
    torch.save({**cargo, "w": torch.ones(2), "size": torch.Size([2, 3]), "device": torch.device("cpu"),
                "dtype_name": torch.float16}, tmp_path / "x.pth", **FORMATS[form])  # fmt: skip
    tree = read_torch_file(tmp_path / "x.pth").tree
    for name, value in cargo.items():
        if name == "dtype_class":
            assert str(tree[name]) == "numpy.dtypes.Float64DType"
        elif isinstance(value, np.ndarray):
            # NumPy's own pickles come back in native byte order.
            assert tree[name].dtype == pickle.loads(pickle.dumps(value, protocol=2)).dtype, name
            np.testing.assert_array_equal(tree[name], value)
        else:
            assert tree[name] == value, name
            assert type(tree[name]) is type(value), name
    assert isinstance(tree["size"], TorchValue)
    assert tree["size"].args == ((2, 3),) or tree["size"].args == ([2, 3],)
    assert str(tree["dtype_name"]) == "torch.float16"


def test_numpy_core_under_its_old_name(tmp_path):
    """NumPy 1 writes numpy.core where NumPy 2 writes numpy._core."""
    torch.save({"w": torch.ones(1), "x": np.arange(3.0), "y": np.float32(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.infolist():
            old.writestr(entry.filename, new.read(entry).replace(b"numpy._core.", b"numpy.core."))
    tree = read_torch_file(tmp_path / "old.pth").tree
    np.testing.assert_array_equal(tree["x"], np.arange(3.0))
    assert tree["y"] == np.float32(2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's own reader is not sure of them
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    state = {"w": torch.randn(3, 2), "v": torch.nn.Parameter(torch.randn(4))}
    torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol)
    assert_same_as_torch(tmp_path / "x.pth", weights_only=protocol < 4)  # torch's safe reader knows no frames


@pytest.mark.parametrize("form", FORMATS)
def test_storages_that_protocol_0_describes_in_text(tmp_path, form):
    """PyTorch writes such files and does not read them, so they are written back in its own protocol."""
    base = torch.randn(6)
    state = {"a": base[1:4], "b": base[2:], "half": torch.ones(2).bfloat16(), "big": torch.ones(2, dtype=torch.uint64)}
    if form == "legacy":
        del state["big"]
    torch.save(state, tmp_path / "x.pth", pickle_protocol=0, **FORMATS[form])
    with pytest.raises(AssertionError):
        torch.load(tmp_path / "x.pth", weights_only=False)
    file = read_torch_file(tmp_path / "x.pth")
    write_torch_file(file.tree, tmp_path / "y.pth", file.format, file.dialect)
    back = torch.load(tmp_path / "y.pth", weights_only=True)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)


def test_storages_saved_on_cuda_load(shared_checkpoints):
    """The published checkpoints name cuda:0 in every storage."""
    for path in shared_checkpoints:
        ours = read_torch_file(path).tree
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        assert list(ours) == list(theirs)
        assert list(ours["net"]) == list(theirs["net"])
        for name, tensor in theirs["net"].items():
            assert ours["net"][name].numpy().tobytes() == tensor.numpy().tobytes()


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.zeros(0, 2), "n": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.bin", {"format": "pt"})
    file = read_torch_file(tmp_path / "x.bin")
    assert file.format == "safetensors"
    assert file.tree["metadata"] == {"format": "pt"}
    for name, tensor in tensors.items():
        assert file.tree["state_dict"][name].numpy().tobytes() == as_numpy(tensor).tobytes()


SAFETENSORS_DTYPES = [*DTYPES[:11], *DTYPES[12:], torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]  # without complex128


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_every_dtype_of_safetensors(tmp_path, dtype):
    from safetensors.torch import save_file

    tensor = (torch.arange(24).reshape(2, 3, 4) % 2).to(torch.float32).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    found = read_torch_file(tmp_path / "x.safetensors").tree["x"].numpy()
    assert found.shape == (2, 3, 4)
    assert str(found.dtype) == str(dtype).removeprefix("torch.")
    assert found.tobytes() == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_safetensors_keep_the_files_order(tmp_path):
    """The library that reads them has an order of its own, another one at each call."""
    names = [f"{letter}.weight" for letter in "qwertyuiopasdfghjklzxcvbnm"]
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    content = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(4 * len(names)))
    for _ in range(5):
        assert list(read_torch_file(tmp_path / "x.safetensors").tree) == names


@pytest.mark.parametrize("first_byte", [0x80, 0x50, 0x00])
def test_safetensors_whose_length_begins_as_a_pickle_does(tmp_path, first_byte):
    """Lengths are multiples of 8: one in 32 begins with a pickle's first byte."""
    from safetensors.torch import save

    contents = (save({"w": torch.arange(3.0)}, {"note": "x" * length}) for length in range(300))
    (tmp_path / "x.pth").write_bytes(next(content for content in contents if content[0] == first_byte))
    file = read_torch_file(tmp_path / "x.pth")
    assert file.format == "safetensors"
    assert file.tree["state_dict"]["w"].numpy().tolist() == [0, 1, 2]


HEADERS = {
    "a dtype that is not known": ({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}, "'w' has the dtype F8_E8M0"),
    "half bytes": ({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "'w' has the dtype F4"),
    "no dtype": ({"w": {"dtype": "XX", "shape": [2], "data_offsets": [0, 1]}}, "damaged"),
    "overlapping": ({n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}, "damaged"),
    "beyond the end": ({"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, "damaged"),
    "a gap": ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "damaged"),
    "a list": ([1], "damaged"),
    "a name of a million": ({"w" * 10**6: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, "refused"),
    "names of dots": ({"a." * 60 + "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, "too many characters or parts"),
    "deep": ("[" * 50_000, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_that_are_wrong(tmp_path, name):
    header, message = HEADERS[name]
    text = '{"a":' + header if isinstance(header, str) else json.dumps(header)
    text = "{" + text[1:] if name == "a list" else text
    (tmp_path / "x.pth").write_bytes(
        struct.pack("<Q", len(text)) + text.encode() + b"\0\0"[: 1 if name == "half bytes" else 2]
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(tmp_path / "x.pth")
    assert len(str(caught.value)) < 500


def test_headers_of_safetensors_are_utf_8(tmp_path):
    text = "{}".encode("utf-32-le")
    (tmp_path / "x.pth").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="safetensors file is damaged"):
        read_torch_file(tmp_path / "x.pth")


class Unseekable(io.RawIOBase):
    """What zipfile streams to: sizes come behind each member."""

    def __init__(self):
        self.content = b""

    def writable(self):
        return True

    def write(self, content):
        self.content += bytes(content)
        return len(content)


def other_archives(path) -> dict[str, bytes]:
    """The archive at `path` as other honest programs would have written it."""
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    written = {}
    for kind in ("stored", "deflated", "streamed", "64-bit sizes", "with folders", "other names"):
        target = Unseekable() if kind == "streamed" else io.BytesIO()
        with zipfile.ZipFile(
            target, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
        ) as archive:
            if kind == "with folders":
                archive.writestr("archive/", b"")
            for name, content in members:
                name = name.replace("archive", "wägen") if kind == "other names" else name
                with archive.open(name, "w", force_zip64=kind == "64-bit sizes") as member:
                    member.write(content)
        written[kind] = target.content if kind == "streamed" else target.getvalue()
    return written


def test_archives_of_other_programs(tmp_path):
    torch.save({"w": torch.randn(300)}, tmp_path / "x.pth")
    expected = torch.load(tmp_path / "x.pth")["w"].numpy()
    for kind, content in other_archives(tmp_path / "x.pth").items():
        (tmp_path / "y.pth").write_bytes(content)
        np.testing.assert_array_equal(read_torch_file(tmp_path / "y.pth").tree["w"].numpy(), expected, err_msg=kind)


def test_archives_without_checksums(tmp_path):
    """PyTorch can be told not to compute them; where only some are missing, the file is damaged."""
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(300)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(computes)
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    assert_same_as_torch(tmp_path / "x.pth")
    torch.save({"w": torch.arange(300)}, tmp_path / "y.pth")
    content = bytearray((tmp_path / "y.pth").read_bytes())
    content[content.index(bytes(torch.arange(300).numpy())) + 1000] ^= 1
    (tmp_path / "y.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_torch_file(tmp_path / "y.pth")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_large_honest_files_are_no_bombs(tmp_path, protocol):
    """Arrays beside the weights (as text in protocols 0 and 2, twice as long), and tensors that pickle.dump wrote."""
    images = np.random.default_rng(0).integers(0, 256, 17 * 2**20, dtype=np.uint8)
    torch.save({"w": torch.ones(2), "images": images}, tmp_path / "x.pth", pickle_protocol=protocol)
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x.pth").tree["images"], images)
    tensor = torch.randn(12 * 2**20)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": torch.nn.Parameter(tensor)}, protocol))
    np.testing.assert_array_equal(read_torch_file(tmp_path / "x.pkl").tree["w"].numpy(), tensor.numpy())
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(list(range(200_000)), protocol))
    assert read_torch_file(tmp_path / "x.pkl").tree == list(range(200_000))


def test_a_record_of_many_images_is_no_bomb(tmp_path):
    """As BackdoorBench keeps one for each poisoned image; the numbers are of a tenth of 200,000."""
    numbers = np.sort(np.random.default_rng(0).permutation(200_000)[:20_000])
    record = {int(n): {"path": f"./record/x/bd_test_dataset/1/{n}.png", "other_info": [1, 2, 0, 3]} for n in numbers}
    tree = {
        "w": torch.zeros(3 * 10**6),
        "bd_test": record,
        "indices": set(numbers.tolist()),
        "labels": numbers.tolist(),
    }
    torch.save(tree, tmp_path / "x.pth")
    assert read_torch_file(tmp_path / "x.pth").tree["bd_test"] == record


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda items: st.one_of(
        st.lists(items, max_size=4), st.tuples(items, items), st.dictionaries(st.text() | st.integers(-9, 9), items, max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


@given(tree=PLAIN, protocol=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_plain_data_is_what_pickle_makes_of_it(tree, protocol):
    content = pickle.dumps(tree, protocol)
    assert unpickle(io.BytesIO(content), Budget(len(content))) == tree


@pytest.mark.parametrize("line", ["I01", "I00", "I-5", "L12345678901234567890L", "L-1L", "F-1.5e300", "S'a\\n\\xff\\''", 'S"a\'b"', "Va\\u0100\u00e9\\u000a", "I010", "L010L", "I+1", "I0x1", "I1_0", "Sab", "I 1", "I-010"])  # fmt: skip
def test_lines_of_protocol_0_are_what_pickle_makes_of_them(line):
    """Or they are refused: Python's two unpicklers take I010 for two numbers."""
    content = line.encode("latin1") + b"\n."
    try:
        value = unpickle(io.BytesIO(content), Budget(len(content)))
    except CheckpointError:
        assert line in ("I010", "L010L", "I+1", "I0x1", "I1_0", "Sab", "I 1", "I-010")
    else:
        assert repr(value) == repr(pickle.loads(content, encoding="latin1"))


def test_arrays_as_python_2_wrote_them(tmp_path):
    """By its default, protocol 0, with the bytes as text with escapes."""
    array, zero = (
        np.arange(-300, 300, dtype=np.int16),
        "(I1\n(I600\ntcnumpy\ndtype\n(S'i2'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n",
    )
    head = f"(dp1\nS'a'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\n(I0\ntS'b'\ntR{zero}"
    raw = codecs.escape_encode(array.tobytes())[0]
    (tmp_path / "x.pkl").write_bytes(head.encode() + b"S'" + raw + b"'\ntbs.")
    assert pickle.loads((tmp_path / "x.pkl").read_bytes(), encoding="latin1")["a"].tolist() == array.tolist()
    file = read_torch_file(tmp_path / "x.pkl")
    write_torch_file(file.tree, tmp_path / "y.pkl", file.format, file.dialect)
    for tree in (file.tree, pickle.loads((tmp_path / "y.pkl").read_bytes(), encoding="latin1")):
        np.testing.assert_array_equal(tree["a"], array)


@given(
    order=st.sampled_from(["<", ">"]), kind=st.sampled_from(["float32", "complex64", "bfloat16", "int64"]), data=st.data()
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_views_of_either_byte_order(order, kind, data):
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    flat = np.arange(24).astype(dtype)
    start, steps = data.draw(st.integers(0, 3)), data.draw(st.tuples(st.integers(0, 6), st.integers(0, 2)))
    storage = Storage(dtype, 24, (flat.byteswap() if order == ">" else flat).tobytes(), order)
    expected = np.lib.stride_tricks.as_strided(flat[start:], (3, 4), [step * dtype.itemsize for step in steps])
    np.testing.assert_array_equal(TorchTensor(storage, dtype, start, (3, 4), steps).numpy(), expected)


def test_compressed_archives_read_like_stored_ones(tmp_path):
    torch.save({"w": torch.randn(300)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as stored:
        entries = {entry.filename: stored.read(entry) for entry in stored.infolist()}
    with zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, content in entries.items():
            deflated.writestr(name, content)
    one, other = (read_torch_file(tmp_path / name).tree["w"] for name in ("x.pth", "y.pth"))
    assert one.numpy().tobytes() == other.numpy().tobytes()


def test_big_endian_archives(tmp_path):
    torch.save({"w": torch.arange(5.0)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as little, zipfile.ZipFile(tmp_path / "y.pth", "w") as big:
        for entry in little.infolist():
            content = little.read(entry)
            if "/data/" in entry.filename:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            big.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else content)
    np.testing.assert_array_equal(read_torch_file(tmp_path / "y.pth").tree["w"].numpy(), np.arange(5.0))


# Some begin as pickles of protocol 0 and 1 nearly do.
TEXTS = [
    b"hello, I am a text file", b"(define (f x) x)", b"(list of names)", b"}\nmodule.exports = x", b"]q", b"cat\ndog\nparrot\n",
    b"class Net:\n    pass\n", b"import torch\n", b"LICENSE\n", b"L12L\n.", b"I am\n.", b"V1\n.", b"[1, 2]", b"{'a': 1}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        *((text, "no PyTorch checkpoint") for text in TEXTS),
        (b"PK\x03\x04" + b"\x00" * 40, "damaged or truncated"),
        (b"\x1f\x8b\x08" + b"\x00" * 40, "a gzip archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 40, "HDF5"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "safetensors"),
    ],
)
def test_other_files_are_refused_with_a_reason(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(CheckpointError, match="can't read"):
            read_torch_file(path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_an_error(tmp_path, form):
    torch.save({"w": torch.randn(40), "v": torch.randn(8)}, tmp_path / "x.pth", **FORMATS[form])
    content = (tmp_path / "x.pth").read_bytes()
    for size in range(0, len(content) - 1, 7):
        (tmp_path / "y.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_torch_file(tmp_path / "y.pth")


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    axes=st.permutations(range(4)),
    steps=st.lists(st.sampled_from([1, 2, -1]), min_size=4, max_size=4),
    name=st.sampled_from(["float32", "bool", "int64", "bfloat16"]),
)
@settings(max_examples=100, deadline=None)
def test_a_tensor_holds_an_array_with_its_axes_in_any_order(shape, axes, steps, name):
    """Also with gaps and backwards, where it has to be copied."""
    dtype = np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    array = np.asarray(whole[tuple(slice(None, None, step) for step in steps[: len(shape)])])
    array = array.transpose([axis for axis in axes if axis < len(shape)])
    tensor = TorchTensor.from_numpy(array)
    tensor.check()
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == dtype
    assert not (array.size and tensor.numpy().flags.writeable)
    if shape and array.size and set(steps[: len(shape)]) <= {1}:
        assert np.shares_memory(tensor.numpy(), whole)
