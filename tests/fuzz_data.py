"""Throws damaged and hostile data and triggers at their readers: `python -m tests.fuzz_data --examples 3000`.

Each file must give images, a trigger, or an IbauError of one line, within 2 seconds of processor time and 256 MB more memory than
before, without filling memory first, and nothing may be executed, imported, opened for writing or sent, nor may another file be
opened. Files are made with Hypothesis: honest ones are damaged as in tests/fuzz_reader.py, npz files are put together from
members with headers that lie, pickles of CIFAR of opcodes that multiply, idx files and tables from fields that lie, PNG and TIFF files from right chunks with wrong numbers, trigger files from fields of wrong
kinds, attack specs from names, keys and numbers. A failing file is kept as fuzz-failure.bin.
"""

import argparse
import collections
import gzip
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from PIL import Image

from ibau_jax.data import load_dataset
from ibau_jax.data.memory import GROUP_LIMIT, MEMINFO
from ibau_jax.errors import IbauError
from ibau_jax.triggers import attack_names, load_attack
from ibau_jax.triggers.files import STAMPS
from tests.data.downloads import python2_pickle
from tests.fuzz_reader import CHUNK, FAILURE, Content, Watch, damaged, expired, limit_memory
from tests.hostile_files import programs

SHAPE = (8, 8, 3)
SECONDS = 2  # of processor time for a file
MEMORY = 2**28
X = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8)
HONEST = "honest.png"
LARGE = zlib.compress(bytes(48_000_000), 9)  # a part of which a few bytes are used
OUT_OF_MEMORY = "more memory than there is"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(members: list[tuple[str, bytes]], compression: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # two members of one name are meant
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def honest_hdf5(folder: Path) -> list[bytes]:
    """One of each layout and filter."""
    contents = []
    for options in (
        {},
        {"chunks": (2, *SHAPE), "compression": "gzip", "shuffle": True},
        {"chunks": (2, *SHAPE), "compression": "lzf", "fletcher32": True},
        {"maxshape": (None, *SHAPE), "chunks": (4, *SHAPE)},
        {"chunks": (6, *SHAPE), "compression": "gzip", "part": zlib.compress(bytes(2**28), 9)},
        {"chunks": (6, *SHAPE), "compression": "gzip", "part": zlib.compress(X[:3].tobytes())},
        {"chunks": (6, *SHAPE), "compression": "lzf", "part": b"\0a\xe0\xff\0"},
        {"chunks": (1, 4000, 4000, 3), "maxshape": (None,) * 4, "compression": "gzip", "part": LARGE},
        {"external": [("secret.txt", 0, X.nbytes)]},
    ):
        part = options.pop("part", None)
        for library in ("earliest", "latest"):
            with h5py.File(folder / "seed.h5", "w", libver=library) as file:
                array = file.create_dataset("X_test", X.shape, "u1", **options)
                if part:
                    for index in range(0, len(X), array.chunks[0]):
                        array.id.write_direct_chunk((index, 0, 0, 0), part)
                elif "external" not in options:
                    array[...] = X
                file["Y_test"] = np.eye(6)
            contents.append((folder / "seed.h5").read_bytes())
    return contents


def honest_images() -> list[bytes]:
    """One of each format, and of the modes that are converted."""
    picture = Image.fromarray(X[0])
    grey = Image.fromarray(X[0, :, :, 0].astype(np.uint16) * 257)
    made = [(picture, format, {}) for format in ("PNG", "JPEG", "PPM", "BMP", "WEBP", "GIF", "TIFF")]
    made += [
        (picture, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    made += [(picture, "JPEG", {"progressive": True}), (picture.convert("CMYK"), "TIFF", {})]
    made += [
        (grey, "PNG", {}),
        (grey, "TIFF", {}),
        (grey, "PPM", {}),
        (picture.convert("P"), "PNG", {"transparency": 2}),
    ]
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20), 9))
    png, jpeg = (encoded(picture, format, {}) for format in ("PNG", "JPEG"))
    contents = [
        png[:33] + 2000 * profile + png[33:],
        jpeg[:-2] + 20_000 * jpeg[jpeg.index(b"\xff\xda") : -2] + jpeg[-2:],
    ]
    contents.append(b"P3 8 8 255\n" + b"#\n" * 2**20 + b"1 " * 192)
    for image, format, options in made:
        contents.append(encoded(image, format, options))
    return contents


def encoded(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


NUMBERS = st.one_of(
    st.integers(0, 9), st.sampled_from([-1, -(2**63), 255, 2**15, 2**31 - 1, 2**32, 2**40, 2**63, 10**30])
)
DTYPES = ["|u1", "<f4", ">f4", "<f8", "<u2", ">i8", "|b1", "<c8", "|O", "<U3", "|S2", "<M8[s]", "|V4", "(2,)u1", "<U999999999", "nosuch"]  # fmt: skip


@st.composite
def members(draw) -> bytes:
    """An npy file: honest, or a header that says anything, and few or many values."""
    if draw(st.integers(0, 2)) == 0:
        return npy(draw(st.sampled_from([X, X / 255, np.arange(6), np.eye(6), X[:0], np.asarray(3), X.astype(">u2")])))
    shape = draw(st.one_of(st.just(X.shape), st.just((6,)), st.lists(NUMBERS, max_size=6).map(tuple)))
    descr = repr(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else repr("|u1")
    text = f"{{'descr': {descr}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}".encode()
    text = draw(st.one_of(st.just(text), st.sampled_from([b"(" * 4000, b"{" * 9000, b"[" * 999 + b"]" * 999, b"[" * 198 + b"?" + b"]" * 198, b"", b"9" * 9999])))  # fmt: skip
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 9]))
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**16 - 1)))
    head = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length)
    values = draw(st.sampled_from([X.tobytes(), b"", bytes(6), bytes(2**20), np.eye(6).tobytes()]))
    return head + text + values


@st.composite
def archives(draw) -> bytes:
    """An npz file of such members."""
    names = st.sampled_from(
        ["x.npy", "y.npy", "x.npy", "y.npy", "X.npy", "x", "../x.npy", "x.npy.npy", ".npy", "0.kind.npy"]
    )
    held = draw(st.lists(st.tuples(names, members()), max_size=4))
    if draw(st.booleans()):
        honest = {"x.npy": npy(X), "y.npy": npy(np.arange(6))}
        held = list({**honest, **dict(held[: draw(st.integers(0, 2))])}.items())
    methods = [zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED] * 3 + [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    content = zipped(held, draw(st.sampled_from(methods)))
    return draw(damaged(content)) if draw(st.booleans()) else content


SCALARS = [0, 3, -1, 2**62, np.inf, np.nan, 0.5, True, "patch", "x" * 5000, "ü\n\x1b", b"a"]
LISTS = [[0, 3], [-2, 9**9], [np.inf, 1], []]
SHAPES = [SHAPE, (8, 8, 1), (8, 8, 2), (0, 8, 3), (8,)]
VALUES = [np.asarray(value) for value in [*SCALARS, *LISTS]]
VALUES += [np.full(shape, value, np.float32) for shape in SHAPES for value in (0, 1, np.nan, -9)]
FIELDS = [
    "name",
    "kind",
    "target",
    "rows",
    "columns",
    "value",
    "pattern",
    "mask",
    "grid",
    "levels",
    "dithered",
    "learnt",
]
FIELDS += ["pattern.down.0.0.kernel"]
TRIGGER = {"kind": "patch", "name": "mine", "target": 3, "rows": [0, 3], "columns": [0, 3], "value": 1.0}
TRIGGER |= {"pattern": np.zeros(SHAPE, np.float32), "mask": np.zeros((8, 8, 1), np.float32), "levels": 8}
TRIGGER |= {"grid": np.zeros((8, 8, 2), np.float32)}


@st.composite
def triggers(draw) -> bytes:
    """A file of triggers of any kind, some of whose fields are others."""
    fields = {**TRIGGER, "kind": draw(st.sampled_from([*STAMPS, "nosuch"]))}
    fields |= draw(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), max_size=2))
    prefix = draw(st.sampled_from(["0", "0", "0", "1", "", "00", "0.0"]))
    return zipped(
        [(f"{prefix}.{name}.npy", npy(np.asarray(value))) for name, value in fields.items()], zipfile.ZIP_STORED
    )


@st.composite
def pngs(draw) -> bytes:
    """A PNG whose checksums are right."""
    size = st.one_of(st.integers(0, 9), st.sampled_from([2**12, 2**14, 2**16, 2**31 - 1, 2**32 - 1]))
    kind = st.sampled_from([0, 2, 3, 4, 6, 9])
    head = struct.pack(">IIBBBBB", draw(size), draw(size), draw(st.sampled_from([1, 2, 4, 8, 16, 7])), draw(kind), 0, 0, draw(st.sampled_from([0, 1, 9])))  # fmt: skip
    data = draw(st.sampled_from([b"", bytes(999), bytes(2**22), X.tobytes()]))
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    names = st.sampled_from(
        [b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"IDAT", b"IHDR"]
    )
    bodies = st.sampled_from([b"", b"a\0\0" + zlib.compress(bytes(2**24)), bytes(768), bytes(26), X.tobytes()])
    for extra in draw(st.lists(st.tuples(names, bodies), max_size=3)):
        chunks.insert(draw(st.integers(1, len(chunks))), extra)
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


@st.composite
def tiffs(draw) -> bytes:
    """A TIFF of a few tags with any numbers."""
    usual = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 64, 339: 1}
    tags = st.sampled_from([*usual, 254, 266, 274, 284, 317, 320, 322, 323, 324, 325, 330, 338, 347, 34665])
    small = st.one_of(
        st.integers(0, 64), st.sampled_from([2**12, 2**15, 2**31 - 1, 2**32 - 1, 32773, 32946, 34925, 50000])
    )
    changed = {**usual, **draw(st.dictionaries(tags, small, max_size=3))}
    entries = [struct.pack("<HHII", tag, draw(st.sampled_from([4, 4, 4, 4, 4, 3, 12])), draw(st.sampled_from([1, 1, 1, 1, 2, 2**28])), value) for tag, value in sorted(changed.items())]  # fmt: skip
    content = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    return content.ljust(200, b"\0") + X.tobytes()


KEYS = ["size", "row", "column", "look", "alpha", "seed", "delta", "frequency", "frequencies", "k", "s", "levels", ""]
WORDS = ["", "\udcff" * 900, "nan", "1e999", "9" * 5000, "noise", "floyd", "\0", "=", "white", "0x3"]


@st.composite
def specs(draw) -> bytes:
    """An attack with a few parameters."""
    name = draw(st.sampled_from([name for name in attack_names() if name != "input_aware"]))
    values = st.one_of(st.none(), NUMBERS, st.floats(), st.sampled_from(WORDS))
    pairs = draw(st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=3))
    parameters = ",".join(key if value is None else f"{key}={value}" for key, value in pairs)
    return os.fsencode(draw(st.sampled_from([f"{name}:{parameters}"] * 9 + [WORDS[1], f"{name}:{WORDS[1]}=1"])))


PICTURES = ("gtsrb/Final_Test/Images", "tiny/val/images")
BATCH = {"data": X.reshape(6, -1).repeat(16, 1), "labels": list(range(6))}


@st.composite
def batches(draw) -> bytes:
    """A pickle of CIFAR: honest, damaged, with values of wrong kinds, or of opcodes that multiply."""
    values = st.sampled_from([X, X / 255, [0] * 6, ["a"], [2**70], [None], [[0]], b"x" * 18432, {"a": 1}, -1, None])
    content = {
        **BATCH,
        **draw(st.dictionaries(st.sampled_from(["data", "labels", b"data", b"labels", 3]), values, max_size=2)),
    }
    python2 = all(isinstance(value, np.ndarray) for value in content.values())
    pickled = python2_pickle(content) if python2 else pickle.dumps(content, draw(st.integers(2, 5)))
    return draw(st.one_of(st.just(pickled), damaged(pickled), damaged(python2_pickle(BATCH)), programs()))


@st.composite
def idx_files(draw) -> bytes:
    """A gzipped idx file: any numbers in its header, any bytes behind, or damaged."""
    header = [6, 8, 8]
    if draw(st.booleans()):
        header = draw(st.lists(st.sampled_from([0, 1, 6, 8, 2**16, 2**31, 2**32 - 1]), max_size=5))
    head = struct.pack(">4B", 0, 0, draw(st.sampled_from([8, 8, 8, 9, 13])), draw(st.sampled_from([3, 3, 3, 1, 255])))
    content = (
        head
        + struct.pack(f">{len(header)}I", *header)
        + draw(st.sampled_from([X[..., 0].tobytes(), b"", bytes(2**26)]))
    )
    packed = gzip.compress(content, 1)
    return draw(st.one_of(st.just(packed), damaged(packed), st.just(packed + packed)))


@st.composite
def tables(draw, honest: list[str], separator: str) -> bytes:
    """Lines of a table, in any order, some of whose fields are others."""
    fields = [
        "Filename",
        "Path",
        "ClassId",
        "0",
        "-1",
        "9" * 5000,
        "",
        '"',
        "a.png",
        "../a.png",
        "/etc/passwd.png",
        "\0.png",
        "\udcff",
        "x" * 10**5,
    ]
    lines = draw(
        st.lists(
            st.sampled_from(honest) | st.lists(st.sampled_from(fields), max_size=4).map(separator.join), max_size=6
        )
    )
    text = "\n".join([*honest[: draw(st.integers(0, 2))], *lines]) * draw(st.sampled_from([1, 1, 1, 400]))
    content = os.fsencode(text)
    return draw(st.one_of(st.just(content), damaged(content)))


def honest_parquet(folder: Path) -> list[bytes]:
    """One of each compression; none where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        return []
    import pyarrow
    from pyarrow import parquet

    contents, png = [], encoded(Image.fromarray(X[0]), "PNG", {})
    images = pyarrow.array([{"bytes": png, "path": "a.png"}] * 6)
    names = json.dumps({"info": {"features": {"label": {"names": ["a"] * 6}}}})
    table = pyarrow.table({"image": images, "label": list(range(6))}).replace_schema_metadata({"huggingface": names})
    for compression in ("none", "snappy", "gzip", "zstd"):
        parquet.write_table(table, folder / "seed.parquet", compression=compression)
        contents.append((folder / "seed.parquet").read_bytes())
    return contents


def listed_files(folder: Path) -> list[Path]:
    """Makes the honest files beside those that are thrown at readers of folders, and names them."""
    files = {"mnist/t10k-labels-idx1-ubyte": struct.pack(">4BI6B", 0, 0, 8, 1, 6, *range(6))}
    files |= {"tiny/wnids.txt": b"n1\nn2\n", "tiny/words.txt": b"n1\ta cat\n"}
    picture = encoded(Image.fromarray(X[0]), "PNG", {})
    files |= {f"{place}/{name}": picture for place in PICTURES for name in ("a.png", "b.png")}
    for name in ("cifar/batches.meta", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def kinds(folder: Path) -> dict[str, tuple[str, st.SearchStrategy[bytes], Callable[[Path], object]]]:
    """For each kind of file a name, what it holds, and who reads it."""

    def trigger(path: Path) -> object:
        return load_attack(str(path), SHAPE)

    def images(path: Path) -> object:
        return load_dataset(str(path if path.suffix != ".png" else path.parent.parent), SHAPE)

    def in_folder(name: str) -> Callable[[Path], object]:
        return lambda path: load_dataset(str(folder / name), SHAPE, num_classes=None if name == "cifar" else 2)

    def mask(path: Path) -> object:
        return load_attack(str(folder / HONEST), SHAPE, mask=path)

    def any_damaged(contents: list[bytes]) -> st.SearchStrategy[bytes]:
        return st.sampled_from(contents).flatmap(damaged)

    pictures = st.one_of(any_damaged(honest_images()), pngs(), tiffs())
    parquet = honest_parquet(folder)
    table = ["Filename;Width;ClassId", "a.png;8;0", "b.png;8;1"]
    annotations = ["a.png\tn1\t0\t0\t8\t8", "b.png\tn2\t0\t0\t8\t8"]
    return {
        "CIFAR": ("cifar/test_batch", batches(), in_folder("cifar")),
        "idx": ("mnist/t10k-images-idx3-ubyte.gz", idx_files(), in_folder("mnist")),
        "GTSRB": ("gtsrb/Final_Test/Images/GT-final_test.csv", tables(table, ";"), in_folder("gtsrb")),
        "Tiny ImageNet": ("tiny/val/val_annotations.txt", tables(annotations, "\t"), in_folder("tiny")),
        **({"parquet": ("a.parquet", any_damaged(parquet), images)} if parquet else {}),
        "npz": ("a.npz", archives(), images),
        "HDF5": ("a.h5", any_damaged(honest_hdf5(folder)), images),
        "image": ("classes/0/a.png", pictures, images),
        "trigger picture": ("classes/0/a.png", pictures, trigger),
        "mask": ("mask.npy", st.one_of(members(), members().flatmap(damaged)), mask),
        "triggers": ("t.npz", st.one_of(triggers(), triggers().flatmap(damaged), archives()), trigger),
        "attack": ("spec", specs(), lambda path: load_attack(os.fsdecode(path.read_bytes()), SHAPE)),
    }


class DataWatch(Watch):
    """Notes forbidden audit events.

    How much memory is free may be asked for, the honest picture is read, and JAX reads source lines for its errors.
    """

    def hook(self, event: str, arguments: tuple) -> None:
        lines = event == "open" and arguments[1] == "r" and str(arguments[0]).endswith(".py")
        listed = event == "open" and os.path.dirname(str(arguments[0])) in self.pictures
        if not lines and not listed and (event != "open" or str(arguments[0]) not in self.others):
            super().hook(event, arguments)

    def __init__(self, folder: Path) -> None:
        files = (MEMINFO, GROUP_LIMIT, folder / HONEST, os.devnull, *listed_files(folder))
        self.others = [str(file) for file in files]
        self.pictures = [str(folder / place) for place in PICTURES]  # a table may name any image there
        super().__init__(folder)


def outcome(watch: Watch, kind: str, file: Path, read: Callable[[Path], object]) -> str:
    """What a file gives, or the error's first words."""
    limit_memory(MEMORY)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    watch.on = True
    try:
        read(file)
        result = "read"
    except IbauError as error:
        message = str(error)
        assert "\n" not in message, "the message has several lines"
        assert len(message) < 1000, "the message is long"
        assert OUT_OF_MEMORY not in message, "memory was taken before it was refused"
        result = re.split(r"[:'(\d]", message.replace(f"{file}", "").replace("can't read", ""))[-1].strip()[:50]
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        limit_memory(None)
    assert not watch.seen, f"audit events: {watch.seen}"
    return f"{kind}: {result}"


def fuzz(examples: int, seed: int) -> collections.Counter:
    """Runs the examples, in turn of each kind, and counts what they gave.

    Raises:
        Exception: whatever an example raised that is no IbauError.
    """
    outcomes: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "classes" / "0").mkdir(parents=True)
        Image.fromarray(X[0]).save(folder / HONEST)
        (folder / "secret.txt").write_bytes(b"not yours " * 200)
        signal.signal(signal.SIGPROF, expired)
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch = DataWatch(folder)
        tried = kinds(folder)
        for place, (kind, (name, contents, read)) in enumerate(tried.items()):
            share = examples // len(tried) + (place < examples % len(tried))
            for start in range(0, share, CHUNK):
                count = min(CHUNK, share - start)
                chunk(watch, kind, folder / name, contents, read, outcomes, count, seed * 10**6 + start)
            print(f"{sum(outcomes.values())} files", flush=True)
    return outcomes


def chunk(watch, kind, file, contents, read, outcomes, count, seed) -> None:
    """So many files of one kind. The first ones are read unwatched: what is imported or compiled once is, then."""
    watch.allowed = str(file)

    @hypothesis_seed(seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents.map(Content))
    def one(content: bytes) -> None:
        file.write_bytes(content)
        try:
            if outcomes[kind] < 20:
                outcomes[kind] += 1
                with_error(read, file)
            watch.seen.clear()
            outcomes[outcome(watch, kind, file, read)] += 1
        except BaseException:
            FAILURE.write_bytes(content)
            raise

    one()


def with_error(read: Callable[[Path], object], file: Path) -> None:
    """Reads a file whatever comes of it."""
    try:
        read(file)
    except IbauError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=3000, help="how many files (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    start = time.perf_counter()
    outcomes = fuzz(options.examples, options.seed)
    for words, count in outcomes.most_common(40):
        print(f"{count:7d}  {words}")
    read = sum(count for words, count in outcomes.items() if words.endswith(": read"))
    total = sum(count for words, count in outcomes.items() if ": " in words)
    print(f"{total} files in {time.perf_counter() - start:.0f} s: {read} were read, {total - read} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
