"""Read cells of a prepared .h5ad in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from anndata.io import read_elem

from census_scvi.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Some cells of the file.

    Attributes
    ----------
    rows
        int64 (cells,): row in the file.
    counts
        CSR float32 (cells, genes).
    batch_codes
        int64 (cells,): position in `PreparedCells.batches`.
    """

    rows: npt.NDArray[np.int64]
    counts: sp.csr_matrix
    batch_codes: npt.NDArray[np.int64]


class PreparedCells:
    """The file that prepare writes: raw counts as CSR, obs with the column `batch`.

    Attributes
    ----------
    n_cells, n_genes
        Shape of the matrix.
    genes
        feature_ids, in the order of the columns.
    batches
        Batch labels, in the order of the codes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
            # Kept open: looking a dataset up costs as much as reading a small block.
            self._data, self._indices, self._row_ends, self._codes = (
                self._file[key] for key in ("X/data", "X/indices", "X/indptr", "obs/batch/codes")
            )
            self.n_cells, self.n_genes = (int(n) for n in self._file["X"].attrs["shape"])
            self.genes = [str(gene) for gene in read_elem(self._file["var"]).index]
            self.batches = [str(label) for label in read_elem(self._file["obs/batch/categories"])]
        except (OSError, KeyError) as error:
            raise UserError(f"{path} is no .h5ad that scvi-prepare.py wrote ({error}); run scvi-prepare.py") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, start: int, stop: int) -> Rows:
        """Cells of consecutive rows."""
        row_ends = self._row_ends[start : stop + 1].astype(np.int64)
        first, last = row_ends[0], row_ends[-1]
        counts = sp.csr_matrix(
            (self._data[first:last], self._indices[first:last], row_ends - first),
            shape=(stop - start, self.n_genes),
        )
        codes = self._codes[start:stop].astype(np.int64)
        return Rows(np.arange(start, stop, dtype=np.int64), counts, codes)


def concatenate(parts: list[Rows], order: npt.NDArray[np.int64] | None = None) -> Rows:
    """Cells of several reads as one, optionally permuted."""
    rows = np.concatenate([part.rows for part in parts])
    counts = sp.vstack([part.counts for part in parts], format="csr")
    codes = np.concatenate([part.batch_codes for part in parts])
    return Rows(rows, counts, codes) if order is None else Rows(rows[order], counts[order], codes[order])
