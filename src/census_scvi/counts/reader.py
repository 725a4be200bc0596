"""Read cells of a prepared .h5ad in blocks of rows, in threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from census_scvi.config.messages import suggestion
from census_scvi.config.run_names import LABELS, PROTEIN_NAMES, PROTEINS
from census_scvi.counts.vector import Vector
from census_scvi.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Cells of the file, in any order; their counts are in shared vectors.

    Attributes
    ----------
    rows
        int64 (cells,): row in the file.
    batch_codes
        int64 (cells,): position in `PreparedCells.batches`.
    first, last
        int64 (cells,): positions of the non-zeros of each cell in `genes` and `counts`.
    genes
        uint16 or int32 (non-zeros,): column of each non-zero.
    counts
        uint16 or float32 (non-zeros,): value of each non-zero; uint16 if it represents all of them exactly.
    label_codes
        int64 (cells,): position in `PreparedCells.labels`; None if labels are not read.
    proteins
        float32 (cells, proteins): counts of the proteins; None if they are not read.
    """

    rows: npt.NDArray[np.int64]
    batch_codes: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    genes: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint16] | npt.NDArray[np.float32]
    label_codes: npt.NDArray[np.int64] | None = None
    proteins: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: npt.NDArray[np.int64] | slice) -> Rows:
        """Select cells, in the order of `chosen`; counts are not copied."""
        per_cell = ("rows", "batch_codes", "first", "last", "label_codes", "proteins")
        values = {name: getattr(self, name) for name in per_cell}
        return replace(self, **{name: value[chosen] for name, value in values.items() if value is not None})

    def csr(self, n_genes: int) -> sp.csr_matrix:
        """Counts, float32 (cells, genes); only for all cells of a `read`, in its order."""
        row_ends = np.concatenate([self.first[:1], self.last])
        counts = (self.counts.astype(np.float32), self.genes.astype(np.int32), row_ends)
        return sp.csr_matrix(counts, shape=(len(self), n_genes))

    def fill(self, dense: npt.NDArray[np.float32]) -> None:
        """Write the counts, including zeros, into `dense`, float32 (cells, genes)."""
        _fill(self.first, self.last, self.genes, self.counts, dense)


class PreparedCells:
    """The file that prepare writes: raw counts as CSR, obs with the column `batch`, and any labels and proteins.

    Uses 1 to 4 bytes per cell (its batch), as much for its label, and 24 bytes per chunk of 16,384 non-zeros. Counts
    are read when requested.

    Parameters
    ----------
    path
        The .h5ad.
    labels, proteins
        Whether `read` also returns labels, and counts of proteins.

    Attributes
    ----------
    n_cells, n_genes
        Shape of the matrix.
    density
        Share of the values that are not 0.
    genes, symbols
        feature_ids and feature_names, in the order of the columns; symbols are empty if var has no feature_name.
    batches
        Batch labels, in the order of the codes.
    batch_codes
        Integers (cells,): batch of each cell.
    labels
        Labels of cells, in the order of the codes, the unlabelled category last; empty if the file has none.
    label_codes
        Integers (cells,): label of each cell; empty if the file has none.
    proteins
        Names of the proteins, in the order of the columns; empty if the file has none.
    """

    def __init__(self, path: Path, *, labels: bool = False, proteins: bool = False) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
            self._counts, self._genes = Vector(self._file["X/data"]), Vector(self._file["X/indices"])
            self._row_ends = Vector(self._file["X/indptr"])
            self.batch_codes = self._file["obs/batch/codes"][:]
            self.n_cells, self.n_genes = (int(n) for n in self._file["X"].attrs["shape"])
            self.density = self._file["X/data"].size / max(self.n_cells * self.n_genes, 1)
            var = read_elem(self._file["var"])
            self.genes = [str(gene) for gene in var.index]
            self.symbols = [str(symbol) for symbol in var.get("feature_name", [])]
            self.batches = [str(label) for label in read_elem(self._file["obs/batch/categories"])]
            self.labels, self.label_codes = self._read_labels()
            self.proteins = self._read_protein_names()
        except (OSError, KeyError) as error:
            raise UserError(
                f"{path} is not an .h5ad written by scvi-prepare.py ({error}); run scvi-prepare.py"
            ) from None
        if labels and not self.labels:
            raise UserError(f"{path} has no labels: set anndata.labels_key, and run scvi-prepare.py --force")
        if proteins and not self.proteins:
            raise UserError(f"{path} has no proteins: set anndata.protein_measurement, and run scvi-prepare.py --force")
        self._with_labels, self._with_proteins = labels, proteins

    def _read_labels(self) -> tuple[list[str], npt.NDArray[np.integer]]:
        if f"obs/{LABELS}/codes" not in self._file:
            return [], np.empty(0, np.int8)
        categories = read_elem(self._file[f"obs/{LABELS}/categories"])
        return [str(label) for label in categories], self._file[f"obs/{LABELS}/codes"][:]

    def _read_protein_names(self) -> list[str]:
        place = f"uns/{PROTEIN_NAMES}"
        return [str(name) for name in read_elem(self._file[place])] if place in self._file else []

    def has_obs(self, column: str) -> bool:
        """Whether obs has a column."""
        return f"obs/{column}" in self._file

    def obs(self, columns: Sequence[str], setting: str) -> pd.DataFrame:
        """Columns of obs, one row per cell; UserError if the file lacks one that `setting` names."""
        known = [str(name) for name in self._file["obs"].attrs["column-order"]]
        if missing := [name for name in columns if name not in known]:
            raise UserError(
                f"{setting} names {missing[0]}, which is not an obs column of {self.path}"
                f"{suggestion(missing[0], known)}; anndata.obs_columns says which columns scvi-prepare.py keeps"
            )
        return pd.DataFrame({name: read_elem(self._file[f"obs/{name}"]) for name in columns})

    def protein_counts(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Counts of the proteins of consecutive cells, float32 (cells, proteins)."""
        return np.asarray(self._file[f"obsm/{PROTEINS}"][start:stop], np.float32)

    def protein_counts_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Counts of the proteins of some cells, float32 (cells, proteins)."""
        order = np.argsort(rows)
        counts = np.empty((len(rows), len(self.proteins)), np.float32)
        counts[order] = self._file[f"obsm/{PROTEINS}"][rows[order]]
        return counts

    def missing_proteins(self, block_rows: int = 2**16) -> dict[str, list[str]]:
        """For each batch, the proteins without any count in it: they were not measured, as scvi-tools assumes."""
        total = np.zeros((len(self.batches), len(self.proteins)))
        for start in range(0, self.n_cells, block_rows):
            counts = self.protein_counts(start, min(start + block_rows, self.n_cells))
            np.add.at(total, self.batch_codes[start : start + len(counts)], counts)
        names = np.array(self.proteins, dtype=object)
        missing = {batch: list(names[total[code] == 0]) for code, batch in enumerate(self.batches)}
        return {batch: found for batch, found in missing.items() if found}

    def close(self) -> None:
        """Close the file."""
        for vector in (self._counts, self._genes, self._row_ends):
            vector.close()
        self._file.close()

    def read(self, blocks: list[tuple[int, int]], pool: Executor | None = None, threads: int = 1) -> Rows:
        """Read blocks of consecutive rows; the cells are in the order of the blocks.

        Parameters
        ----------
        blocks
            First row, and row after the last, of each block.
        pool, threads
            Pool that decodes, and number of tasks; pool None: decode in this thread.

        Raises
        ------
        UserError
            The file is truncated or damaged in these rows.
        """
        row_ends = self._ends(blocks)
        first = np.array([ends[0] for ends in row_ends])
        last = np.array([ends[-1] for ends in row_ends])
        places = np.concatenate([[0], np.cumsum(last - first)])
        genes = np.empty(places[-1], np.uint16 if self.n_genes <= 2**16 else np.int32)
        narrow = np.empty(places[-1], np.uint16)

        def decode(some: slice) -> bool:
            ranges = (first[some], last[some], places[:-1][some])
            self._genes.read_ranges(*ranges, genes)
            return self._counts.read_ranges(*ranges, narrow)

        parts = [slice(part, None, threads) for part in range(min(threads, len(blocks)))]
        counts: npt.NDArray[np.uint16] | npt.NDArray[np.float32] = narrow
        # A list, so that all parts are decoded even if one of them returns False.
        exact = list(pool.map(decode, parts) if pool else map(decode, parts))
        if not all(exact):
            counts = np.empty(places[-1], np.float32)  # rare: counts above 65,535, or not whole numbers
            self._counts.read_ranges(first, last, places[:-1], counts)
        if len(genes) and genes.max() >= self.n_genes:
            raise UserError(
                f"{self.path} refers to gene {genes.max()} of {self.n_genes}: it is damaged; run scvi-prepare.py"
                " --force"
            )
        bounds = [place + ends - ends[0] for place, ends in zip(places[:-1], row_ends, strict=True)]
        rows = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in blocks])
        proteins = [self.protein_counts(*block) for block in blocks] if self._with_proteins else None
        return Rows(
            rows=rows,
            batch_codes=self.batch_codes[rows].astype(np.int64),
            first=np.concatenate([bound[:-1] for bound in bounds]),
            last=np.concatenate([bound[1:] for bound in bounds]),
            genes=genes,
            counts=counts,
            label_codes=self.label_codes[rows].astype(np.int64) if self._with_labels else None,
            proteins=np.concatenate(proteins) if proteins else None,
        )

    def _ends(self, blocks: list[tuple[int, int]]) -> list[npt.NDArray[np.int64]]:
        """End of the non-zeros of the row before each block, and of each row of the block; int64 (rows + 1,)."""
        first, last = np.array(blocks, np.int64).T
        places = np.concatenate([[0], np.cumsum(last + 1 - first)])
        ends = np.empty(places[-1], np.int64)
        self._row_ends.read_ranges(first, last + 1, places[:-1], ends)
        return np.split(ends, places[1:-1])


@numba.njit(nogil=True, cache=True)
def _fill(first, last, genes, counts, dense):  # type: ignore[no-untyped-def]  # numba infers the types
    for cell in range(len(first)):
        row = dense[cell]
        row[:] = 0
        for i in range(first[cell], last[cell]):
            row[genes[i]] = counts[i]
