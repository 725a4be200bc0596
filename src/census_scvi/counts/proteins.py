"""Protein counts of CITE-seq cells: find them in a file or an AnnData, and read checked counts in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.config.messages import suggestion
from census_scvi.config.types import FEATURES, NO_PROTEINS
from census_scvi.counts.array_matrix import ArrayMatrix
from census_scvi.counts.h5ad import MAX_COUNT, CountMatrix, name_of, plain_numbers, unreadable
from census_scvi.counts.raw_counts import Matrix, sample_spans
from census_scvi.errors import UserError

# Names of members of obsm that hold protein counts, reduced to lower-case letters.
_NAMED_PROTEINS = {
    "protein", "proteins", "proteinexpression", "proteincounts", "proteinrawcounts", "rawprotein", "prot", "adt",
    "adts", "adtcounts", "adtraw", "rawadt", "antibodycapture", "antibodycounts", "antibodies",
}  # fmt: skip
# Place of the names of the proteins of an array.
_NAMES = "protein_names"


@dataclass(frozen=True)
class Proteins:
    """Protein counts of all cells of a file or an AnnData.

    Attributes
    ----------
    place
        `obsm/<name>`, or `features` for features of type Antibody Capture.
    names
        Names of the proteins, in the order of the columns; all different.
    matrix
        The counts (cells, proteins), read by rows.
    where
        Name of the data and place, for messages.
    way_out
        What a user can do if the values are not raw counts, for messages.
    """

    place: str
    names: list[str]
    matrix: Matrix
    where: str
    way_out: str = ""

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Blocks of at most `rows` cells, from cell `first` up to and excluding `last`.

        Yields the first cell and the raw counts, CSR float32 (cells, proteins), indices sorted, without explicit zeros.

        Raises
        ------
        UserError
            A value is not a raw count, or the file is damaged.
        """
        try:
            for start, block in self.matrix.blocks(rows, first=first, last=last):
                yield start, self._checked(block, start)
        except (OSError, KeyError) as error:
            raise unreadable(self.where, error) from error

    def check_sample(self) -> None:
        """UserError if a value of a sample of cells from all parts of the matrix is not a raw count."""
        try:
            for start, block in self.matrix.sample(sample_spans(self.matrix.shape[0])):
                self._checked(block, start)
        except (OSError, KeyError) as error:
            raise unreadable(self.where, error) from error

    def _checked(self, block: sp.csr_matrix, start: int) -> sp.csr_matrix:
        counts = sp.csr_matrix(block, dtype=np.float64, copy=True)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        with np.errstate(invalid="ignore"):
            wrong = ~((counts.data >= 0) & (counts.data <= MAX_COUNT) & (counts.data == np.trunc(counts.data)))
        if wrong.any():
            raise UserError(self._described(counts, wrong, start))
        return counts.astype(np.float32)

    def _described(self, counts: sp.csr_matrix, wrong: npt.NDArray[np.bool_], start: int) -> str:
        """The message on values that are not raw counts: what they look like, and an example."""
        values = counts.data[wrong]
        if np.isnan(values).any():
            what, example = "missing values (NaN)", np.isnan(counts.data)
        elif (values < 0).any() and (values != np.trunc(values)).any():
            what, example = "negative values, as after CLR or DSB normalisation", counts.data < 0
        elif (values < 0).any():
            what, example = "negative values", counts.data < 0
        elif (values > MAX_COUNT).any():
            what, example = f"values above {MAX_COUNT:,}", counts.data > MAX_COUNT
        else:
            what, example = "values that are not whole numbers, as after a logarithm or CLR", wrong
        entry = int(np.flatnonzero(example)[0])
        cell = start + int(np.searchsorted(counts.indptr, entry, side="right")) - 1
        return (
            f"{self.where} holds {what}: {counts.data[entry]:g} in cell {cell}, protein"
            f" {self.names[int(counts.indices[entry])]!r}; expected raw protein counts (whole numbers, 0 or more)"
            f"{self.way_out}"
        )


class ColumnMatrix:
    """Some columns of a matrix of cells x features."""

    def __init__(self, matrix: Matrix, columns: npt.NDArray[np.int64]) -> None:
        self._matrix, self._columns = matrix, columns
        self.shape = (matrix.shape[0], len(columns))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        return [(start, rows[:, self._columns]) for start, rows in self._matrix.sample(spans)]

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        for start, block in self._matrix.blocks(rows, first=first, last=last):
            yield start, block[:, self._columns]


class FrameMatrix:
    """A DataFrame in an open .h5ad or zarr store, read by rows."""

    def __init__(self, node: Any, where: str) -> None:
        order = node.attrs["column-order"]
        self.names = [each.decode() if isinstance(each, bytes) else str(each) for each in order]
        if lost := [name for name in self.names if name not in node]:
            raise UserError(f"{where}: column {lost[0]!r} is missing; the file is damaged")
        self._columns, self._where = [node[name] for name in self.names], where
        for name, column in zip(self.names, self._columns, strict=True):
            if hasattr(column, "keys") or len(column.shape) != 1:
                found = column.attrs.get("encoding-type", "table")
                raise UserError(f"{where}: column {name!r} is stored as {found}; expected numbers (raw protein counts)")
        lengths = {int(column.shape[0]) for column in self._columns}
        if len(lengths) > 1:
            raise UserError(f"{where}: its columns differ in length ({sorted(lengths)}): the file is damaged")
        self.shape = (lengths.pop() if lengths else 0, len(self.names))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        return [(start, self._rows(start, stop)) for start, stop in spans]

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        end = self.shape[0] if last is None else last
        for start in range(first, end, rows):
            yield start, self._rows(start, min(start + rows, end))

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        columns = [plain_numbers(np.asarray(column[start:stop]), self._where) for column in self._columns]
        return sp.csr_matrix(np.stack(columns, axis=1))


def protein_features(
    matrix: Matrix, columns: npt.NDArray[np.int64], names: Sequence[str], where: str
) -> Proteins | None:
    """Proteins that are columns of a matrix of cells x features; None if `columns` is empty."""
    if not len(columns):
        return None
    return Proteins(FEATURES, list(names), ColumnMatrix(matrix, columns), f"{where}: Antibody Capture")


def find_proteins(
    data: Any, features: Proteins | None, asked: str | None, *, n_cells: int, name: str, setting: str
) -> Proteins | None:
    """Find the protein counts of cells; None if there are none, or if `asked` is `none`.

    Parameters
    ----------
    data
        AnnData, or an open .h5ad or zarr store, whose obsm may hold proteins; None: a format without obsm.
    features
        Proteins among the features (`protein_features`).
    asked
        The place to use: `obsm/<name>`, `features` or `none`; None: the only place that has proteins. Of obsm, members
        with a usual name (protein_expression, ADT, ...) are found.
    n_cells
        Number of rows that the counts must have.
    name
        Name of the data in messages.
    setting
        The setting or argument that selects a place, for messages; for example `query.proteins=`.

    Raises
    ------
    UserError
        The place does not exist, or several places have proteins; the counts have another number of rows, no names,
        names twice, or values in a sample of cells that are not raw counts.
    """
    if asked == NO_PROTEINS:
        return None
    obsm = obsm_members(data)
    place = asked or _only_place(obsm, features, name, setting)
    if place is None:
        return None
    proteins = features if place == FEATURES else _of_obsm(data, obsm, place, name, setting)
    if proteins is None:
        raise UserError(f"{name} has no features of type Antibody Capture (obsm has {', '.join(obsm) or 'nothing'})")
    others = f"name the place that holds them ({setting}obsm/<name>), or " if obsm else ""
    way_out = f"; {others}exclude the proteins with {setting}{NO_PROTEINS}"
    proteins = replace(proteins, way_out=way_out)
    _check(proteins, n_cells)
    return proteins


def _only_place(obsm: Mapping[str, Any], features: Proteins | None, name: str, setting: str) -> str | None:
    """The place that has proteins; None if there is none, UserError if there are several."""
    found = [f"obsm/{key}" for key in obsm if re.sub("[^a-z]", "", key.casefold()) in _NAMED_PROTEINS]
    found += [FEATURES] * (features is not None)
    if len(found) > 1:
        raise UserError(
            f"{name} has proteins in several places: {', '.join(found)}; name the one with the raw counts:"
            f" {setting}{found[0]}"
        )
    return found[0] if found else None


def _check(proteins: Proteins, n_cells: int) -> None:
    """UserError if the number of rows, a name or a value of a sample is wrong."""
    where, names = proteins.where, pd.Index(proteins.names)
    if not len(names):
        raise UserError(f"{where} has no columns; expected one per protein{proteins.way_out}")
    if proteins.matrix.shape[0] != n_cells:
        raise UserError(f"{where} has {proteins.matrix.shape[0]:,} rows, obs {n_cells:,}; expected one row per cell")
    if (names.str.strip() == "").any():
        number = int(np.flatnonzero(names.str.strip() == "")[0]) + 1
        raise UserError(f"{where}: column {number} has no name; give every protein a name")
    if (twice := names[names.duplicated()].unique()).size:
        raise UserError(
            f"{where}: {len(twice)} names of proteins occur more than once, such as {twice[0]!r}; rename the columns,"
            " or sum them where they are the same protein"
        )
    proteins.check_sample()


def obsm_members(data: Any) -> Mapping[str, Any]:
    """Members of obsm by name, of an AnnData or an open .h5ad or zarr store; empty for another format (None)."""
    obsm = data.obsm if isinstance(data, ad.AnnData) else {} if data is None else data.get("obsm", {})
    return {str(key): obsm[key] for key in obsm} if hasattr(obsm, "keys") else {}  # a table before anndata 0.7


def _of_obsm(data: Any, obsm: Mapping[str, Any], place: str, name: str, setting: str) -> Proteins:
    key, where = place.removeprefix("obsm/"), f"{name}: {place}"
    if key not in obsm:
        near, found = suggestion(place, [f"obsm/{each}" for each in obsm]), ", ".join(obsm) or "nothing"
        raise UserError(f"{name} has no {place}{near} (obsm has {found})")
    member = obsm[key]
    if isinstance(member, pd.DataFrame):
        return Proteins(place, [str(each) for each in member.columns], ArrayMatrix(_plain(member), where), where)
    if hasattr(member, "keys") and "column-order" in member.attrs:
        frame = FrameMatrix(member, where)
        return Proteins(place, frame.names, frame, where)
    if (dimensions := len(getattr(member, "shape", (0, 0)))) != 2:
        raise UserError(f"{where} has {dimensions} dimensions; expected cells x proteins")
    matrix: Matrix = ArrayMatrix(member, where) if isinstance(data, ad.AnnData) else CountMatrix(data, place)
    return Proteins(place, _names_in_uns(data, key, matrix.shape[1], where, setting), matrix, where)


def _plain(frame: pd.DataFrame) -> npt.NDArray[Any]:
    """Values of a table; whole numbers that pandas stores with a mask become float64."""
    numbers = all(pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes)
    values = frame.to_numpy()
    return frame.to_numpy(np.float64, na_value=np.nan) if numbers and values.dtype == object else values


def _names_in_uns(data: Any, key: str, n_proteins: int, where: str, setting: str) -> list[str]:
    """Names of the columns of an array: `uns["<key>_names"]`, else `uns["protein_names"]`."""
    uns = data.uns if isinstance(data, ad.AnnData) else data.get("uns", {})
    found = next((each for each in (f"{key}_names", _NAMES) if each in uns), None)
    if found is None:
        raise UserError(
            f"{where} is an array of {n_proteins} columns without names; put the names of the proteins into"
            f" uns['{_NAMES}'], or make it a DataFrame: adata.obsm[{key!r}] = pd.DataFrame(adata.obsm[{key!r}],"
            f" adata.obs_names, names); or exclude the proteins with {setting}{NO_PROTEINS}"
        )
    values = uns[found] if isinstance(data, ad.AnnData) else _read(data, f"uns/{found}")
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "OUST":
        raise UserError(f"{where}: uns[{found!r}] is not a list of names; expected {n_proteins} names of proteins")
    if len(values) != n_proteins:
        raise UserError(f"{where} has {n_proteins} columns, uns[{found!r}] {len(values)} names; expected as many")
    return [each.decode() if isinstance(each, bytes) else str(each) for each in values]


def _read(store: Any, key: str) -> Any:
    try:
        return ad.io.read_elem(store[key])
    except Exception as error:  # anndata raises many kinds of errors
        raise UserError(f"{name_of(store)}: {key} cannot be read ({' '.join(str(error).split())})") from error
