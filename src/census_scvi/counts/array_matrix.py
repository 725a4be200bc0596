"""A matrix of cells x genes in memory, read by rows like a matrix in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from census_scvi.counts.h5ad import plain_numbers


class ArrayMatrix:
    """A dense or sparse matrix, cells x genes: in memory, backed, or a dask array.

    Parameters
    ----------
    values
        The matrix.
    where
        Its place in messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        self._values, self._where = _computable(values, where), where
        self.shape = (int(values.shape[0]), int(values.shape[1]))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        return [(start, self._rows(start, stop)) for start, stop in spans]

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        sparse = sp.issparse(self._values)
        if sparse and self._values.format != "csr":
            # In CSC, each block of rows would need a search through the whole matrix.
            self._values = self._values.tocsr()
        end = self.shape[0] if last is None else last
        for start in range(first, end, rows):
            yield start, self._rows(start, min(start + rows, end))

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        rows = self._values[start:stop]
        if hasattr(rows, "compute"):  # dask
            rows = rows.compute()
        if isinstance(rows, np.ma.MaskedArray):
            rows = np.ma.filled(rows.astype(np.float64), np.nan)
        if sp.issparse(rows):
            return sp.csr_matrix(_computable(rows, self._where))
        return sp.csr_matrix(plain_numbers(np.asarray(rows), self._where))


def _computable(values: Any, where: str) -> Any:
    """Convert a sparse matrix to a dtype that scipy can compute with; other values are returned unchanged."""
    sparse = sp.issparse(values)
    if not sparse or values.format not in ("csr", "csc"):
        return values
    data = plain_numbers(values.data, where)
    return values if data is values.data else type(values)((data, values.indices, values.indptr), shape=values.shape)
