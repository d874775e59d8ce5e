"""Images in files and in arrays, as pixels of 8 bits.

Values are scaled or refused, never clipped; sizes are checked before decoding.
"""

import io
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from ibau_jax.data.memory import check_memory, check_size
from ibau_jax.errors import DataError, refusing
from ibau_jax.files import check_regular

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs it raises as well

SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# What these suffixes stand for: other decoders of Pillow, some of which call other programs, are never asked.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "GIF", "TIFF")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 258, 262, 277, 339  # TIFF's tags
STRIP_OFFSETS, TILE_WIDTH, TILE_LENGTH = 273, 322, 323
# What decoders go through much again for, by how a file begins: a JPEG's scans, a PNG's colour profiles, the comments
# of a PNM in text. Honest files have at most ten.
REPEATED = {b"\xff\xd8": b"\xff\xda", b"\x89PNG": b"iCCP", b"P1": b"#", b"P2": b"#", b"P3": b"#"}
MOST_REPEATED = 100
BLACK_IS_ZERO, UNSIGNED = 1, 1
EIGHT_OF_SIXTEEN = [(value + 128) // 257 for value in range(2**16)]  # 65535 becomes 255
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # a pixel in memory; of others 4


def read_image(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file as uint8 of `shape`, converted to RGB or grey and resized (bicubic) where it differs.

    As in torchvision's loader, a transparent palette is taken without its transparency, an animation by its first
    image, and the orientation in EXIF is left alone.

    Raises:
        DataError: it can't be read, or decoded it is too large, or its values have no known range.
        ConfigError: it is no regular file.
    """
    return decoded_image(_content(file), shape, str(file))


def decoded_image(content: bytes, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """The same of an image file's bytes, wherever they were; `name` is what messages call it.

    Raises:
        DataError: see `read_image`.
    """
    return resized(_decoded(content, name, shape[2], None), shape)


def read_picture(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file that must have the height and width of `shape`, as uint8 of `shape`.

    Raises:
        DataError: see `read_image`; or it has another size, which shows before it is decoded.
        ConfigError: it is no regular file.
    """
    return np.asarray(_decoded(_content(file), str(file), shape[2], (shape[1], shape[0]))).reshape(shape)


def resized(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """A PIL image as uint8 of `shape`, bicubic where the size differs."""
    if image.size != (shape[1], shape[0]):
        image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(shape)


def fitted(images: UInt8[np.ndarray, "n h w c"], shape: tuple[int, int, int], name: str) -> UInt8[np.ndarray, "..."]:
    """Images that a file has as arrays, converted and resized to `shape` as those of image files are.

    Raises:
        DataError: they would take more memory than there is.
    """
    if images.shape[1:] == shape:
        return np.ascontiguousarray(images)
    check_memory(len(images) * math.prod(shape), name)
    mode = _mode(shape[2])
    made = np.empty((len(images), *shape), np.uint8)
    for place, image in enumerate(images):
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
        made[place] = resized(picture if picture.mode == mode else picture.convert(mode), shape)
    return made


def _mode(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def _content(file: Path) -> bytes:
    check_regular(file)
    with refusing(f"the image {file}", DataError):
        return file.read_bytes()


def _decoded(whole: bytes, file: str, channels: int, size: tuple[int, int] | None) -> Image.Image:
    """The image in RGB or grey; where `size` (width, height) is given it must have that."""
    mode = _mode(channels)
    with refusing(f"the image {file}", DataError):
        _check_effort(whole, file)
        content = io.BytesIO(whole)  # Pillow reads as many bytes as a file says: no more than are there
        image = _opened(content, file)
        if size is not None and image.size != size:
            raise DataError(f"{file} is {image.height}x{image.width}, the images are {size[1]}x{size[0]}")
        needed = _pixels(image, file) * _bytes_a_pixel(image, mode)
        check_size(needed, len(whole), f"{file}, of {image.height}x{image.width} pixels,")
        with _silent(image.format == "TIFF"):
            image.load()
        pixels = _eight_bits(image, file)
        return pixels if pixels.mode == mode else pixels.convert(mode)


def _check_effort(content: bytes, file: str) -> None:
    """Raises DataError where decoding takes far longer than the file's size accounts for."""
    for start, part in REPEATED.items():
        count = content.count(part) if content.startswith(start) else 0
        if count > MOST_REPEATED:
            raise DataError(
                f"{file} has {count:,} scans, colour profiles or comments and would take long; save it anew"
            )


def _pixels(image: Image.Image, file: str) -> int:
    """Counts the pixels that decoding makes: of a TIFF in tiles, one tile at least.

    Raises:
        DataError: a TIFF is in more strips than it has lines.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, height, samples = (
        max(map(int, np.atleast_1d(tags.get(tag, 1)))) for tag in (TILE_WIDTH, TILE_LENGTH, SAMPLES)
    )
    if len(np.atleast_1d(tags.get(STRIP_OFFSETS, 0))) > image.height * samples:
        raise DataError(f"{file} has more strips than lines; it is damaged")
    return max(image.width, width) * max(image.height, height)


def _opened(content: IO[bytes], file: str) -> Image.Image:
    try:
        return Image.open(content, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is damaged, or none of {', '.join(FORMATS)}") from error


@contextmanager
def _silent(libtiff: bool) -> Iterator[None]:
    """Keeps libtiff from writing to the process's standard error what Pillow then raises."""
    if not libtiff:
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _bytes_a_pixel(image: Image.Image, wanted: str) -> int:
    """What decoding and converting an image takes at most."""
    own = BYTES.get(image.mode, 4)
    buffers = 8 if image.format == "WEBP" else 4 if image.mode.startswith("I;16") else 0
    return own + buffers + (0 if image.mode == wanted else BYTES.get(wanted, 4))


def _eight_bits(image: Image.Image, file: str) -> Image.Image:
    """The image in a mode of 8 bits a channel, which PIL converts to others as torchvision does."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if set(np.atleast_1d(tags.get(SAMPLE_FORMAT, UNSIGNED)).tolist()) != {UNSIGNED}:
        raise DataError(f"{file} has signed or floating-point values, of which none says white; store 8 or 16 bits")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = set(np.atleast_1d(tags.get(BITS_PER_SAMPLE, 16)).tolist())
        if bits != {16} or tags.get(PHOTOMETRIC, BLACK_IS_ZERO) != BLACK_IS_ZERO:
            raise DataError(f"{file} has {max(bits)} bits a value, or white as 0; store it with 8 or 16, black as 0")
        return image.convert("I").point(EIGHT_OF_SIXTEEN, "L")
    if image.mode in ("I", "F"):
        raise DataError(f"{file} has values of 32 bits, of which none says white; store 8 or 16 bits")
    return image
