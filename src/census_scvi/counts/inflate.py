"""Decode many chunks of a vector in one compiled call, without the GIL.

Python's share of a chunk (a call of `pread`, one of isal, a few arrays) takes a third of the time of its decompression,
and only one thread at a time can execute it. A GPU would wait for it, however many threads decode. Here compiled code
calls the C functions of ISA-L, which the package isal contains. Where the package does not export them, `decode_chunks`
returns None, and `Vector` decodes chunk by chunk.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from isal import isal_zlib
from numba import types

log = logging.getLogger(__name__)

_BYTES, _SIZE = types.uintp, types.uint64
_SYMBOLS = ("isal_inflate_init", "isal_inflate_stateless", "isal_adler32")
# `struct inflate_state` of igzip_lib.h begins with next_out (8 bytes), avail_out (4), total_out (4), next_in (8),
# read_in (8), avail_in (4); all of it takes less than this.
_STATE_BYTES = 2**18

_init = types.ExternalFunction("isal_inflate_init", types.void(_BYTES))
_inflate = types.ExternalFunction("isal_inflate_stateless", types.int32(_BYTES))
_adler32 = types.ExternalFunction("isal_adler32", types.uint32(types.uint32, _BYTES, _SIZE))
_pread = types.ExternalFunction("pread", types.int64(types.int32, _BYTES, _SIZE, types.int64))

Decode = Callable[..., tuple[bool, bool]]


@cache
def decode_chunks() -> Decode | None:
    """The compiled function `_decode_chunks`; None if it cannot be used here or does not decode what isal encodes."""
    if sys.byteorder != "little" or sys.platform == "win32":
        return None
    try:
        library = ctypes.CDLL(isal_zlib.__file__)
        for name in _SYMBOLS:
            llvmlite.binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    except (OSError, AttributeError) as error:
        log.debug("chunks are decoded one by one: %s", error)
        return None
    return _decode_chunks if _inflates() else None


def _inflates() -> bool:
    """Whether a stream of isal is decoded to what was encoded."""
    wanted = (np.arange(10_000) ** 2 % 251).astype(np.uint8)
    stream = np.frombuffer(isal_zlib.compress(wanted, 3), np.uint8)
    found = np.empty_like(wanted)
    return bool(_inflate_one(stream, found, np.zeros(_STATE_BYTES, np.uint8)) and (found == wanted).all())


@numba.njit(nogil=True, cache=True)
def _decode_chunks(descriptor, offsets, sizes, chunk, first, last, place, values, out, least, most):  # type: ignore[no-untyped-def]  # numba infers the types
    """Copy ranges of elements of shuffled and zipped chunks of 4-byte numbers into `out`.

    Range i is [first[i], last[i]), and is copied to `place[i]` and behind it. `values` is a buffer (chunk,) of the
    file's dtype, `least` and `most` are the `limits` of the dtype of `out`. Returns whether this dtype represents all
    elements exactly, and whether no chunk is damaged.
    """
    planes, state = np.empty(4 * chunk, np.uint8), np.zeros(_STATE_BYTES, np.uint8)
    stream = np.empty(0, np.uint8)
    exact = True
    for i in range(len(first)):
        for number in range(first[i] // chunk, (last[i] + chunk - 1) // chunk):
            size = sizes[number]
            if size > len(stream):
                stream = np.empty(size, np.uint8)
            if _pread(np.int32(descriptor), stream.ctypes.data, np.uint64(size), np.int64(offsets[number])) != size:
                return exact, False
            if not _inflate_one(stream[:size], planes, state):
                return exact, False
            unshuffle(planes, values.view(np.uint32))
            start = number * chunk
            low, high = max(first[i], start), min(last[i], start + chunk)
            shift = place[i] - first[i]
            exact &= narrow(values[low - start : high - start], out[low + shift : high + shift], least, most)
    return exact, True


@numba.njit(nogil=True, cache=True)
def _inflate_one(stream, out, state):  # type: ignore[no-untyped-def]  # numba infers the types
    """Decode a zlib stream (RFC 1950); returns whether it fills `out` and has the right sum. `state` is for ISA-L."""
    n = len(stream)
    if n < 6 or stream[0] & 15 != 8 or (np.uint32(stream[0]) * 256 + stream[1]) % 31 or stream[1] & 32:
        return False
    _init(state.ctypes.data)
    words, halves = state.view(np.uint64), state.view(np.uint32)
    words[0], halves[2] = out.ctypes.data, len(out)
    words[2], halves[8] = stream.ctypes.data + 2, n - 2
    if _inflate(state.ctypes.data) or halves[3] != len(out):
        return False
    end = words[2] - stream.ctypes.data  # the first byte that was not used
    if end + 4 > n:
        return False
    wanted = np.uint32(0)
    for i in range(4):
        wanted = (wanted << np.uint32(8)) | np.uint32(stream[end + i])
    return _adler32(np.uint32(1), out.ctypes.data, np.uint64(len(out))) == wanted


@numba.njit(nogil=True, cache=True)
def unshuffle(planes, values):  # type: ignore[no-untyped-def]  # numba infers the types
    """Join four planes of bytes, lowest bytes first, to uint32 values."""
    n = len(values)
    first, second, third, fourth = planes[:n], planes[n : 2 * n], planes[2 * n : 3 * n], planes[3 * n : 4 * n]
    for i in range(n):
        values[i] = (
            np.uint32(first[i])
            | (np.uint32(second[i]) << np.uint32(8))
            | (np.uint32(third[i]) << np.uint32(16))
            | (np.uint32(fourth[i]) << np.uint32(24))
        )


def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the largest number of an integer dtype; -inf and inf for another."""
    if dtype.kind not in "iu":
        return -np.inf, np.inf
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


@numba.njit(nogil=True, cache=True)
def narrow(values, out, least, most):  # type: ignore[no-untyped-def]  # numba infers the types
    """Copy into another dtype; returns whether all values are represented exactly.

    `least` and `most` are the `limits` of that dtype. A number outside of them becomes 0: its conversion is undefined,
    and a compiler may take it for exact.
    """
    exact = True
    if most == np.inf:
        for i in range(len(values)):
            out[i] = values[i]
            exact &= out[i] == values[i]
    else:
        nothing = values.dtype.type(0)
        for i in range(len(values)):
            inside = least <= values[i] <= most
            value = values[i] if inside else nothing
            out[i] = value
            exact &= inside and out[i] == value
    return exact
