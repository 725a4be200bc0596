"""A user's cells, from memory or from a file of any size: finds the raw counts and reads them in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.counts.h5ad import check_counts, open_file, plain_numbers, read_frame, require_place, unreadable
from census_scvi.counts.raw_counts import Matrix, check_place, find_raw_counts, matrices_in, sample_spans, var_key
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument


class QueryCells:
    """A user's cells, from an AnnData or an .h5ad file.

    Parameters
    ----------
    source
        AnnData, or the path of an .h5ad; it is not changed.

    Attributes
    ----------
    name
        Name of the source in messages.
    obs
        obs of the source.

    Raises
    ------
    UserError
        The source is neither an AnnData nor a complete .h5ad, or has no cells.
    """

    def __init__(self, source: ad.AnnData | str | Path) -> None:
        self._stack = ExitStack()
        if isinstance(source, ad.AnnData):
            self.name = "the query"
            self.obs = source.obs
            self._matrices, self._vars = _in_memory(source, self.name)
        elif isinstance(source, str | Path):
            self.name = expand_argument(source, "the file of the query")
            with ExitStack() as stack:
                file = stack.enter_context(open_file(Path(self.name)))
                self.obs = read_frame(file, "obs")
                self._matrices, self._vars = _in_file(file)
                self._stack = stack.pop_all()
        else:
            raise UserError(f"the query is a {type(source).__name__}; expected an AnnData or the path of an .h5ad")
        if not len(self.obs):
            raise UserError(f"{self.name} has no cells")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self.obs)

    def find_counts(self, asked: str | None = None, *, setting: str = "counts=") -> str:
        """Find the place of the raw counts: `X`, `raw` or `layers/<name>`.

        Parameters
        ----------
        asked
            The place to use; None: search all places (`census_scvi.counts.raw_counts`).
        setting
            The setting or argument that selects a place, for messages.

        Raises
        ------
        UserError
            No place has raw counts, or several may have them; the error describes each place.
        """
        if asked is None:
            return find_raw_counts(
                self._matrices, lambda place: self.var(place).index, len(self), name=self.name, setting=setting
            )
        require_place(asked, list(self._matrices), self.name)
        n_genes = len(self.var(asked))
        check_place(asked, self._matrices, len(self), n_genes, name=self.name, setting=setting)
        return asked

    def sample(self, place: str) -> sp.csr_matrix:
        """Raw counts of a sample of cells from all parts of the matrix, CSR (cells, columns of the place)."""
        return sp.vstack([part for _, part in self._matrices[place].sample(sample_spans(len(self)))], format="csr")

    @property
    def places(self) -> list[str]:
        """Places of all matrices."""
        return list(self._matrices)

    def var(self, place: str) -> pd.DataFrame:
        """The var that belongs to a matrix."""
        return self._vars["raw" if place == "raw" else "X"]

    def blocks(self, place: str, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Blocks of (first row, raw counts of at most `rows` cells as CSR); UserError if a value is not a raw count."""
        matrix = self._matrices[place]
        if matrix.shape != (len(self.obs), len(self.var(place))):
            raise UserError(
                f"{self.name}: {place} is {matrix.shape}, obs x var {(len(self.obs), len(self.var(place)))}"
            )
        try:
            for start, block in matrix.blocks(rows):
                check_counts(block, where=f"{self.name}: {place}", first_row=start)
                yield start, block
        except (OSError, KeyError) as error:
            raise unreadable(self.name, error) from error


class _ArrayInMemory:
    """A dense or sparse matrix of an AnnData: in memory, backed, or a dask array."""

    def __init__(self, values: Any, where: str) -> None:
        self._values, self._where = _computable(values, where), where
        self.shape = (int(values.shape[0]), int(values.shape[1]))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        return [(start, self._rows(start, stop)) for start, stop in spans]

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        sparse = sp.issparse(self._values)
        if sparse and self._values.format != "csr":
            # In CSC, each block of rows would need a search through the whole matrix.
            self._values = self._values.tocsr()
        for start in range(0, self.shape[0], rows):
            yield start, self._rows(start, min(start + rows, self.shape[0]))

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


def _in_memory(adata: ad.AnnData, name: str) -> tuple[Mapping[str, Matrix], Mapping[str, pd.DataFrame]]:
    held = {} if adata.X is None else {"X": adata.X}
    if adata.raw is not None:
        held["raw"] = adata.raw.X
    held |= {f"layers/{layer}": values for layer, values in adata.layers.items()}
    matrices = {place: _ArrayInMemory(values, f"{name}: {place}") for place, values in held.items()}
    return matrices, {"X": adata.var, "raw": adata.var if adata.raw is None else adata.raw.var}


def _in_file(file: h5py.File) -> tuple[Mapping[str, Matrix], Mapping[str, pd.DataFrame]]:
    matrices, var = matrices_in(file), read_frame(file, "var")
    return matrices, {"X": var, "raw": read_frame(file, var_key(file, "raw")) if "raw" in matrices else var}
