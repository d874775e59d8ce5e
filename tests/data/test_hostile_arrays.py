"""npz and HDF5 files that lie about sizes, name other files or are damaged: one line, before anything large is read."""

import io
import struct
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image

from ibau_jax.data import load_dataset
from ibau_jax.errors import IbauError
from ibau_jax.files import check_regular
from ibau_jax.triggers import load_attack

SHAPE = (8, 8, 3)
X = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8)
Y = np.arange(6)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape, dtype="'|u1'", version=1, values=b""):
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + values


def npz(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def with_x(x, compression=zipfile.ZIP_STORED):
    return npz([("x.npy", x), ("y.npy", npy(Y))], compression)


def flagged(data):
    """The archive with all members marked as encrypted."""
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data = data.replace(signature, signature + b"#")
        parts = data.split(signature + b"#")
        data = parts[0] + b"".join(signature + part[: place - 4] + bytes([part[place - 4] | 1]) + part[place - 3 :] for part in parts[1:])  # fmt: skip
    return data


def declared(size):
    """An archive whose member x claims to have `size` bytes."""
    data = with_x(npy(X), zipfile.ZIP_DEFLATED)
    true = struct.pack("<I", len(npy(X)))
    return data.replace(true, struct.pack("<I", size))


NPZ = {
    "pickled": (with_x(npy(np.asarray([{}], object))), "Python objects"),
    "records": (with_x(npy(np.zeros(6, [("a", "u1")]))), "records"),
    "sub-arrays": (with_x(header("(6, 8, 8)", "'(3,)u1'", values=X.tobytes())), "records|has the|shape"),
    "text": (with_x(npy(np.asarray(["a"] * 6))), r"images must be"),
    "huge shape": (with_x(header("(1000000000000,)")), "takes 1000000000000 bytes, but 0 are there"),
    "endless shape": (with_x(header("(" + "9" * 4000 + ",)")), "can't be"),
    "huge product": (with_x(header("(" + "1000000000000," * 9 + ")")), "but 0 are there"),
    "negative": (with_x(header("(-6, 8, 8, -3)", values=X.tobytes())), "can't be"),
    "0-d": (with_x(npy(np.asarray(3))), r"not \(\)"),
    "nested": (with_x(b"\x93NUMPY\1\0" + struct.pack("<H", 5001) + b"(" * 5000 + b"\n"), "EOF"),
    "nested within the parser's bounds": (with_x(header("[" * 198 + "?" + "]" * 198)), "nested too deeply"),
    "long header": (with_x(b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b"{"), "EOF"),
    "version 9": (with_x(header("(6, 8, 8, 3)", version=9, values=X.tobytes())), "version 9"),
    "short": (with_x(npy(X)[:-1]), "bytes, but 1151 are there"),
    "long": (with_x(npy(X) + b"x"), "bytes, but 1153 are there"),
    "same name": (npz([("x.npy", npy(X)), ("X.npy", npy(X)), ("y.npy", npy(Y))]), "several members"),
    "bzip2": (with_x(npy(X), zipfile.ZIP_BZIP2), "method"),
    "LZMA": (with_x(npy(X), zipfile.ZIP_LZMA), "method"),
    "bomb": (with_x(npy(np.zeros((100_000, 32, 32, 3), np.uint8)), zipfile.ZIP_DEFLATED), "meant to fill memory"),
    "claims 4 GB": (declared(2**32 - 1), "declares 4,294,967,295 bytes"),
    "encrypted": (flagged(with_x(npy(X))), "encrypted"),
    "npy": (npy(X), "is one array"),
    "no archive": (b"x" * 99, "not a zip file"),
    "empty": (b"", "not a zip file"),
    "without y": (npz([("x.npy", npy(X))]), "lacks y; it holds x"),
    "many names": (npz([(f"{n}.npy", b"") for n in range(20_000)]), "lacks x and y; it holds 0, 1"),
    "more labels": (npz([("x.npy", npy(X)), ("y.npy", npy(np.zeros(10**6)))]), "6 images but 1000000 labels"),
}


@pytest.mark.parametrize("name", NPZ)
def test_npz_files_that_lie(tmp_path, name):
    content, message = NPZ[name]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(IbauError, match=f"a.npz.*{message}") as caught:
        load_dataset(str(tmp_path / "a.npz"), SHAPE)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_flipped_bytes_in_compressed_members(tmp_path):
    good = with_x(npy(X), zipfile.ZIP_DEFLATED)
    outcomes = set()
    for place in range(0, len(good), 7):
        data = bytearray(good)
        data[place] ^= 0xFF
        (tmp_path / "a.npz").write_bytes(data)
        try:
            load_dataset(str(tmp_path / "a.npz"), SHAPE)
            outcomes.add("read")
        except IbauError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i8", ">f4", "<f8", "?"])
def test_every_layout_is_read_as_numpy_does(tmp_path, dtype, order):
    x = (X > 127).astype(dtype) if dtype == "?" else (X / 255).astype(dtype) if "f" in dtype else X.astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", x=np.asarray(x, order=order), y=Y.astype(">i2"))
    found = load_dataset(str(tmp_path / "a.npz"), SHAPE)
    with np.load(tmp_path / "a.npz") as stored:
        expected = stored["x"] * 255.0 if dtype == "?" else stored["x"]
    np.testing.assert_array_equal(found.images, expected.astype(found.images.dtype))
    assert found.images.dtype == (np.float32 if "f" in dtype else np.uint8)
    np.testing.assert_array_equal(found.labels, Y)


def h5(path, **extra):
    with h5py.File(path, "w") as file:
        file["Y_test"] = np.eye(6)
        for name, make in extra.items():
            make(file, name)


def stored(file, name, **options):
    file.create_dataset(name, data=X, **options)


def outside(file, name):
    file.create_dataset(name, X.shape, "u1", external=[("secret.txt", 0, X.size)])


def external_link(file, name):
    file[name] = h5py.ExternalLink("other.h5", "/X_test")


def soft_link(file, name):
    file["elsewhere"] = X
    file[name] = h5py.SoftLink("/elsewhere")


def virtual(file, name):
    layout = h5py.VirtualLayout(X.shape, "u1")
    layout[:] = h5py.VirtualSource("other.h5", "X_test", X.shape)
    file.create_virtual_dataset(name, layout)


def never_written(file, name):
    file.create_dataset(name, (100_000, 32, 32, 3), "u1", chunks=(1, 32, 32, 3))


def half_written(file, name):
    file.create_dataset(name, X.shape, "u1", chunks=(1, *SHAPE))[:3] = X[:3]


def inflating(file, name):
    """A part of 1152 bytes whose deflated stream goes on for 100 MB."""
    array = file.create_dataset(name, X.shape, "u1", chunks=X.shape, compression="gzip")
    array.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(10**8), 9))


def stored_as(content, **options):
    """A part that is stored as these bytes, whatever they hold."""

    def make(file, name):
        array = file.create_dataset(name, X.shape, "u1", chunks=X.shape, **options)
        array.id.write_direct_chunk((0, 0, 0, 0), content)

    return make


def of_large_parts(file, name):
    """Six parts of 48 MB, of each of which one image is used."""
    array = file.create_dataset(
        name, X.shape, "u1", maxshape=(None,) * 4, chunks=(1, 4000, 4000, 3), compression="gzip"
    )
    content = zlib.compress(bytes(48_000_000), 9)
    for index in range(len(X)):
        array.id.write_direct_chunk((index, 0, 0, 0), content)


def twice_deflated(file, name):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(X.shape)
    plist.set_deflate(9)
    plist.set_deflate(9)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U8LE, h5py.h5s.create_simple(X.shape), plist)


HDF5 = {
    "external storage": (outside, "lies in another file"),
    "external link": (external_link, "is a link"),
    "soft link": (soft_link, "is a link"),
    "virtual": (virtual, "lies in another file"),
    "never written": (never_written, "meant to fill memory"),
    "never written, small": (lambda file, name: file.create_dataset(name, X.shape, "u1"), "was not written"),
    "half written": (half_written, "not written as a whole"),
    "2**60 images": (lambda file, name: file.create_dataset(name, (2**60, *SHAPE), "u1", chunks=True), "or more"),
    "large parts": (
        lambda file, name: file.create_dataset(name, X.shape, "u1", chunks=(10**6, *SHAPE), maxshape=(None, *SHAPE)),
        "meant to fill memory",
    ),
    "a part that goes on": (inflating, "holds more or less than it declares"),
    "half a part": (stored_as(zlib.compress(X[:3].tobytes()), compression="gzip"), "holds more or less"),
    "a stream that is cut off": (stored_as(zlib.compress(X.tobytes())[:-9], compression="gzip"), "holds more or less"),
    "half a part, shuffled": (stored_as(X[:3].tobytes(), shuffle=True), "holds more or less"),
    "half a part, LZF": (stored_as(b"\0a\xe0\xff\0", compression="lzf"), "holds more or less"),
    "LZF that is cut off": (stored_as(b"\x1fabc", compression="lzf"), "holds more or less"),
    "parts far larger than the array": (of_large_parts, "meant to fill memory"),
    "deflated twice": (twice_deflated, "compressed in a way"),
    "scale-offset": (lambda file, name: stored(file, name, scaleoffset=0), "compressed in a way"),
    "text": (lambda file, name: file.create_dataset(name, data=["a"] * 6), "no array of numbers"),
    "records": (lambda file, name: file.create_dataset(name, data=np.zeros(6, [("a", "u1")])), "no array of numbers"),
    "references": (lambda file, name: file.create_dataset(name, (6,), h5py.ref_dtype), "no array of numbers"),
    "lists": (lambda file, name: file.create_dataset(name, (6,), h5py.vlen_dtype("u1")), "no array of numbers"),
    "nothing": (lambda file, name: file.create_dataset(name, data=h5py.Empty("u1")), "no array of numbers"),
    "a group": (lambda file, name: file.create_group(name), "is no array"),
    "no images": (
        lambda file, name: file.create_dataset(name, (0, *SHAPE), "u1", maxshape=(None, *SHAPE)),
        "0 images but 6",
    ),
    "another number": (lambda file, name: file.create_dataset(name, data=X[:5]), "5 images but 6 labels"),
}


@pytest.mark.parametrize("name", HDF5)
def test_hdf5_files_that_lie_or_name_others(tmp_path, name):
    make, message = HDF5[name]
    (tmp_path / "secret.txt").write_bytes(b"not yours " * 200)
    h5(tmp_path / "other.h5", X_test=stored)
    h5(tmp_path / "a.h5", X_test=make)
    with pytest.raises(IbauError, match=f"a.h5.*{message}") as caught:
        load_dataset(str(tmp_path / "a.h5"), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (1, *SHAPE)},
        {"compression": "gzip", "shuffle": True},
        {"compression": "gzip", "fletcher32": True, "chunks": (4, 8, 8, 3)},
        {"compression": "lzf", "maxshape": (None, *SHAPE)},
    ],
)
@pytest.mark.parametrize("images", [X, np.repeat(X[:, :1, :1], 64, 1).reshape(6, 8, 8, 3)], ids=["random", "alike"])
def test_honest_hdf5_is_read(tmp_path, options, images):
    h5(tmp_path / "a.h5", X_test=lambda file, name: file.create_dataset(name, data=images, **options))
    np.testing.assert_array_equal(load_dataset(str(tmp_path / "a.h5"), SHAPE).images, images)


def test_parts_that_share_their_bytes_are_refused(tmp_path):
    """Each would be inflated anew. The place of the second one's in the file's index is replaced by the first one's."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("X_test", data=X, chunks=(3, *SHAPE), compression="gzip")
        file["Y_test"] = Y
        first, second = (array.id.get_chunk_info(index) for index in (0, 1))
    content = (tmp_path / "a.h5").read_bytes()
    place, other = (struct.pack("<Q", info.byte_offset) for info in (first, second))
    sizes = [struct.pack("<II5Q", info.size, 0, *info.chunk_offset, 0) for info in (first, second)]
    assert content.count(sizes[1] + other) == 1
    forged = struct.pack("<II5Q", first.size, 0, *second.chunk_offset, 0) + place
    (tmp_path / "a.h5").write_bytes(content.replace(sizes[1] + other, forged))
    with pytest.raises(IbauError, match="parts that overlap"):
        load_dataset(str(tmp_path / "a.h5"), SHAPE)


def test_a_split_names_no_place_elsewhere(tmp_path):
    h5(tmp_path / "a.h5", X_test=stored, X_sub=lambda file, name: file.create_group(name).create_group("a"))
    with pytest.raises(IbauError, match="lacks x_sub/a"):
        load_dataset(f"{tmp_path}/a.h5:sub/a", SHAPE)


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("a", "b", "missing"):
        check_regular(tmp_path / name)
    for name in (".", "zero"):
        with pytest.raises(IbauError, match="no regular file"):
            check_regular(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b"{"),
        (
            "a.png",
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
            + struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)))
            + struct.pack(">I", 2**31 - 1)
            + b"iCCP",
        ),
    ],
    ids=["npy", "png"],
)
def test_a_length_in_a_file_takes_no_memory(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    Image.fromarray(X[0]).save(tmp_path / "honest.png")
    tracemalloc.start()
    try:
        with pytest.raises(IbauError, match=name):
            load_attack(str(tmp_path / "honest.png"), SHAPE, mask=tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
