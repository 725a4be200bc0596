"""A user's cells, from memory or from a file of any size: where raw counts may lie, and the counts in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import anndata as ad
import h5py
import pandas as pd
import scipy.sparse as sp

from census_scvi.config_errors import suggestion
from census_scvi.counts.h5ad import CountMatrix, check_counts, open_file, read_frame
from census_scvi.errors import UserError

# Rows in which raw counts are told from other values; all others are checked when they are read.
_FIRST_LOOK = 1024
# Where raw counts are looked for first; then in the other layers.
_LIKELY = ("layers/counts", "raw", "X")


class _Matrix(Protocol):
    shape: tuple[int, int]

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]: ...


class QueryCells:
    """Cells that a user brings, as an AnnData or as an .h5ad file.

    Parameters
    ----------
    source
        AnnData in memory, or the path of an .h5ad; nothing of it is changed.

    Attributes
    ----------
    name
        What messages call it.
    obs
        Its obs.

    Raises
    ------
    UserError
        Neither of both, no whole .h5ad, or without cells.
    """

    def __init__(self, source: ad.AnnData | str | Path) -> None:
        self._stack = ExitStack()
        if isinstance(source, ad.AnnData):
            self.name = "the query"
            self.obs = source.obs
            self._matrices, self._vars = _in_memory(source)
        elif isinstance(source, str | Path):
            self.name = str(source)
            file = self._stack.enter_context(open_file(Path(source)))
            self.obs = read_frame(file, "obs")
            self._matrices, self._vars = _in_file(file)
        else:
            raise UserError(f"the query is a {type(source).__name__}; expected an AnnData or the path of an .h5ad")
        if not len(self.obs):
            raise UserError(f"{self.name} holds no cells")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self.obs)

    def find_counts(self, asked: str | None = None) -> str:
        """Where the raw counts are: `X`, `raw` or `layers/<name>`.

        Parameters
        ----------
        asked
            The only place to look in; None looks in `layers/counts`, `raw`, `X`, and then in the other layers.

        Raises
        ------
        UserError
            No place holds whole numbers of 0 or more: what each of them holds.
        """
        if asked is not None and asked not in self._matrices:
            raise UserError(
                f"{self.name} has no {asked}{suggestion(asked, list(self._matrices))}"
                f" (it has {', '.join(self._matrices)})"
            )
        likely = [place for place in _LIKELY if place in self._matrices]
        places = [asked] if asked else [*likely, *(place for place in self._matrices if place not in likely)]
        found = []
        for place in places:
            try:
                next(self.blocks(place, _FIRST_LOOK))
            except UserError as error:
                found.append(str(error).removeprefix(f"{self.name}: ").partition(";")[0])
            else:
                return place
        raise UserError(
            f"{self.name} holds no raw counts, and the model knows nothing else: {'; '.join(found) or 'it has no X'}."
            " Put the counts as they came from the sequencer's pipeline into X or layers['counts']"
        )

    def var(self, place: str) -> pd.DataFrame:
        """The var that belongs to a matrix."""
        return self._vars["raw" if place == "raw" else "X"]

    def blocks(self, place: str, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Raw counts, (first row, CSR) of at most `rows` cells; UserError for what is no raw count."""
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
            raise UserError(f"{self.name}: the file is damaged or truncated ({error})") from error


class _ArrayInMemory:
    """A matrix of an AnnData, dense or sparse."""

    def __init__(self, values: Any) -> None:
        # By columns a block of rows would be sought in all of it.
        self._values = values.tocsr() if sp.issparse(values) and values.format != "csr" else values
        self.shape = (int(values.shape[0]), int(values.shape[1]))

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        for start in range(0, self.shape[0], rows):
            yield start, sp.csr_matrix(self._values[start : start + rows])


def _in_memory(adata: ad.AnnData) -> tuple[Mapping[str, _Matrix], Mapping[str, pd.DataFrame]]:
    held = {f"layers/{name}": layer for name, layer in adata.layers.items()}
    if adata.X is not None:
        held["X"] = adata.X
    if adata.raw is not None:
        held["raw"] = adata.raw.X
    matrices = {place: _ArrayInMemory(values) for place, values in held.items()}
    return matrices, {"X": adata.var, "raw": adata.var if adata.raw is None else adata.raw.var}


def _in_file(file: h5py.File) -> tuple[Mapping[str, _Matrix], Mapping[str, pd.DataFrame]]:
    keys = {f"layers/{name}": f"layers/{name}" for name in file.get("layers", {})}
    keys |= {place: key for place, key in {"X": "X", "raw": "raw/X"}.items() if key in file}
    var = read_frame(file, "var")
    matrices = {place: CountMatrix(file, key) for place, key in keys.items()}
    return matrices, {"X": var, "raw": read_frame(file, "raw/var") if "raw" in keys else var}
