"""HDF5 files from strangers: they name no other file, and no size is believed that they declare."""

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

# Filters of chunks that can't take more than their input accounts for: deflate's output is measured before HDF5 sees
# its input, and LZF makes at most 88 times as much. Those of plug-ins are code of others.
FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF)
COMPRESSORS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF}
CHECKSUM = 5  # bytes of Fletcher's, and one more
MOST_NAMES = 1000


class Arrays:
    """The arrays in an HDF5 file's root group."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file, self._path, self._size = file, path, os.path.getsize(path)

    @property
    def names(self) -> list[str]:
        """The names, of which very many are cut off."""
        return [name for name, _ in zip(self._file, range(MOST_NAMES), strict=False)]

    def array(self, name: str) -> h5py.Dataset:
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
        if unknown or len(set(filters)) < len(filters) or len(COMPRESSORS & set(filters)) > 1:
            raise DataError(f"{where} is compressed in a way that is not read (filters {filters[:9]}); use gzip")
        if array.chunks is None:
            if array.id.get_storage_size() < _bytes(array, array.shape):
                raise DataError(f"{where} was not written: its values are not in the file")
            return
        chunk = _bytes(array, array.chunks)
        check_size(chunk, self._size, where)
        counts = [-(-length // step) for length, step in zip(array.shape, array.chunks, strict=True)]
        if array.id.get_num_chunks() < math.prod(counts):
            raise DataError(f"{where} was not written as a whole: parts of it are not in the file")
        stored: list[h5py.h5d.StoreInfo] = []
        array.id.chunk_iter(stored.append)
        if any(info.size > self._size for info in stored):
            raise DataError(f"{where} has parts larger than the file")
        if h5py.h5z.FILTER_DEFLATE in filters:
            skipped = 1 << filters.index(h5py.h5z.FILTER_DEFLATE)
            for info in stored:
                if not info.filter_mask & skipped:
                    _check_inflated(array.id.read_direct_chunk(info.chunk_offset)[1], chunk, where)

    def read(self, name: str) -> np.ndarray:
        """An array that `array` has checked."""
        values = np.asarray(self._file[name][()])
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def _bytes(array: h5py.Dataset, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * array.dtype.itemsize  # Dataset.nbytes is 64 bits of it


def _check_inflated(content: bytes, size: int, where: str) -> None:
    """HDF5 inflates a chunk to the end, however long that is: so it is measured before."""
    stream = zlib.decompressobj()
    stream.decompress(content, size + CHECKSUM)
    if not stream.eof:
        raise DataError(f"{where} has a part that inflates to more than it declares; the file is damaged")


@contextmanager
def open_hdf5(path: Path) -> Iterator[Arrays]:
    """The arrays of an HDF5 file.

    Raises:
        DataError: whatever in the file can't be read, as one line. ConfigError: it is no regular file.
    """
    check_regular(path)
    with refusing(str(path), DataError), h5py.File(path, "r") as file:
        yield Arrays(file, path)
