"""Read and write long HDF5 vectors in threads: chunks are (de)compressed outside the HDF5 library and its lock.

The result is a plain HDF5 dataset with standard filters (gzip after a byte shuffle), or without a filter.
"""

from __future__ import annotations

import os
import struct
import sys
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import h5py
import numba
import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib

from census_scvi.counts.inflate import decode_chunks, limits, narrow, unshuffle
from census_scvi.errors import UserError

Compression = Literal["gzip", "none"]
Places = npt.NDArray[np.int64]
Chunks = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]
_NO_CHUNKS: Chunks = (np.empty(0, np.int64), np.empty(0, np.uint32))
_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
# Level of igzip: output as small as that of level 1 of zlib, but faster to write and to decode.
_LEVEL = 3


class VectorWriter:
    """Appends to a new dataset of numbers: a vector, or rows of the same number of values.

    Parameters
    ----------
    group
        Group in which the dataset is created.
    name
        Name of the dataset.
    dtype
        Numbers or booleans; stored little-endian.
    chunk
        Elements per chunk, or a little less with rows.
    width
        Values per row; None: a vector.
    compression
        gzip after a byte shuffle, or none.
    random_low_byte
        Store the lowest bytes of the values uncompressed; for indices, these bytes do not compress.
    pool
        Pool that compresses the chunks.
    """

    def __init__(
        self,
        group: h5py.Group,
        name: str,
        dtype: Any,
        *,
        chunk: int,
        compression: Compression,
        pool: Executor,
        random_low_byte: bool = False,
        width: int | None = None,
    ) -> None:
        zipped = compression == "gzip"
        filters = {"compression": "gzip", "compression_opts": _LEVEL, "shuffle": True} if zipped else {}
        row = () if width is None else (width,)
        self._rows = max(chunk // (width or 1), 1)  # per chunk
        self._values = self._rows * (width or 1)  # per chunk
        stored = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"), logical=True)  # a boolean as anndata has it
        self._dataset = group.create_dataset(
            name, shape=(0, *row), maxshape=(None, *row), chunks=(self._rows, *row), dtype=stored, **filters
        )
        self._dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self._pool = pool
        self._encode = partial(_compress, n_stored=self._values * random_low_byte) if zipped else _plain
        self._rest = np.empty((0, *row), self._dataset.dtype)
        self._written = 0

    def append(self, values: npt.NDArray[np.generic]) -> None:
        """Append values, or rows; those that do not fill a chunk are buffered."""
        waiting = np.concatenate([self._rest, values.astype(self._dataset.dtype, copy=False)])
        full = len(waiting) - len(waiting) % self._rows
        self._write(waiting[:full])
        self._rest = waiting[full:].copy()

    def finish(self) -> None:
        """Write the buffered values."""
        if n_left := len(self._rest):
            padded = np.zeros((self._rows, *self._rest.shape[1:]), self._rest.dtype)
            padded[:n_left] = self._rest
            self._write(padded)
            self._dataset.resize(self._written - self._rows + n_left, axis=0)

    def _write(self, values: npt.NDArray[np.generic]) -> None:
        """Write whole chunks."""
        first, self._written = self._written, self._written + len(values)
        self._dataset.resize(self._written, axis=0)
        chunks = values.reshape(-1, self._values)
        columns = (0,) * (self._dataset.ndim - 1)
        for number, data in enumerate(self._pool.map(self._encode, chunks)):
            self._dataset.id.write_direct_chunk((first + number * self._rows, *columns), data)


class Vector:
    """Reads a one-dimensional dataset of numbers.

    Little-endian data, contiguous or in chunks as `VectorWriter` writes them, are read without the HDF5 library. This
    takes half the time, and works in any number of threads at once. Other layouts are read with h5py.

    Parameters
    ----------
    dataset
        The dataset; its file stays open.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self._dtype = dataset.dtype
        self._file = Path(dataset.file.filename)
        self._descriptor = os.open(self._file, os.O_RDONLY)
        self._chunk = int(dataset.chunks[0]) if dataset.chunks else 0
        self._shuffled = _filters(dataset) == [_SHUFFLE, _DEFLATE]
        native = dataset.dtype.isnative and sys.byteorder == "little"
        self._place = dataset.id.get_offset() if native else None
        self._direct = bool(self._chunk) and (self._shuffled or not _filters(dataset))
        self._direct &= native and dataset.dtype.itemsize == 4
        # Looked up once, because the query for a chunk in the HDF5 library takes as long as decoding the chunk.
        self._offsets, self._sizes = _chunks(dataset) if self._direct else _NO_CHUNKS
        self._direct &= bool((self._sizes > 0).all())

    def close(self) -> None:
        """Close the file descriptor; the h5py file stays open."""
        os.close(self._descriptor)

    def read_ranges(self, first: Places, last: Places, place: Places, out: npt.NDArray[np.generic]) -> bool:
        """`read_into` for ranges [first[i], last[i]) of elements, each copied to `place[i]` of `out` and behind it."""
        if self._direct and self._shuffled and (decode := decode_chunks()):
            values = np.empty(self._chunk, self._dtype)
            stored = (self._descriptor, self._offsets, self._sizes, self._chunk)
            exact, complete = decode(*stored, first, last, place, values, out, *limits(out.dtype))
            if complete:
                return bool(exact)
            # What is wrong is found again, and reported, chunk by chunk.
        exact = True
        for start, stop, begin in zip(first.tolist(), last.tolist(), place.tolist(), strict=True):
            exact &= self.read_into(start, stop, out[begin : begin + stop - start])
        return exact

    def read_into(self, first: int, last: int, out: npt.NDArray[np.generic]) -> bool:
        """Copy elements [first, last) into `out`; returns False if its dtype cannot represent all of them exactly.

        Raises
        ------
        UserError
            The file is truncated or damaged at these elements.
        """
        if self._place is not None:
            size = self._dtype.itemsize
            return _narrow(self._fetch(first, size * (last - first), self._place + size * first), out)
        if not self._direct:
            return _narrow(self._dataset[first:last].astype(self._dtype.newbyteorder("=")), out)
        exact = True
        for start in range(first - first % self._chunk, last, self._chunk):
            values = self._decode(start)
            low, high = max(first, start), min(last, start + self._chunk)
            exact &= _narrow(values[low - start : high - start], out[low - first : high - first])
        return exact

    def _decode(self, start: int) -> npt.NDArray[np.generic]:
        """Elements of the chunk that begins at `start`."""
        number, size = start // self._chunk, self._chunk * self._dtype.itemsize
        stored, place = int(self._sizes[number]), int(self._offsets[number])
        if not self._shuffled:
            return self._fetch(start, size, place)
        try:
            data = isal_zlib.decompress(os.pread(self._descriptor, stored, place), bufsize=size)
        except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub calls it a variable
            raise self._damage(start, str(error)) from None
        if len(data) != size:
            raise self._damage(start, f"{len(data)} bytes of {size}")
        values = np.empty(self._chunk, self._dtype)
        unshuffle(np.frombuffer(data, np.uint8), values.view(np.uint32))
        return values

    def _fetch(self, start: int, size: int, place: int) -> npt.NDArray[np.generic]:
        """Uncompressed elements from `start` on. The file is not memory-mapped: that would crash if it shrinks."""
        data = os.pread(self._descriptor, size, place)
        if len(data) != size:
            raise self._damage(start, f"{len(data)} bytes of {size}")
        return np.frombuffer(data, self._dtype)

    def _damage(self, start: int, found: str) -> UserError:
        return UserError(
            f"{self._file} is damaged or was changed after it was written: {self._dataset.name} from element {start:,}"
            f" on ({found}); run scvi-prepare.py --force"
        )


def _chunks(dataset: h5py.Dataset) -> Chunks:
    """Offset and size of each chunk in the file (12 bytes per chunk); size 0 if its filters were skipped."""
    n_chunks = -(-len(dataset) // dataset.chunks[0])
    offsets, sizes = np.zeros(n_chunks, np.int64), np.zeros(n_chunks, np.uint32)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        number = chunk.chunk_offset[0] // dataset.chunks[0]
        offsets[number], sizes[number] = chunk.byte_offset, 0 if chunk.filter_mask else chunk.size

    dataset.id.chunk_iter(note)
    return offsets, sizes


def _narrow(values: npt.NDArray[np.generic], out: npt.NDArray[np.generic]) -> bool:
    """Copy into another dtype; returns whether all values are represented exactly."""
    return bool(narrow(values, out, *limits(out.dtype)))


def _plain(values: npt.NDArray[np.generic]) -> bytes:
    return values.tobytes()


def _compress(values: npt.NDArray[np.generic], n_stored: int) -> bytes:
    """Compress to a zlib stream (RFC 1950) of the shuffled bytes; the first `n_stored` < 65,536 stay uncompressed."""
    if values.itemsize == 4:
        planes = np.empty(4 * len(values), np.uint8)
        _shuffle(values.view(np.uint32), planes)
    else:
        planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).ravel()
    if not n_stored:
        return isal_zlib.compress(planes, _LEVEL)
    stream = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    return b"".join(
        [
            b"\x78\x01",
            struct.pack("<BHH", 0, n_stored, n_stored ^ 0xFFFF),  # a stored block, not the last (RFC 1951, 3.2.4)
            planes[:n_stored].tobytes(),
            stream.compress(planes[n_stored:]),
            stream.flush(),
            struct.pack(">I", isal_zlib.adler32(planes)),
        ]
    )


def _filters(dataset: h5py.Dataset) -> list[int]:
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]


@numba.njit(nogil=True, cache=True)
def _shuffle(values, planes):  # type: ignore[no-untyped-def]  # numba infers the types
    """Split uint32 values into four planes of bytes, lowest bytes first."""
    n = len(values)
    first, second, third, fourth = planes[:n], planes[n : 2 * n], planes[2 * n : 3 * n], planes[3 * n : 4 * n]
    for i in range(n):
        value = values[i]
        first[i] = value & np.uint32(255)
        second[i] = (value >> np.uint32(8)) & np.uint32(255)
        third[i] = (value >> np.uint32(16)) & np.uint32(255)
        fourth[i] = value >> np.uint32(24)
