"""Find the matrix of an .h5ad or AnnData that holds the raw counts, by values and names; refuse if it is unclear."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.counts.h5ad import CountMatrix, check_counts, name_of, require_place, unreadable
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

# Number of cells to inspect, and number of ranges that they are divided into, spread over the file. The other cells are
# checked when they are read.
_CELLS, _RANGES = 1024, 8
# Layer names that mean raw counts, reduced to lower-case letters and digits.
_NAMED_COUNTS = {
    "counts", "count", "rawcounts", "rawcount", "countsraw", "raw", "rawdata", "rawx", "umi", "umis", "umicounts",
    "countsumi", "rawumi", "rawumis", "rawumicounts", "originalcounts", "countsoriginal", "integercounts",
}  # fmt: skip
# Layer names that mean a part of the reads, as velocyto, alevin-fry and dynast write them.
_NAMED_PART = re.compile(r"spliced|ambiguous|spanning|nascent|mature|intron|exon|label+ed")
# Among at least this number of non-zero counts, one is larger than 1.
_MANY = 500
# A matrix is a small part of another one if no value is larger, and its sum is less than this share of the other sum.
_SMALL_PART = 0.2
# Maximum relative difference of numbers that should be equal; logarithms in half precision keep three digits.
_ROUNDING = 0.02
_NEARLY_ALL = 0.95


class Matrix(Protocol):
    """A matrix, cells x genes, that is read by rows."""

    shape: tuple[int, int]

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        ...

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        ...


class UnreadableMatrix:
    """Placeholder for a matrix that cannot be read; raises the reason when its values are requested."""

    def __init__(self, reason: str) -> None:
        self.shape, self._reason = (-1, -1), reason

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """UserError: why it cannot be read."""
        raise UserError(self._reason)

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """UserError: why it cannot be read."""
        raise UserError(self._reason)


def matrices_in(file: Any) -> dict[str, Matrix]:
    """The matrices of an .h5ad or a zarr store by place: `X`, `raw` and `layers/<name>`."""
    return {place: _matrix(file, key) for place, key in _keys(file).items()}


def _keys(file: Any) -> dict[str, str]:
    raw = "raw.X" if "raw.X" in file else "raw/X"  # anndata before 0.7 wrote raw.X and raw.var
    found = {place: key for place, key in {"X": "X", "raw": raw}.items() if key in file}
    return found | {f"layers/{name}": f"layers/{name}" for name in file.get("layers", {})}


def matrix_key(file: Any, place: str) -> str:
    """HDF5 key of a matrix; UserError if there is none, with a list of the existing ones."""
    keys = _keys(file)
    require_place(place, list(keys), name_of(file))
    return keys[place]


def var_key(file: Any, place: str) -> str:
    """HDF5 key of the var that belongs to a matrix."""
    if place != "raw":
        return "var"
    return "raw.var" if "raw.var" in file else "raw/var"


def _matrix(file: Any, key: str) -> Matrix:
    try:
        return CountMatrix(file, key)
    except UserError as error:
        return UnreadableMatrix(str(error))


def find_raw_counts(
    matrices: Mapping[str, Matrix], genes: Callable[[str], pd.Index], n_cells: int, *, name: str, setting: str
) -> str:
    """Find the matrix that holds the raw counts: `X`, `raw` or `layers/<name>`.

    Candidates contain only whole numbers of 0 or more in a sample of cells spread over the file. Among several
    candidates, the order of preference is: a name that means raw counts (`layers/counts`, `raw`); X; the matrix from
    which X or raw was normalised. Equal matrices count as one. Not selected are a matrix of only 0 and 1, a matrix that
    was rounded after normalisation, and a small part of another matrix.

    Parameters
    ----------
    matrices
        All matrices, by place.
    genes
        Returns the column names of a place.
    n_cells
        Number of rows that a matrix must have.
    name
        Name of the data in messages.
    setting
        Setting or argument that selects a matrix, for messages; for example `query.counts=`.

    Raises
    ------
    UserError
        No matrix holds raw counts, or several may hold them; the error describes each.
    """
    looks = [_look(place, matrix, genes(place), n_cells, name) for place, matrix in matrices.items()]
    whole = [look for look in looks if not look.refused]
    if not whole:
        found = "; ".join(look.refused for look in looks) or "it has no X"
        raise UserError(f"{name} has no raw counts: {found}; {_PUT}")
    likely = [look for look in whole if not look.unlike_counts]
    if not likely:
        return _all_unlike(whole, name, setting)
    likely = [look for look in likely if not look.is_multiple] or likely
    groups = _equal([look for look in likely if not any(look.is_small_part_of(other) for other in likely)])
    normalised = [look for look in looks if look.refused and look.place in ("X", "raw") and look.rows is not None]
    chosen = _evident(groups, normalised)
    if chosen is None:
        raise UserError(_undecided(name, setting, groups, looks))
    if len(whole) > 1:
        others = ", ".join(look.place for look in whole if look is not chosen)
        log.info("using the raw counts in %s; %s also contains whole numbers", chosen.place, others)
    return chosen.place


def _all_unlike(whole: list[_Look], name: str, setting: str) -> str:
    """The best place if all matrices contain only 0; UserError if one has values, since they are unlike raw counts."""
    if wrong := [look for look in whole if look.counts.nnz]:
        raise UserError(_undecided(name, setting, [[look] for look in wrong], whole))
    return _best(whole).place


def check_place(
    place: str,
    matrices: Mapping[str, Matrix],
    n_cells: int,
    n_genes: int,
    *,
    name: str,
    setting: str,
    asked: bool = True,
) -> None:
    """UserError if a matrix does not hold raw counts.

    A doubtful matrix, for example one of only 0 and 1, is used with a warning if the user requested it.

    Parameters
    ----------
    place
        Place of the matrix, a key of `matrices`.
    matrices, n_cells, name, setting
        As for `find_raw_counts`.
    n_genes
        Number of columns that the matrix must have.
    asked
        Whether the user requested this place.
    """
    look = _look(place, matrices[place], pd.RangeIndex(n_genes), n_cells, name)
    if look.refused:
        others = ", ".join(other for other in matrices if other != place)
        way_out = f"name another place with {setting}... ({others})" if others else _PUT
        raise UserError(f"{name}: {look.refused}. {place} does not contain raw counts; {way_out}")
    if look.counts.nnz and look.unlike_counts:
        if not asked:
            raise UserError(_undecided(name, setting, [[look]], [look]))
        log.warning("%s: %s is used as raw counts, but it %s", name, place, look.unlike_counts)


_PUT = "put the counts from the sequencing pipeline (unnormalised) into X or layers['counts']"


@dataclass(frozen=True)
class _Look:
    """A sample of the cells of a matrix; `refused` is the reason why it cannot hold counts, or ""."""

    place: str
    genes: pd.Index
    rows: sp.csr_matrix | None
    refused: str = ""

    @cached_property
    def counts(self) -> sp.csr_matrix:
        """Sampled values, float64 (cells, genes), without duplicate entries and explicit zeros."""
        assert self.rows is not None, "only of what was read"
        return _tidy(self.rows)

    @cached_property
    def unlike_counts(self) -> str:
        """Reason why the whole numbers are probably not raw counts, or ""."""
        if not self.counts.nnz:
            return "holds only 0"
        if self.counts.nnz >= _MANY and self.counts.data.max() == 1:
            return "holds only 0 and 1"
        totals = _totals(self.counts)
        if len(totals) >= 20 and np.ptp(totals) <= 0.005 * totals.mean() and self.is_multiple:
            return f"has the same total in every cell ({totals.mean():,.0f}), which suggests normalisation and rounding"
        return ""

    @property
    def is_multiple(self) -> bool:
        """Whether most cells have no count of 1, as after rounding of scaled values."""
        return bool(np.median(_row_minima(self.counts)) > 1)

    @property
    def named_counts(self) -> bool:
        """Whether the name means raw counts."""
        return self.place == "raw" or re.sub("[^a-z0-9]", "", self._layer) in _NAMED_COUNTS

    @property
    def named_part(self) -> bool:
        """Whether the name means a part of the reads."""
        return bool(_NAMED_PART.search(self._layer))

    @property
    def _layer(self) -> str:
        return self.place.removeprefix("layers/").casefold() if self.place.startswith("layers/") else ""

    def is_small_part_of(self, other: _Look) -> bool:
        """Whether no value is larger than in the other matrix, and the sum is a small share of the other sum."""
        if other is self or not self.genes.equals(other.genes):
            return False
        if self.counts.sum() >= _SMALL_PART * other.counts.sum():
            return False
        return bool((self.counts - other.counts).max() <= 0)

    def holds_the_same_as(self, other: _Look) -> bool:
        """Whether the counts of the shared genes are equal, and nearly all genes of the smaller matrix are shared."""
        if self.genes.equals(other.genes):
            return _same(self.counts, other.counts)
        shared = _shared_columns(self.genes, other.genes)
        if shared is None:
            return False
        return _same(_tidy(self.counts[:, shared[0]]), _tidy(other.counts[:, shared[1]]))

    def is_made_into(self, normalised: _Look) -> bool:
        """Whether the other matrix contains these counts scaled per cell, with or without a logarithm."""
        values, counts = normalised.counts, self.counts
        if not self.genes.equals(normalised.genes):
            shared = _shared_columns(self.genes, normalised.genes)
            if shared is None:
                return False
            counts, values = _tidy(counts[:, shared[0]]), _tidy(values[:, shared[1]])
        if not np.array_equal(values.indptr, counts.indptr) or not np.array_equal(values.indices, counts.indices):
            return False
        with np.errstate(all="ignore"):
            return any(_proportional(inverse(values.data), counts) for inverse in _INVERSES)

    def __str__(self) -> str:
        totals, n_genes = _totals(self.counts), np.diff(self.counts.indptr)
        return f"{self.place} (medians per cell: {np.median(totals):,.0f} counts, {np.median(n_genes):,.0f} genes)"


# Inverse functions of log1p to the bases e, 2 and 10, and the identity.
_INVERSES: tuple[Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]], ...] = (
    np.expm1,
    lambda x: np.exp2(x) - 1,
    lambda x: np.power(10.0, x) - 1,
    lambda x: x,
)


def _look(place: str, matrix: Matrix, genes: pd.Index, n_cells: int, name: str) -> _Look:
    if matrix.shape != (-1, -1) and matrix.shape != (n_cells, len(genes)):
        return _Look(place, genes, None, f"{place} is {matrix.shape}, obs x var {(n_cells, len(genes))}")
    rows, refused = None, ""
    try:
        parts = matrix.sample(sample_spans(n_cells))
        rows = sp.vstack([part for _, part in parts], format="csr")
        for start, part in parts:
            check_counts(part, where=f"{name}: {place}", first_row=start)
    except UserError as error:
        refused = str(error).removeprefix(f"{name}: ").partition("; if")[0]
    except (OSError, KeyError) as error:
        raise unreadable(name, error) from error
    return _Look(place, genes, rows, refused)


def sample_spans(n_cells: int) -> list[tuple[int, int]]:
    """Ranges of cells for the inspection of a matrix: all cells, or ranges spread from the first to the last cell."""
    if n_cells <= _CELLS:
        return [(0, n_cells)]
    each = _CELLS // _RANGES
    return [(int(start), int(start) + each) for start in np.linspace(0, n_cells - each, _RANGES)]


def _evident(groups: list[list[_Look]], normalised: list[_Look]) -> _Look | None:
    """The best matrix of the group that holds the raw counts; None if it is unclear which group does."""
    proven = [group for group in groups if any(look.is_made_into(other) for look in group for other in normalised)]
    named = [group for group in groups if any(look.named_counts for look in group)]
    in_x = [group for group in groups if any(look.place == "X" for look in group)]
    for kind in (named, in_x, proven):
        if len(kind) == 1:
            return _best(kind[0])
        if kind:
            both = [group for group in kind if group in proven]
            return _best(both[0]) if len(both) == 1 else None
    if len(groups) != 1 or all(look.named_part for look in groups[0]):
        return None
    if any(_is_log_normalised(look) for look in normalised):  # it was normalised from other counts
        return None
    return _best(groups[0])


def _best(group: list[_Look]) -> _Look:
    """Of equal matrices, the one with most genes; among these layers/counts, then raw, then X, then other layers."""
    rank = {"layers/counts": 0, "raw": 1, "X": 2}
    return min(group, key=lambda look: (-len(look.genes), rank.get(look.place, 3), not look.named_counts))


def _equal(looks: list[_Look]) -> list[list[_Look]]:
    """Group the matrices that hold the same counts."""
    groups: list[list[_Look]] = []
    for look in looks:
        same = next((group for group in groups if group[0].holds_the_same_as(look)), None)
        if same is None:
            groups.append([look])
        else:
            same.append(look)
    return groups


def _undecided(name: str, setting: str, groups: list[list[_Look]], looks: list[_Look]) -> str:
    shown = [_best(group) for group in groups]
    largest = max(shown, key=lambda look: float(look.counts.sum())).place
    way_out = f"Select the raw counts of all reads, for example {setting}{largest}, or put them into layers['counts']"
    if len(shown) == 1:
        way_out = f"If these are the raw counts, set {setting}{largest}, or put them into layers['counts']"
    if {"layers/spliced", "layers/unspliced"} <= {look.place for look in looks}:
        way_out += " (the sum of spliced, unspliced and ambiguous reads)"
    if len(shown) == 1:
        look = shown[0]
        why = look.unlike_counts and f"it {look.unlike_counts}"
        why = why or (
            "its name suggests a part of the reads" if look.named_part else "X was computed from other counts"
        )
        return f"{name}: only {look} contains whole numbers, but {why}. {way_out}"
    listed = ", ".join(str(look) for look in shown)
    return (
        f"{name}: {len(shown)} matrices contain different whole numbers, and it is unclear which are the raw counts:"
        f" {listed}. {way_out}"
    )


def _is_log_normalised(look: _Look) -> bool:
    """Whether nearly every cell has the same total after the inverse of log1p."""
    values = look.counts.copy()
    if not values.nnz or values.data.min() < 0 or values.data.max() > 20:
        return False
    values.data = np.expm1(values.data)
    totals = _totals(values)
    return len(totals) >= 10 and bool(np.mean(np.abs(totals / np.median(totals) - 1) < 1e-3) >= _NEARLY_ALL)


def _proportional(values: npt.NDArray[np.float64], counts: sp.csr_matrix) -> bool:
    """Whether the values of nearly every cell are proportional to its counts."""
    starts = counts.indptr[:-1][np.diff(counts.indptr) > 0]
    if not len(starts):
        return False
    ratio = values / counts.data
    telling = np.maximum.reduceat(counts.data, starts) > np.minimum.reduceat(counts.data, starts)
    least, most = np.minimum.reduceat(ratio, starts), np.maximum.reduceat(ratio, starts)
    agrees = (least > 0) & (most <= least * (1 + _ROUNDING))
    return bool(telling.any()) and float(agrees[telling].mean()) >= _NEARLY_ALL


def _tidy(rows: sp.csr_matrix) -> sp.csr_matrix:
    tidy = sp.csr_matrix(rows, dtype=np.float64, copy=True)
    tidy.sum_duplicates()
    tidy.eliminate_zeros()
    return tidy


def _same(one: sp.csr_matrix, other: sp.csr_matrix) -> bool:
    pairs = ((one.indptr, other.indptr), (one.indices, other.indices), (one.data, other.data))
    return all(np.array_equal(these, those) for these, those in pairs)


def _shared_columns(one: pd.Index, other: pd.Index) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]] | None:
    """Positions of the shared genes with unique names; None unless nearly all of the smaller set are shared."""
    unique = one[~one.duplicated(keep=False)].intersection(other[~other.duplicated(keep=False)])
    if not len(unique) or len(unique) < _NEARLY_ALL * min(len(one), len(other)):
        return None
    unique = unique.sort_values()
    return one.get_indexer_for(unique), other.get_indexer_for(unique)


def _totals(rows: sp.csr_matrix) -> npt.NDArray[np.float64]:
    """Sums of the cells that have counts; one 0 if there is no such cell."""
    totals = np.asarray(rows.sum(axis=1), np.float64).ravel()
    return totals[totals > 0] if (totals > 0).any() else np.zeros(1)


def _row_minima(rows: sp.csr_matrix) -> npt.NDArray[np.float64]:
    starts = rows.indptr[:-1][np.diff(rows.indptr) > 0]
    return np.minimum.reduceat(rows.data, starts) if len(starts) else np.zeros(1)
