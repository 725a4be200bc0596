"""Read anybody's .h5ad: its tables, and its counts in blocks of rows, whatever the layout; refuse what is no count."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.config_errors import suggestion
from census_scvi.errors import UserError

# Larger integers are not exact in float32.
MAX_COUNT = 2**24
# Non-zeros held at a time when a CSC matrix, stored by gene, is turned into rows (12 bytes each).
_CSC_WINDOW = 2**25
# Values held at a time of a dense matrix.
_DENSE_WINDOW = 2**24


def counts_key(file: h5py.File, counts: str) -> str:
    """Where `counts` (X, raw or layers/<name>) lies in the file; UserError naming what there is."""
    key = {"raw": "raw/X"}.get(counts, counts)
    if key in file:
        return key
    present = [name for name in ("X", "raw") if name in file]
    present += [f"layers/{name}" for name in file.get("layers", {})]
    raise UserError(
        f"{file.filename}: no {counts}{suggestion(counts, present)} (it has {', '.join(present) or 'none'})"
    )


def open_file(path: Path) -> h5py.File:
    """Open a file for reading; UserError where there is none, or not a whole one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a whole .h5ad file ({error})") from error


def read_frame(file: h5py.File, key: str) -> pd.DataFrame:
    """The table at `key`; UserError where there is none that anndata reads."""
    path = file.filename
    if key not in file:
        raise UserError(f"{path}: has no {key}; expected an .h5ad as anndata writes it")
    try:
        frame = anndata.io.read_elem(file[key])
    except Exception as error:  # anndata raises errors of many kinds for what it does not know
        raise UserError(f"{path}: {key} cannot be read ({error})".replace("\n", " ")) from error
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"{path}: {key} is no table; expected an .h5ad as anndata writes it")
    return frame


class CountMatrix:
    """The matrix at `key` of an open .h5ad (CSR, CSC or dense), cells x genes, read in blocks of rows."""

    def __init__(self, file: h5py.File, key: str) -> None:
        self._node: Any = file[key]
        if isinstance(self._node, h5py.Dataset):
            self._encoding, shape = "array", self._node.shape
        else:
            # anndata before 0.7 wrote h5sparse_format and h5sparse_shape.
            attributes = self._node.attrs
            self._encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "?")))
            shape = attributes.get("shape", attributes.get("h5sparse_shape"))
        self._encoding = self._encoding.removesuffix("_matrix")
        if self._encoding not in ("array", "csr", "csc") or len(shape) != 2:
            raise UserError(
                f"{file.filename}: {key} is stored as {self._encoding!r}, not as a CSR, CSC or dense matrix"
            )
        self.shape = (int(shape[0]), int(shape[1]))

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) for at most `rows` rows at a time, of the rows from `first` up to `last` (not in)."""
        stop = self.shape[0] if last is None else last
        if self._encoding == "csc":
            yield from self._csc_blocks(rows, first, stop)
            return
        read = self._read_csr
        if self._encoding == "array":
            read = self._read_dense
            rows = min(rows, max(1, _DENSE_WINDOW // max(self.shape[1], 1)))
        for start in range(first, stop, rows):
            yield start, read(start, min(start + rows, stop))

    def _read_dense(self, start: int, stop: int) -> sp.csr_matrix:
        return sp.csr_matrix(self._node[start:stop])

    def _read_csr(self, start: int, stop: int) -> sp.csr_matrix:
        indptr = self._node["indptr"][start : stop + 1].astype(np.int64)
        span = slice(int(indptr[0]), int(indptr[-1]))
        arrays = (self._node["data"][span], self._node["indices"][span], indptr - indptr[0])
        return sp.csr_matrix(arrays, shape=(stop - start, self.shape[1]))

    def _csc_blocks(self, rows: int, first: int, last: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Passes over the file, each collecting a window of rows that fits in memory."""
        per_row = np.zeros(self.shape[0], dtype=np.int64)
        for _, indices in self._csc_chunks("indices"):
            per_row += np.bincount(indices, minlength=self.shape[0])
        until = np.concatenate([[0], np.cumsum(per_row)])
        start = first
        while start < last:
            fits = int(np.searchsorted(until, until[start] + _CSC_WINDOW, side="right")) - 1
            stop = min(max(fits, start + 1), last)
            window = self._csc_window(start, stop)
            for row in range(start, stop, rows):
                yield row, window[row - start : min(row + rows, stop) - start]
            start = stop

    def _csc_window(self, start: int, stop: int) -> sp.csr_matrix:
        indptr = self._node["indptr"][:].astype(np.int64)
        rows, genes, values = [], [], []
        for first, indices in self._csc_chunks("indices"):
            inside = np.flatnonzero((indices >= start) & (indices < stop))
            rows.append(indices[inside] - start)
            genes.append((np.searchsorted(indptr, first + inside, side="right") - 1).astype(np.int32))
            values.append(self._node["data"][first : first + len(indices)][inside])
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(genes)))
        return sp.csr_matrix(entries, shape=(stop - start, self.shape[1]))

    def _csc_chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        values, step = self._node[name], 2**22
        for first in range(0, max(len(values), 1), step):
            yield first, values[first : first + step]


def check_counts(block: sp.csr_matrix, *, where: str, first_row: int) -> None:
    """Refuse a block (cells x genes) that holds anything but whole numbers from 0 to 2**24.

    Raises UserError naming `where` (file and matrix), the row, the column and the value.
    """
    values = block.data
    if values.dtype.kind in "bui":
        bad = (values < 0) | (values > MAX_COUNT) if values.dtype.kind != "b" else np.zeros(len(values), bool)
    elif values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = ~((values >= 0) & (values <= MAX_COUNT) & (values == np.trunc(values)))
    else:
        raise UserError(f"{where} holds {values.dtype} values; expected raw counts")
    if not bad.any():
        return
    entry = int(np.flatnonzero(bad)[0])
    row = first_row + int(np.searchsorted(block.indptr, entry, side="right")) - 1
    value = values[entry]
    if value > MAX_COUNT and np.isfinite(value):
        what = f"larger than {MAX_COUNT:,}, which float32 does not hold exactly"
    else:
        what = "not a raw count (a whole number, 0 or more)"
    raise UserError(
        f"{where} holds {value:g} in row {row}, column {int(block.indices[entry])}: {what}; "
        "if the counts lie elsewhere in the file, say so with counts: X, raw or layers/<name>"
    )
