"""HDF5 files from strangers: they name no other file, and no size is believed that they declare.

HDF5 does not check that a part of an array holds as much as it declares: what is missing is whatever was in memory.
"""

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from ibau_jax.data.memory import check_size
from ibau_jax.errors import DataError, refusing, shortened
from ibau_jax.files import check_regular

# Filters of chunks whose output is measured before HDF5 sees their input. Those of plug-ins are code of others.
DEFLATE, LZF, FLETCHER = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF, h5py.h5z.FILTER_FLETCHER32
FILTERS = (DEFLATE, h5py.h5z.FILTER_SHUFFLE, FLETCHER, LZF)
CHECKSUM = 4  # bytes of Fletcher's
MOST_NAMES = 1000


class Arrays:
    """The arrays in an HDF5 file's root group."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file, self._path, self._size = file, path, os.path.getsize(path)

    @property
    def names(self) -> list[str]:
        """The names, of which very many are cut off."""
        return [name for name, _ in zip(self._file, range(MOST_NAMES), strict=False)]

    def form(self, name: str) -> h5py.Dataset | None:
        """An array of which nothing is checked but that it lies in this file; None for what is none."""
        array = self._file[name] if isinstance(self._file.get(name, getlink=True), h5py.HardLink) else None
        return array if isinstance(array, h5py.Dataset) and array.shape is not None else None

    def header(self, name: str) -> h5py.Dataset:
        """An array that has not been read, its declared size and its storage checked.

        Raises:
            DataError: it lies in another file or elsewhere in this one, is not numbers, or can't be what it declares.
        """
        where = f"{self._path}: {shortened(name, 40)}"
        if not isinstance(self._file.get(name, getlink=True), h5py.HardLink):
            raise DataError(f"{where} is a link, to another file perhaps; copy the array itself into the file")
        array = self._file[name]
        if not isinstance(array, h5py.Dataset):
            raise DataError(f"{where} is no array")
        if array.is_virtual or array.external:
            raise DataError(f"{where} lies in another file; copy the array itself into the file")
        if array.shape is None or array.dtype.kind not in "biuf" or h5py.check_dtype(vlen=array.dtype):
            raise DataError(f"{where} is no array of numbers")
        check_size(_bytes(array, array.shape), self._size, where)
        self._check_storage(array, where)
        return array

    def _check_storage(self, array: h5py.Dataset, where: str) -> None:
        """Raises DataError unless all of an array was written, by known filters, and inflates to what it declares."""
        plist = array.id.get_create_plist()
        filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
        unknown = [number for number in filters if number not in FILTERS]
        if unknown or len(set(filters)) < len(filters) or {DEFLATE, LZF} <= set(filters):
            raise DataError(f"{where} is compressed in a way that is not read (filters {filters[:9]}); use gzip")
        if array.chunks is None:
            if array.id.get_storage_size() < _bytes(array, array.shape):
                raise DataError(f"{where} was not written: its values are not in the file")
            return
        self._check_chunks(array, filters, where)

    def _check_chunks(self, array: h5py.Dataset, filters: list[int], where: str) -> None:
        """Raises DataError unless all chunks are there, apart from one another, and hold what they declare."""
        chunk = _bytes(array, array.chunks)
        check_size(chunk, self._size, where)
        counts = [-(-length // step) for length, step in zip(array.shape, array.chunks, strict=True)]
        parts = array.id.get_num_chunks()
        check_size(parts * chunk, self._size, where)
        if parts < math.prod(counts):
            raise DataError(f"{where} was not written as a whole: parts of it are not in the file")
        stored: list[h5py.h5d.StoreInfo] = []
        array.id.chunk_iter(stored.append)
        stored.sort(key=lambda info: info.byte_offset)
        ends = [info.byte_offset + info.size for info in stored]
        starts = [*(info.byte_offset for info in stored), self._size]
        if any(end > start for end, start in zip(ends, starts[1:], strict=True)):
            raise DataError(f"{where} has parts that overlap, or larger than the file; the file is damaged")
        for info in stored:
            used = [number for index, number in enumerate(filters) if not info.filter_mask & 1 << index]
            if not _holds(array.id.read_direct_chunk(info.chunk_offset)[1], used, chunk):
                raise DataError(f"{where} has a part that holds more or less than it declares; the file is damaged")

    def read(self, name: str) -> np.ndarray:
        """An array that `header` has checked."""
        values = np.asarray(self._file[name][()])
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def _bytes(array: h5py.Dataset, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * array.dtype.itemsize  # Dataset.nbytes is 64 bits of it


def _holds(content: bytes, filters: list[int], size: int) -> bool:
    """Says whether a stored chunk gives exactly `size` bytes; `filters` are in the order in which they were applied."""
    compressors = [number for number in filters if number in (DEFLATE, LZF)]
    if not compressors:
        return len(content) == size + CHECKSUM * filters.count(FLETCHER)
    place = filters.index(compressors[0])
    size += CHECKSUM * filters[:place].count(FLETCHER)
    if compressors[0] == DEFLATE:
        stream = zlib.decompressobj()
        return len(stream.decompress(content, size + 1)) == size and stream.eof
    return _lzf_length(content[: len(content) - CHECKSUM * filters[place:].count(FLETCHER)], size) == size


def _lzf_length(content: bytes, most: int) -> int:
    """Counts the bytes that LZF makes of `content`, until there are more than `most`; -1 where it is cut off.

    A byte below 32 stands before that many literal bytes and one more; in others the upper three bits are the length of
    a repetition, less 2, to which a byte is added where all three are set, and a byte of its distance follows.
    """
    place = length = 0
    while place < len(content) and length <= most:
        control = content[place]
        if control < 32:
            place, length = place + control + 2, length + control + 1
            continue
        more = control >> 5 == 7
        if place + 1 + more >= len(content):
            return -1
        length += (control >> 5) + 2 + (content[place + 1] if more else 0)
        place += 2 + more
    return length if place <= len(content) else -1


@contextmanager
def open_hdf5(path: Path) -> Iterator[Arrays]:
    """The arrays of an HDF5 file.

    Raises:
        DataError: whatever in the file can't be read, as one line. ConfigError: it is no regular file.
    """
    check_regular(path)
    with refusing(str(path), DataError), h5py.File(path, "r") as file:
        yield Arrays(file, path)
