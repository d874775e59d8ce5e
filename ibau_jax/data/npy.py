"""NumPy's files, npy and npz, from strangers: nothing is unpickled, and no declared size is believed."""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ibau_jax.data.memory import check_size
from ibau_jax.errors import IbauError, refusing, shortened
from ibau_jax.files import check_regular

MEMBER = ".npy"
ENCRYPTED = 0x1  # zip's flag
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others inflate without bounds
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LONGEST_HEADER = 2**14  # bytes; NumPy takes 10,000
STEP = 2**20  # bytes read at a time


@dataclass(frozen=True)
class Header:
    """What a file says of an array before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Arrays:
    """The arrays of an npz file by name."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._size = archive, os.path.getsize(path)
        self.path = path
        self._members: dict[str, zipfile.ZipInfo] = {}
        folded: set[str] = set()  # file systems and readers differ on whether these are the same
        for info in archive.infolist():
            if not info.filename.endswith(MEMBER):
                continue
            name = info.filename.removesuffix(MEMBER)
            if name.casefold() in folded:
                raise ValueError(f"it has several members called {shortened(name, 40)}")
            _check_member(info, name)
            folded.add(name.casefold())
            self._members[name] = info

    @property
    def names(self) -> list[str]:
        """The names, in the file's order."""
        return list(self._members)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, as declared; reading one never takes more."""
        return sum(info.file_size for info in self._members.values())

    def header(self, name: str) -> Header:
        """Shape and dtype of an array."""
        with self._open(name) as (stream, size):
            return _header(stream, size)[0]

    form = header  # what is known of any array, whether or not it can be images or labels

    def read(self, name: str) -> np.ndarray:
        """An array."""
        with self._open(name) as (stream, size):
            return array_of(stream, size)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        info = self._members[name]
        check_size(info.file_size, self._size, f"{self.path}: {shortened(name, 40)}")
        with self._archive.open(info) as stream:
            yield stream, info.file_size


def _check_member(info: zipfile.ZipInfo, name: str) -> None:
    if info.flag_bits & ENCRYPTED:
        raise ValueError(f"{shortened(name, 40)} is encrypted")
    if info.compress_type not in METHODS:
        raise ValueError(f"{shortened(name, 40)} is compressed by a method other than those of np.savez_compressed")


@contextmanager
def open_npz(path: Path, kind: type[IbauError]) -> Iterator[Arrays]:
    """The arrays of an npz file.

    Raises:
        IbauError: of this kind, one line, whatever in the file can't be read; DataError for sizes that can't be;
            ConfigError: it is no regular file.
    """
    check_regular(path)
    with refusing(str(path), kind), open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise kind(f"{path} is one array (.npy), not an archive of several; save them by np.savez")
        with zipfile.ZipFile(file) as archive:
            yield Arrays(archive, path)


def read_npy(path: Path, kind: type[IbauError]) -> np.ndarray:
    """The array of an npy file.

    Raises:
        IbauError: of this kind, one line, whatever in the file can't be read. ConfigError: it is no regular file.
    """
    check_regular(path)
    with refusing(str(path), kind), open(path, "rb") as file:
        return array_of(file, os.fstat(file.fileno()).st_size)


def array_of(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an npy file of `size` bytes.

    Raises:
        ValueError: it is damaged, or holds no plain numbers or text.
    """
    header, start = _header(stream, size)
    buffer = np.empty(header.nbytes, np.uint8)
    content, place = buffer.data, len(start)
    content[:place] = start
    while place < len(content):
        count = stream.readinto(content[place : place + STEP])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file ends within an array")
        place += count
    stream.read(1)  # the end, where a zip member's checksum is compared
    shape = header.shape[::-1] if header.fortran else header.shape
    array = buffer.view(header.dtype).reshape(shape) if header.nbytes else np.empty(shape, header.dtype)
    array = array.T if header.fortran else array
    return array.astype(header.dtype.newbyteorder("="), copy=False)


def _header(stream: IO[bytes], size: int) -> tuple[Header, bytes]:
    """The header, and the first values, which were read with it."""
    head = io.BytesIO(stream.read(min(size, LONGEST_HEADER)))  # a header may claim to have gigabytes
    version = np.lib.format.read_magic(head)
    if version not in HEADERS:
        raise ValueError(f"arrays of format version {version[0]}.{version[1]} are not read")
    try:
        shape, fortran, dtype = HEADERS[version](head)
    except (MemoryError, RecursionError):  # of Python's parser, at a few hundred brackets
        raise ValueError("an array's header is nested too deeply") from None
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise ValueError("an array of Python objects or of records is not read")
    if not all(0 <= length < 2**63 for length in shape):
        raise ValueError("an array has a shape that can't be")
    header, left = Header(tuple(map(int, shape)), dtype, fortran), size - head.tell()
    if header.nbytes != left:
        raise ValueError(
            f"an array of shape {shortened(shape, 60)} and dtype {shortened(dtype, 40)} takes "
            f"{shortened(header.nbytes, 30)} bytes, but {left} are there"
        )
    return header, head.read()
