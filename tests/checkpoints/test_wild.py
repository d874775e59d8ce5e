"""Checkpoints as people have them: wrappers, prefixes, cargo, endings, and BackdoorBench's results."""

import argparse
import collections
import datetime
import decimal
import gzip
import io
import pathlib
import pickle
import pickletools
import random
import shutil
import struct
import tarfile
import types
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax import NORMALIZATIONS, load, save
from ibau_jax.checkpoints import read_hints
from ibau_jax.checkpoints.naming import common_prefix
from ibau_jax.checkpoints.verify import verify
from ibau_jax.cli.job import attack_on, load_images, load_subject
from ibau_jax.cli.options import AttackOptions, DataOptions, ModelOptions
from ibau_jax.errors import CheckpointError, ConfigError, DataError
from ibau_jax.metrics import evaluate, predict
from tests.checkpoints.test_conversion import assert_same_tree, random_vgg
from tests.checkpoints.test_hostile import Calls
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


def arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def assert_same_arrays(back, state):
    assert list(back) == list(state)
    for name, array in back.items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, state[name].numpy(), strict=True)


@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save_arrays):
    save_arrays(tmp_path / "x.npz", **arrays(small()))
    checkpoint = load(tmp_path / "x.npz")
    save(checkpoint, tmp_path / "y.npz")
    np.savez(tmp_path / "named.npz", **arrays(small()), classes=np.asarray(["cat", "dog"]))
    save(load(tmp_path / "named.npz"), tmp_path / "back.npz")
    assert list(np.load(tmp_path / "back.npz")["classes"]) == ["cat", "dog"]
    save(load(tmp_path / "y.npz"), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "z.npz")
    assert_same_arrays(dict(np.load(tmp_path / "z.npz")), small())
    save(checkpoint, tmp_path / "y.pth")
    assert_same_tree(torch.load(tmp_path / "y.pth"), dict(small()))
    torch.save({"net": small(), "acc": 1.0}, tmp_path / "x.pth")
    save(load(tmp_path / "x.pth"), tmp_path / "w.npz")
    assert_same_arrays(dict(np.load(tmp_path / "w.npz")), small())


def test_a_damaged_npz_is_one_line(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(small()), objects=np.asarray([{}], object))
    with pytest.raises(CheckpointError, match="'objects' is damaged: an array of Python objects"):
        load(tmp_path / "x.npz")


def dumped(protocol):
    return lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol=protocol))


@pytest.mark.parametrize("dump", [torch.save, dumped(0), dumped(1), dumped(4)])
def test_arrays_in_the_place_of_tensors_come_back_as_arrays(tmp_path, dump):
    dump({"net": OrderedDict(arrays(small())), "epoch": 3}, tmp_path / "x.pth")
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    content = (tmp_path / "y.pth").read_bytes()
    back = torch.load(tmp_path / "y.pth", weights_only=False) if dump is torch.save else pickle.loads(content)
    assert back["epoch"] == 3
    assert_same_arrays(back["net"], small())
    save(load(tmp_path / "x.pth"), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "z.pth")
    assert (tmp_path / "z.pth").read_bytes() == content


CONTAINERS = {
    "a tuple": lambda state: (state, 7),
    "a list": lambda state: [{"epoch": 1}, state],
    "pairs": lambda state: list(state.items()),
    "pairs in a dict": lambda state: {"weights": tuple(state.items()), "epoch": 1},
    "five levels": lambda state: {"a": {"b": [{"c": (state,)}]}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_around_a_state_dict(tmp_path, name):
    torch.save(CONTAINERS[name](small()), tmp_path / "x.pth")
    assert_same_tree(*round_trip(tmp_path / "x.pth", tmp_path / "y.pth"))
    save(load(tmp_path / "x.pth"), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "z.pth")
    assert_same_tree(*(torch.load(tmp_path / file, weights_only=False) for file in ("x.pth", "z.pth")))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_other_peoples_formats_are_told_what_to_save(tmp_path):
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(exported, tmp_path / "exported.pt2")
    torch.save(small(), tmp_path / "x.pth")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.pth", "x.pth")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(100))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03" + bytes(100))
    torch.save(list(small().values()), tmp_path / "list.pth")
    torch.save(list(random_vgg().parameters()), tmp_path / "parameters.pth")
    torch.save(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), tmp_path / "q.pth")
    np.save(tmp_path / "dict.npy", np.asarray(arrays(small()), dtype=object), allow_pickle=True)
    np.save(tmp_path / "one.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "x.pth", "models/x.pth")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(tmp_path / "x.pth", "x.pth")
    (tmp_path / "x.pth.gz").write_bytes(gzip.compress((tmp_path / "x.pth").read_bytes()))
    said = {"exported.pt2": "torch.export", "x.tar": "tar", "x.onnx": "ONNX", "x.gguf": "GGUF", "q.pth": "quantised"}
    said |= {
        "dict.npy": "pickled object in an .npy",
        "one.npy": "single array",
        "x.zip": "zip archive that holds 'models/x.pth'",
    }
    said |= {"x.tgz": "gzip", "x.pth.gz": "gzip"}
    said |= {"list.pth": "44 tensors without names", "parameters.pth": "tensors without names"}
    for file, word in said.items():
        with pytest.raises(CheckpointError, match=f"{word}.*(save|unpack)"):
            load(tmp_path / file)


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_dumped(tmp_path, protocol):
    state = {"net": small(), "half": torch.ones(3).half()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(state, protocol=protocol))
    checkpoint = load(tmp_path / "x.pkl")
    assert checkpoint.envelope.format == "pickle"
    assert verify(checkpoint, tmp_path / "x.pkl") <= 1e-5
    save(checkpoint, tmp_path / "y.pkl")
    assert_same_tree(pickle.loads((tmp_path / "y.pkl").read_bytes()), state)
    opcodes = [opcode.name for opcode, *_ in pickletools.genops((tmp_path / "y.pkl").read_bytes())]
    assert ("PUT" in opcodes, "PROTO" in opcodes) == (protocol == 0, protocol >= 2)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 1])
def test_what_pytorch_saved_in_an_old_protocol(tmp_path, form, protocol):
    """PyTorch reads no protocol 0 of its own."""
    new = form == "zip"
    torch.save({"net": small()}, tmp_path / "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    checkpoint = load(tmp_path / "x.pth")
    assert verify(checkpoint, tmp_path / "x.pth") <= 1e-5
    save(checkpoint, tmp_path / "y.pth")
    assert_same_tree(torch.load(tmp_path / "y.pth", weights_only=False)["net"], small())
    assert load(tmp_path / "y.pth").envelope.dialect.protocol == (protocol or 2)


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
    assert common_prefix(load(tmp_path / "x.pth", model="small_vgg").envelope.names) == PREFIXES[name]
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
        "abroad": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "there")),
        "best": [1.5, None, True, (2, "x")],
    }
    torch.save({"state_dict": small(), **cargo}, tmp_path / "x.pth")
    before, after = round_trip(tmp_path / "x.pth", tmp_path / "y.pth")
    assert {key: after[key] for key in cargo} == cargo
    assert_same_tree(before["state_dict"], after["state_dict"])


CARGO = {
    "confusion": np.eye(3), "fortran": np.asfortranarray(np.eye(3)[:, :2]), "no_size": np.zeros((0, 2)), "names": np.array(["a", "bcd"]),
    "big_endian": np.arange(3, dtype=">f4"), "scalar": np.float64(0.5), "dtype": np.dtype("float32"), "labels": {np.int64(3): b"x", 4: b""},
    "args": argparse.Namespace(lr=0.1, layers=[1]), "counts": Counter("aab"), "counted": defaultdict(int, {1: 2}), "lists": defaultdict(list),
    "set": {1, 2}, "frozen": frozenset([3]), "complex": 1 + 2j, "bytes": bytearray(b"abc"), "when": datetime.datetime(2024, 2, 29),
    "path": pathlib.PurePosixPath("a/b"), "size": torch.Size([1, 2]), "half": torch.ones(3).bfloat16(), "learned": torch.nn.Parameter(torch.ones(2)),
}  # fmt: skip


def pickles_in(path) -> list[bytes]:
    """The pickles of a file, which pickle.dump or either format of torch.save wrote, without the storages."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    file, pickles = io.BytesIO(path.read_bytes()), []
    for _ in range(5):
        start = file.tell()
        try:
            end = [place for _, _, place in pickletools.genops(file)][-1] + 1
        except ValueError:
            return pickles
        pickles.append(file.getvalue()[start:end])
    return pickles


def as_numpy_1(pickled: bytes) -> bytes:
    """The pickle as NumPy 1 spells it: texts have their new lengths, and the frames, which may be left out, are."""
    opcodes = list(pickletools.genops(pickled))
    written = b""
    for (opcode, argument, start), following in zip(opcodes, [*opcodes[1:], None], strict=True):
        part = pickled[start : following[2] if following else None]
        if opcode.name == "GLOBAL":
            part = part.replace(b"numpy._core", b"numpy.core")
        elif opcode.name == "SHORT_BINUNICODE" and "numpy._core" in argument:
            text = argument.replace("numpy._core", "numpy.core").encode()
            part = b"\x8c" + bytes([len(text)]) + text
        written += b"" if opcode.name == "FRAME" else part
    return written


def globals_in(pickled: bytes) -> set[str]:
    """Every global that a pickle names, by pickletools; those within pickled storages too."""
    named, texts, memo, previous = set(), [], {}, ""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            named.add(argument)
        elif opcode.name == "STACK_GLOBAL":
            named.add(" ".join(texts[-2:]))
        elif "UNICODE" in opcode.name:
            texts.append(argument)
        elif "BYTES" in opcode.name and argument.startswith(b"\x80\x02\x8a\nl\xfc\x9c"):
            for place in [i for i in range(len(argument)) if argument.startswith(b"\x80\x02", i)]:
                try:
                    named |= globals_in(argument[place:])
                except (ValueError, IndexError):
                    continue
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if "UNICODE" in previous else None
        elif opcode.name in ("BINGET", "LONG_BINGET") and memo.get(argument):
            texts.append(memo[argument])
        previous = opcode.name
    return named


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.flags.writeable == other.flags.writeable and np.array_equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.filterwarnings("ignore:numpy.core.numeric is deprecated")  # PyTorch's and pickle's own reading here
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("spelling", ["as NumPy here", "as NumPy 1"])
def test_what_is_written_back_is_spelled_as_it_was(tmp_path, form, protocol, spelling):
    """Directly, and by way of a Flax folder: no global that the file did not name, the same format, protocol and values."""
    source, tree = tmp_path / "x.pth", {"net": small(), **CARGO}
    if form == "pickle":
        source.write_bytes(pickle.dumps(tree, protocol))
    else:
        torch.save(tree, source, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    if spelling == "as NumPy 1":
        content = source.read_bytes()
        if form == "zip":
            with zipfile.ZipFile(source) as archive:
                members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
            with zipfile.ZipFile(source, "w") as archive:
                for name, member in members:
                    archive.writestr(name, as_numpy_1(member) if name.endswith("data.pkl") else member)
        else:
            before = pickles_in(source)
            source.write_bytes(b"".join(map(as_numpy_1, before)) + content[sum(map(len, before)) :])
    save(load(source), tmp_path / "direct.pth")
    save(load(source), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "flax.pth")
    expected = set().union(*map(globals_in, pickles_in(source)))

    def read(path):
        return pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)

    before = read(source)
    for target in (tmp_path / "direct.pth", tmp_path / "flax.pth"):
        assert set().union(*map(globals_in, pickles_in(target))) <= expected
        assert pickles_in(target)[-1][1] == protocol
        back = read(target)
        assert zipfile.is_zipfile(target) == (form == "zip")
        assert list(back) == list(tree)
        assert_same_tree(back["net"], tree["net"])
        assert [key for key in CARGO if not same(before[key], back[key])] == []
    assert any("numpy.core" in name for name in expected) == (spelling == "as NumPy 1")


@pytest.mark.parametrize("opcode", [b"T", b"B"], ids=["text", "bytes"])
def test_bytes_are_written_as_the_file_has_them(tmp_path, opcode):
    """Python 2 wrote an array's bytes as text, others with an opcode of protocol 3 in a pickle of protocol 2."""
    raw = opcode + struct.pack("<i", 200) + bytes(range(200))
    dtype = b"cnumpy\ndtype\n(U\x02u1K\0K\1tR(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR(K\1(K\xc8t"
        + dtype
        + b"\x89"
        + raw
        + b"tb"
    )
    torch.save({"net": small(), "array": None}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, content in members:
            archive.writestr(name, content.removesuffix(b"Nu.") + array + b"u." if name.endswith(".pkl") else content)
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    (before,), (after,) = pickles_in(tmp_path / "x.pth"), pickles_in(tmp_path / "y.pth")
    assert raw in before
    assert raw in after
    assert globals_in(after) <= globals_in(before)
    back = torch.load(tmp_path / "y.pth", weights_only=False, encoding="latin1")["array"]
    np.testing.assert_array_equal(back, np.arange(200, dtype=np.uint8))


SPARSE = torch.sparse_coo_tensor(
    torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0]), (2, 2), check_invariants=True
)
OBJECTS = {
    "paths": [pathlib.PosixPath("a/b"), pathlib.PureWindowsPath("a")], "times": [datetime.time(1, 2), datetime.timedelta(1)],
    "decimal": decimal.Decimal("1.50"), "namespace": types.SimpleNamespace(lr=0.1, steps=[1]), "slice": slice(1, None, 2),
    "range": range(1, 9, 2), "deque": collections.deque([1.5, 2.5], 3), "uuid": uuid.UUID(int=7), "version": torch.__version__,
    "dtypes": {torch.float32: 1}, "layout": torch.sparse_coo, "ellipsis": [..., 1],
}  # fmt: skip
COMPARED = {
    "generator": (np.random.default_rng(0), lambda one: one.bit_generator.state),
    "old generator": (np.random.RandomState(3), lambda one: repr(one.get_state())),
    "bits": (np.random.Philox(5), lambda one: repr(one.state)),
    "seeds": (np.random.SeedSequence(5), lambda one: one.state),
    "python's": (random.Random(4), lambda one: one.getstate()),
    "sparse": (SPARSE, lambda one: (one.layout, one.to_dense().tolist())),
    "meta": (torch.ones(2, device="meta"), lambda one: (one.device.type, one.shape)),
    "storage": (torch.storage.TypedStorage([1.0, 2.5], dtype=torch.float32, _internal=True), list),
}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:Sparse")
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("dump", ["torch.save", "pickle.dump"])
def test_objects_of_python_numpy_and_torch_come_back(tmp_path, dump, protocol):
    tree = {"net": small(), **OBJECTS, **{name: value for name, (value, _) in COMPARED.items()}}
    if dump == "torch.save":
        torch.save(tree, tmp_path / "x.pth", pickle_protocol=protocol or 2)
    else:
        (tmp_path / "x.pth").write_bytes(pickle.dumps(tree, protocol))
    save(load(tmp_path / "x.pth"), tmp_path / "y.pth")
    content = (tmp_path / "y.pth").read_bytes()
    back = torch.load(tmp_path / "y.pth", weights_only=False) if dump == "torch.save" else pickle.loads(content)
    assert list(back) == list(tree)
    for name, value in OBJECTS.items():
        assert type(back[name]) is type(value), name
        assert back[name] == value, name
    for name, (value, seen) in COMPARED.items():
        assert type(back[name]) is type(value), name
        assert seen(back[name]) == seen(value), name


def test_generators_call_nothing_but_their_own(tmp_path):
    """NumPy's maker of a generator calls what it is given."""
    maker = np.random.default_rng(0).__reduce__()[0]
    for args in [("id", torch.hub.list), (torch.hub.list,), (np.random.seed,)]:
        torch.save({"net": small(), "rng": Calls(maker, *args)}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="with other things than NumPy's generators"):
            load(tmp_path / "x.pth")


def test_attributes_of_parameters_and_classes_of_tensors_are_kept(tmp_path):
    tensor = torch.ones(2)
    tensor.note = "mine"
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.decay = False
    torch.save({"net": small(), "tensor": tensor, "parameter": parameter}, tmp_path / "x.pth")
    _, after = round_trip(tmp_path / "x.pth", tmp_path / "y.pth")
    assert after["tensor"].note == "mine"
    assert after["parameter"].decay is False


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
        {"model_name": "x" * 10**6, "clean_data": "y" * 10**6},
        *(
            {
                "num_classes": value,
                "img_size": value,
                "bd_test": {"bd_data_container": {"data_dict": {0: {"other_info": [value]}}}},
            }
            for value in (
                np.array(np.nan),
                np.array(np.inf),
                np.array(1j),
                np.array("x"),
                np.float64(3.5),
                -1,
                10**20,
                True,
                np.array([3]),
            )
        ),
    ],
)
def test_hints_may_be_nonsense(tmp_path, changes):
    """The weights decide; what a hostile file says of itself is at most ignored."""
    state = small()
    shape = (32, 32, 3)
    attack_result(tmp_path, state, **changes)
    assert load(tmp_path / "attack_result.pt").input_shape == shape
    hints = read_hints(load(tmp_path / "attack_result.pt").metadata())
    assert hints.image_size in (None, (32, 32))
    assert hints.num_classes in (None, 10)
    assert hints.target_label in (None, 3)
    assert len(hints.model or "") < 1000


@pytest.mark.parametrize(
    "value", [np.array("x"), np.array(np.nan), np.array(1j), np.float64(1.5), 1.5, -1, 10**20, True, [3]]
)
def test_a_target_label_is_a_small_whole_number(tmp_path, value):
    torch.save({"net": small(), "ibau_jax": {"attack": "badnets", "target_label": value}}, tmp_path / "x.pth")
    assert read_hints(load(tmp_path / "x.pth").metadata()).target_label is None
    for good in (3, np.int64(3), np.array(3)):
        assert read_hints({"ibau_jax": {"target_label": good}}).target_label == 3


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
    with pytest.raises(DataError, match="label 77"):
        attack_on(subject, AttackOptions(f"folder:{images}", 3))


def test_images_of_another_size_are_asked_for(tmp_path, preact):
    torch.save(preact.state_dict(), tmp_path / "x.pth")
    for size in (32, 64):
        subject = load_subject(ModelOptions(tmp_path / "x.pth", image_size=size))
        np.savez(tmp_path / "x.npz", x=np.eye(size, dtype=np.uint8)[None, ..., None].repeat(3, 3) * 255, y=np.zeros(1))
        assert load_images(DataOptions(str(tmp_path / "x.npz")), subject).images.shape[1] == size
    with pytest.raises(CheckpointError, match="of size 0 do not exist; --image-size is N or"):
        load(tmp_path / "x.pth", image_size=0)
    torch.save(small(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"classifier.weight \(10, 2048\) instead of \(10, 8192\)"):
        load(tmp_path / "x.pth", model="small_vgg", image_size=64)
