"""Pixels of image files, against NumPy, and PIL where it converts as torchvision's loader does."""

import io
import os
import socket
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ibau_jax.data import load_dataset
from ibau_jax.data.images import read_image
from ibau_jax.errors import IbauError

SHAPE, GREY = (32, 32, 3), (32, 32, 1)
RAMP = (np.arange(1024, dtype=np.uint32) * 64).astype(np.uint16).reshape(32, 32)


@pytest.fixture
def picture(rng):
    return Image.fromarray(rng.integers(0, 256, SHAPE, np.uint8))


def png(width, height, bits, kind, rows=b""):
    """A PNG written by hand: Pillow writes no colours of 16 bits."""
    head = np.asarray([width, height], ">u4").tobytes() + bytes([bits, kind, 0, 0, 0])
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


def png_16(array):
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    return png(array.shape[1], array.shape[0], 16, kind, b"".join(b"\0" + row.astype(">u2").tobytes() for row in array))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


SIXTEEN = {
    "PNG": png_16(RAMP[:, :, None]),
    "PNG with alpha": png_16(np.stack([RAMP, np.full_like(RAMP, 65535)], 2)),
    "PNG in colour": png_16(np.stack([RAMP] * 3, 2)),
    "PNG in colour with alpha": png_16(np.stack([RAMP] * 4, 2)),
    "TIFF": saved(Image.fromarray(RAMP), "TIFF"),
    "TIFF, LZW": saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "PGM": b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes(),
    "PPM": b"P6 32 32 65535\n" + np.stack([RAMP] * 3, 2).astype(">u2").tobytes(),
    "PGM as text": b"P2 32 32 65535\n" + b" ".join(b"%d" % value for value in RAMP.ravel()),
}


@pytest.mark.parametrize("shape", [SHAPE, GREY])
@pytest.mark.parametrize("name", SIXTEEN)
def test_16_bits_are_scaled_to_8(tmp_path, name, shape):
    (tmp_path / "a.png").write_bytes(SIXTEEN[name])
    found = read_image(tmp_path / "a.png", shape)
    assert np.abs(found - (RAMP / 257)[:, :, None]).max() < 1.01  # colours are cut to their high byte by Pillow
    assert len(np.unique(found)) >= 255


def tiff(array, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    return saved(Image.fromarray(array), "TIFF", tiffinfo=info)


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"),
        saved(Image.fromarray(np.full((32, 32), 70000, np.int32)), "TIFF"),
        tiff(RAMP, t262=0),  # white is 0
        tiff(RAMP, t339=2),  # signed
        b"Pf\n32 32\n-1.0\n" + np.ones((32, 32), "<f4").tobytes(),
    ],
)
def test_values_without_a_known_white_are_refused(tmp_path, content):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(IbauError, match=r"a\.tif .*(8 or 16|damaged)") as caught:
        read_image(tmp_path / "a.tif", SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_converted_as_by_torchvisions_loader(tmp_path, picture, mode):
    """Which is `Image.open(file).convert("RGB")`."""
    format = "TIFF" if mode == "CMYK" else "PNG"
    options = {"transparency": 3} if mode == "P" else {}
    picture.convert(mode).save(tmp_path / "a.png", format, **options)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", SHAPE), expected)


def test_the_first_image_of_an_animation_and_no_rotation(tmp_path, picture):
    first = picture.quantize(256)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (32, 32))])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif", SHAPE), np.asarray(first.convert("RGB")))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", SHAPE), np.asarray(picture))


def test_images_in_a_folder_of_their_own(tmp_path, picture):
    """As Tiny ImageNet has them; deeper ones are refused, not left out."""
    for name in ("0", "1"):
        (tmp_path / name / "images").mkdir(parents=True)
        picture.save(tmp_path / name / "images" / "a.png")
        (tmp_path / name / "boxes.txt").write_text("")
    assert load_dataset(str(tmp_path), SHAPE).labels.tolist() == [0, 1]
    (tmp_path / "1" / "more").mkdir()
    picture.save(tmp_path / "1" / "more" / "b.png")
    with pytest.raises(IbauError, match="1/more holds images"):
        load_dataset(str(tmp_path), SHAPE)


GRADIENT = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))


def tiled(side, strips=1):
    """A TIFF of 32x32 grey pixels in one tile that says to be larger, or in strips of a byte each."""
    tags = {256: [32], 257: [32], 258: [8], 259: [8], 262: [1], 277: [1]}
    lengths = {322: [side], 323: [side], 324: [8], 325: [8]} if side else {273: [8] * strips, 279: [1] * strips}
    tags |= lengths
    content, more = b"II*\0" + (16).to_bytes(4, "little") + zlib.compress(b"")[:8].ljust(8, b"\0"), b""
    content += len(tags).to_bytes(2, "little")
    end = 16 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        data = np.asarray(values, "<u4").tobytes()
        place = data if len(values) == 1 else (end + len(more)).to_bytes(4, "little")
        more += b"" if len(values) == 1 else data
        content += np.asarray([tag, 4], "<u2").tobytes() + len(values).to_bytes(4, "little") + place
    return content + bytes(4) + more


def link(path):
    path.symlink_to("nowhere")


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # its name may be short only
        one.bind(path.name)
        os.chdir(here)


BAD = {
    "pipe": (os.mkfifo, "no regular file"),
    "socket": (bound_socket, "no regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "dangling link": (link, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut": (lambda path: path.write_bytes(SIXTEEN["PNG"][:200]), "truncated"),
    "PostScript": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of PNG"),
    "bomb": (lambda path: path.write_bytes(png(30_000, 4_000, 1, 0)), "declares 600,000,000 bytes"),
    "tiles that are a bomb": (lambda path: path.write_bytes(tiled(24_576)), "bytes or more"),
    "more strips than lines": (lambda path: path.write_bytes(tiled(None, strips=500)), "more strips than lines"),
    "scan after scan": (lambda path: path.write_bytes(saved(GRADIENT, "JPEG") + b"\xff\xda" * 101), "102 scans"),
    "profile after profile": (lambda path: path.write_bytes(SIXTEEN["PNG"] + b"iCCP" * 101), "101 scans, colour"),
    "comment after comment": (
        lambda path: path.write_bytes(b"P3 " + b"#\n" * 101),
        "101 scans, colour profiles or comm",
    ),
    "large bomb": (lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2)), "4611686014132420609 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused(tmp_path, name):
    make, message = BAD[name]
    (tmp_path / "0").mkdir()
    make(tmp_path / "0" / "a.png")
    with pytest.raises(IbauError, match=f"a.png.*{message}") as caught:
        load_dataset(str(tmp_path), SHAPE)
    assert "\n" not in str(caught.value)


def test_more_images_than_memory_holds_are_refused_before_one_is_read(tmp_path):
    (tmp_path / "0").mkdir()
    for number in range(1000):
        (tmp_path / "0" / f"{number}.png").write_bytes(b"")
    with pytest.raises(IbauError, match="GiB of memory"):
        load_dataset(str(tmp_path), (2**20, 2**20, 3))
