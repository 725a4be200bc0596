"""Loom files: HDF5 with a dense matrix of genes x cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.counts.formats.stored import StoredCells
from census_scvi.counts.h5ad import plain_numbers
from census_scvi.counts.raw_counts import Matrix
from census_scvi.errors import UserError

# Usual names of the attributes with the names of genes and of cells, best first.
_GENE_NAMES = (
    "Accession",
    "gene_ids",
    "EnsemblID",
    "ensembl_id",
    "Gene",
    "gene",
    "gene_names",
    "var_names",
    "GeneName",
)
_CELL_NAMES = ("CellID", "cell_id", "obs_names", "cell_names", "Barcode", "barcode")
# Maximum number of values of the matrix in memory at a time.
_WINDOW = 2**24


def is_loom(file: h5py.File) -> bool:
    """Whether an HDF5 file is a Loom file."""
    return isinstance(file.get("matrix"), h5py.Dataset) and {"row_attrs", "col_attrs"} <= set(file)


def read_loom(file: h5py.File) -> StoredCells:
    """Cells of an open Loom file.

    Raises
    ------
    UserError
        No attribute of the rows holds text, so that the genes have no names; or the file is damaged.
    """
    path = file.filename
    matrices: dict[str, Matrix] = {"X": LoomMatrix(file["matrix"], path)}
    matrices |= {f"layers/{name}": LoomMatrix(values, path) for name, values in file.get("layers", {}).items()}
    n_cells, n_genes = matrices["X"].shape
    var, obs = _attributes(file["row_attrs"], n_genes), _attributes(file["col_attrs"], n_cells)
    texts = [name for name in var if not pd.api.types.is_numeric_dtype(var[name])]
    if not texts:
        found = ", ".join(map(str, var)) or "none"
        raise UserError(
            f"{path}: the Loom file has no names of genes: expected text in row_attrs/Gene or row_attrs/Accession, and"
            f" its row_attrs are {found}; add the names where the file was written"
        )
    names = next((name for name in _GENE_NAMES if name in texts), texts[0])
    var = var.set_index(var[names].to_numpy(object), drop=False)
    cell_names = next((name for name in _CELL_NAMES if name in obs), None)
    if cell_names is not None:
        obs = obs.set_index(obs[cell_names].astype(str).to_numpy(object), drop=False)
    else:
        obs.index = obs.index.astype(str)
    return StoredCells.of(obs, matrices, var)


def _attributes(group: h5py.Group, length: int) -> pd.DataFrame:
    """The one-dimensional attributes of the rows or columns."""
    columns: dict[str, Any] = {}
    for name, values in group.items():
        if isinstance(values, h5py.Dataset) and values.shape == (length,):
            read = values[:]
            if read.dtype.kind in "SO":
                read = np.array([item.decode() if isinstance(item, bytes) else str(item) for item in read], object)
            columns[str(name)] = read
    return pd.DataFrame(columns, index=range(length))


class LoomMatrix:
    """A dense matrix, stored as genes x cells and read as cells x genes in blocks of cells."""

    def __init__(self, values: h5py.Dataset, path: str) -> None:
        self._values, self._where = values, f"{path}: {str(values.name).lstrip('/')}"
        if len(values.shape) != 2:
            raise UserError(f"{self._where} has the shape {values.shape}; expected genes x cells")
        self.shape = (int(values.shape[1]), int(values.shape[0]))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        return [(start, self._read(start, stop)) for start, stop in spans]

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        rows = min(rows, max(1, _WINDOW // max(self.shape[1], 1)))
        end = self.shape[0] if last is None else last
        for start in range(first, end, rows):
            yield start, self._read(start, min(start + rows, end))

    def _read(self, start: int, stop: int) -> sp.csr_matrix:
        return sp.csr_matrix(plain_numbers(self._values[:, start:stop], self._where).T)
