"""Raw counts from log-normalised values: log(CPM + 1), log1p(CP10k) and the like.

Normalisation multiplies the counts of a cell by one factor. The smallest value of nearly every cell comes from a count
of 1, 2 or 3, so that the factor, and with it the counts, follow from the values alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from census_scvi.counts.raw_counts import Matrix, sample_spans
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

Values = npt.NDArray[np.float64]

# Inverse functions of the logarithms, by their name.
_INVERSES: dict[str, Callable[[Values], Values]] = {
    "log1p": np.expm1,
    "log2(x + 1)": lambda x: np.exp2(x) - 1,
    "log10(x + 1)": lambda x: np.power(10.0, x) - 1,
}
# No logarithm of normalised counts is larger (log2 of 30 million).
_LARGEST = 25.0
# Counts that the smallest value of a cell may come from, and the maximum distance from a whole number.
_SMALLEST_COUNTS, _ROUNDING = (1, 2, 3), 0.1
# Larger multiples are too imprecise in float32 to tell whether they are whole numbers.
_PRECISE = 1000
_NEARLY_ALL = 0.95
# Total of a cell whose counts cannot be recovered, such as of log(TPM + 1).
_TOTAL = 10_000


@dataclass(frozen=True)
class Normalization:
    """How the values of a matrix were computed from counts.

    Attributes
    ----------
    name
        Name of the logarithm.
    exact
        Whether the counts can be recovered; else the values are scaled to 10,000 counts per cell and rounded.
    """

    name: str
    exact: bool

    def counts(self, rows: sp.csr_matrix) -> sp.csr_matrix:
        """Raw counts, float64 whole numbers, of values of some cells; CSR (cells, genes) both."""
        values = _tidy(rows)
        values.data = _INVERSES[self.name](values.data)
        if self.exact:
            values.data = np.round(_multiples(values)[0])
        else:
            totals = np.asarray(values.sum(axis=1)).ravel()
            values.data = np.round(
                values.data * np.repeat(_TOTAL / np.where(totals > 0, totals, 1), np.diff(values.indptr))
            )
            values.eliminate_zeros()
        return values


class RecoveredCounts:
    """Raw counts, cells x genes, recovered from a matrix of log-normalised values in blocks of rows."""

    def __init__(self, matrix: Matrix, normalization: Normalization) -> None:
        self.shape, self._matrix, self._normalization = matrix.shape, matrix, normalization

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows."""
        return [(start, self._normalization.counts(rows)) for start, rows in self._matrix.sample(spans)]

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`."""
        for start, block in self._matrix.blocks(rows, first=first, last=last):
            yield start, self._normalization.counts(block)


def find_log_normalized(
    matrices: Mapping[str, Matrix], asked: str | None, n_cells: int, *, name: str
) -> tuple[str, Normalization]:
    """Find the matrix with log-normalised values: the one asked for, or the first of X, raw and the layers.

    Raises
    ------
    UserError
        No matrix holds log-normalised values; the error says what each holds.
    """
    found = []
    for place in [asked] if asked else matrices:
        result = inspect(matrices[place], n_cells)
        if isinstance(result, Normalization):
            how = (
                "the raw counts are recovered" if result.exact else f"scaled to {_TOTAL:,} counts per cell and rounded"
            )
            log.info("%s: %s holds %s of normalised counts; %s", name, place, result.name, how)
            return place, result
        found.append(f"{place} {result}")
    whole = all("whole numbers" in words for words in found)
    way_out = (
        "set query.values=counts" if whole else "give raw counts (query.values=counts) or log1p of counts per 10,000"
    )
    raise UserError(f"{name} has no log-normalised values: {'; '.join(found) or 'it has no matrix'}; {way_out}")


def inspect(matrix: Matrix, n_cells: int) -> Normalization | str:
    """How the values of a sample of cells were computed, or a description of what they are instead."""
    try:
        rows = _tidy(sp.vstack([part for _, part in matrix.sample(sample_spans(n_cells))], format="csr"))
    except (UserError, OSError, KeyError) as error:
        return f"cannot be read ({error})"
    values = rows.data
    if not len(values):
        return "holds only 0"
    if not np.isfinite(values).all():
        return "holds missing or infinite values"
    if values.min() < 0:
        return f"holds negative values ({values.min():.3g}): scaled or corrected values"
    if (values == np.trunc(values)).all():
        return f"holds whole numbers up to {values.max():,.0f}, which are raw counts"
    if values.max() > _LARGEST:
        return f"holds values up to {values.max():,.3g}, too large for logarithms: normalised without a logarithm"
    return _normalization(rows)


def _normalization(rows: sp.csr_matrix) -> Normalization | str:
    best, equal = "", ""
    spread = []
    for name, inverse in _INVERSES.items():
        linear = sp.csr_matrix((inverse(rows.data), rows.indices, rows.indptr), shape=rows.shape)
        multiples, whole = _multiples(linear)
        telling = (multiples > 1 + _ROUNDING) & (multiples < _PRECISE)
        if telling.any() and whole[telling].mean() >= _NEARLY_ALL:
            best = best or name
        totals = np.asarray(linear.sum(axis=1)).ravel()
        totals = totals[totals > 0]
        spread.append((totals.min(), totals.max()))
        if len(totals) >= 10 and np.mean(np.abs(totals / np.median(totals) - 1) < 0.01) >= _NEARLY_ALL:
            equal = equal or name
    if best or equal:
        return Normalization(best or equal, bool(best))
    low, high = spread[0]
    return (
        f"holds values from {rows.data.min():.3g} to {rows.data.max():.3g} that are not logarithms of counts scaled per"
        f" cell (totals after expm1: {low:,.0f} to {high:,.0f}): corrected, imputed or otherwise changed values"
    )


def _multiples(values: sp.csr_matrix) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Each value as a multiple of its cell's factor, float64, and whether that is nearly a whole number."""
    n_values = np.diff(values.indptr)
    filled = n_values > 0
    smallest = np.ones(len(n_values))
    smallest[filled] = np.minimum.reduceat(values.data, values.indptr[:-1][filled])
    of_smallest = values.data / np.repeat(smallest, n_values)
    row = np.repeat(np.arange(len(n_values)), n_values)
    multiples, whole = of_smallest.copy(), np.zeros(len(row), bool)
    undecided = np.ones(len(n_values), bool)
    for count in _SMALLEST_COUNTS:
        scaled = of_smallest * count
        near = np.abs(scaled - np.round(scaled)) <= _ROUNDING
        near_of_cell = np.bincount(row, near | (scaled >= _PRECISE), len(n_values)) >= _NEARLY_ALL * n_values
        if count == 1:
            whole = near
        chosen = (undecided & near_of_cell)[row]
        multiples[chosen], whole[chosen] = scaled[chosen], near[chosen]
        undecided &= ~near_of_cell
    return multiples, whole


def _tidy(rows: sp.csr_matrix) -> sp.csr_matrix:
    tidy = sp.csr_matrix(rows, dtype=np.float64, copy=True)
    tidy.sum_duplicates()
    tidy.eliminate_zeros()
    return tidy
