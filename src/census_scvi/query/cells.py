"""A user's cells, from memory or from a file of any size: finds the raw counts and reads them in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.protein_rows import find_protein_rows
from census_scvi.config.messages import suggestion
from census_scvi.counts.array_matrix import ArrayMatrix
from census_scvi.counts.formats.open_cells import open_cells
from census_scvi.counts.h5ad import check_counts, require_place, unreadable
from census_scvi.counts.log_normalized import Normalization, RecoveredCounts, find_log_normalized, inspect
from census_scvi.counts.proteins import Proteins, find_proteins, obsm_members, protein_features
from census_scvi.counts.raw_counts import Matrix, check_place, find_raw_counts, sample_spans
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument

# What `query.values` may say of the values.
COUNTS, LOG_NORMALIZED = VALUES = ("counts", "log_normalized")

QuerySource: TypeAlias = "ad.AnnData | str | Path | QueryCells"


def opened(source: QuerySource) -> AbstractContextManager[QueryCells]:
    """The cells of a source; cells that are already open stay open."""
    return nullcontext(source) if isinstance(source, QueryCells) else QueryCells(source)


class QueryCells:
    """A user's cells, from an AnnData or a file.

    Parameters
    ----------
    source
        AnnData, or the path of a file or folder of any format of `census_scvi.counts.formats`; it is not changed.
    values
        What the matrices hold: `counts`, raw counts; or `log_normalized`, logarithms of normalised counts, from which
        the raw counts are recovered (`census_scvi.counts.log_normalized`).

    Attributes
    ----------
    name
        Name of the source in messages.
    obs
        obs of the source.

    Raises
    ------
    UserError
        The source is neither an AnnData nor a complete file of a known format, or has no cells.
    """

    def __init__(self, source: ad.AnnData | str | Path, values: str = COUNTS) -> None:
        if values not in VALUES:
            raise UserError(f"values is {values!r}; expected {' or '.join(VALUES)}")
        self._stack, self._values = ExitStack(), values
        self._data: Any
        self._recovered: dict[str, Matrix] = {}
        if isinstance(source, ad.AnnData):
            self.name = "the query"
            self.obs, self._data = source.obs, source
            self._matrices, self._vars = _in_memory(source, self.name)
        elif isinstance(source, str | Path):
            self.name = expand_argument(source, "the file of the query")
            with ExitStack() as stack:
                stored = open_cells(Path(self.name), stack)
                self.obs, self._matrices, self._data = stored.obs, stored.matrices, stored.store
                self._vars = {"X": stored.var, "raw": stored.raw_var}
                self._stack = stack.pop_all()
        else:
            raise UserError(f"the query is a {type(source).__name__}; expected an AnnData or the path of a file")
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
        if asked is not None:
            require_place(asked, list(self._matrices), self.name)
        if self._values == LOG_NORMALIZED:
            return self._find_log_normalized(asked)
        try:
            if asked is None:
                return find_raw_counts(
                    self._matrices, lambda place: self.var(place).index, len(self), name=self.name, setting=setting
                )
            check_place(asked, self._matrices, len(self), len(self.var(asked)), name=self.name, setting=setting)
        except UserError as error:
            if hint := self._logarithms(asked):
                raise UserError(f"{error}; {hint}") from None
            raise
        return asked

    def find_proteins(self, place: str, asked: str | None = None, *, setting: str = "proteins=") -> Proteins | None:
        """Find the protein counts; None if there are none, or if `asked` is `none`.

        Parameters
        ----------
        place
            Place of the raw counts, which may have proteins as features of type Antibody Capture.
        asked
            The place to use: `obsm/<name>`, `features` or `none`; None: the only place that has proteins.
        setting
            The setting or argument that selects a place, for messages.

        Raises
        ------
        UserError
            There is no such place, several places have proteins, or they are not raw counts (`find_proteins`).
        """
        columns, names = find_protein_rows(self.var(place))
        features = protein_features(self._matrices[place], columns, names, f"{self.name}: {place}")
        return find_proteins(self._data, features, asked, n_cells=len(self), name=self.name, setting=setting)

    def vectors(self, name: str) -> npt.NDArray[Any]:
        """A member of obsm, (cells, dimensions); UserError if there is none, or it is no such array."""
        members = obsm_members(self._data)
        if name not in members:
            have = ", ".join(members) or "nothing"
            raise UserError(f"{self.name} has no obsm[{name!r}]{suggestion(name, list(members))}; obsm has {have}")
        member: Any = members[name]
        if not isinstance(self._data, ad.AnnData):
            try:
                member = ad.io.read_elem(member)
            except Exception as error:  # anndata raises many kinds of errors
                raise unreadable(self.name, error) from error
        if hasattr(member, "toarray"):  # sparse
            member = member.toarray()
        values = np.asarray(member)
        if values.ndim != 2 or len(values) != len(self):
            raise UserError(
                f"{self.name}: obsm[{name!r}] has the shape {values.shape}; expected ({len(self):,} cells, dimensions)"
            )
        return values

    def _find_log_normalized(self, asked: str | None) -> str:
        place, normalization = find_log_normalized(self._matrices, asked, len(self), name=self.name)
        self._recovered[place] = RecoveredCounts(self._matrices[place], normalization)
        return place

    def _logarithms(self, asked: str | None) -> str:
        """What to do if a matrix without raw counts holds log-normalised values; "" if none does."""
        for place in [asked] if asked else self._matrices:
            if isinstance(found := inspect(self._matrices[place], len(self)), Normalization):
                return f"{place} holds {found.name} of normalised counts: to use these, set query.values=log_normalized"
        return ""

    def _matrix(self, place: str) -> Matrix:
        """The matrix of raw counts, recovered if the place holds log-normalised values."""
        if self._values == LOG_NORMALIZED and place not in self._recovered:
            self._find_log_normalized(place)
        return self._recovered.get(place, self._matrices[place])

    def sample(self, place: str) -> sp.csr_matrix:
        """Raw counts of a sample of cells from all parts of the matrix, CSR (cells, columns of the place)."""
        return sp.vstack([part for _, part in self._matrix(place).sample(sample_spans(len(self)))], format="csr")

    @property
    def places(self) -> list[str]:
        """Places of all matrices."""
        return list(self._matrices)

    def matrix(self, place: str) -> Matrix:
        """The raw counts of a place, cells x columns, read when they are needed."""
        return self._matrix(place)

    def var(self, place: str) -> pd.DataFrame:
        """The var that belongs to a matrix."""
        return self._vars["raw" if place == "raw" else "X"]

    def blocks(self, place: str, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Blocks of (first row, raw counts of at most `rows` cells as CSR); UserError if a value is not a raw count."""
        matrix = self._matrix(place)
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


def _in_memory(adata: ad.AnnData, name: str) -> tuple[Mapping[str, Matrix], Mapping[str, pd.DataFrame]]:
    held = {} if adata.X is None else {"X": adata.X}
    if adata.raw is not None:
        held["raw"] = adata.raw.X
    held |= {f"layers/{layer}": values for layer, values in adata.layers.items()}
    matrices = {place: ArrayMatrix(values, f"{name}: {place}") for place, values in held.items()}
    return matrices, {"X": adata.var, "raw": adata.var if adata.raw is None else adata.raw.var}
