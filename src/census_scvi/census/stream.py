"""Stream counts and obs of selected cells in blocks; the memory does not grow with the number of cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from census_scvi.census.open import MEASUREMENT, Census, reading
from census_scvi.census.schema import X_TILE
from census_scvi.files.readahead import read_ahead


@dataclass(frozen=True)
class Block:
    """Counts of consecutive cells of a selection.

    Attributes
    ----------
    start
        Position of the first cell in the selection.
    counts
        CSR float32 (cells, genes), indices sorted, int32.
    """

    start: int
    counts: sp.csr_matrix


def stream_blocks(
    census: Census,
    joinids: npt.NDArray[np.int64],
    gene_joinids: npt.NDArray[np.int64],
    *,
    blocks: Iterable[tuple[int, int]],
) -> Iterator[Block]:
    """Read raw counts of cells in blocks.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending: the cells.
    gene_joinids
        int64 (genes,): the genes, in the order of the columns; -1 gives a column of zeros.
    blocks
        Positions in `joinids` of each block to read: first cell, and after the last cell; see `tile_runs`.
    """
    matrix = census.experiment.ms["RNA"].X["raw"]
    # All genes are read, and the genes are selected here: a TileDB query for 8,000 of 60,000 genes takes almost twice
    # as long.
    columns = np.full(matrix.shape[1], -1, dtype=np.int32)
    present = np.flatnonzero(gene_joinids >= 0)
    columns[gene_joinids[present]] = present

    def read(bounds: tuple[int, int]) -> Block:
        return Block(bounds[0], _read_counts(matrix, joinids[slice(*bounds)], columns, len(gene_joinids)))

    yield from read_ahead(read, blocks, workers=1)


def stream_obs(
    census: Census,
    joinids: npt.NDArray[np.int64],
    groups: Iterable[npt.NDArray[np.int64]],
    columns: list[str] | None = None,
) -> Iterator[tuple[npt.NDArray[np.int64], pd.DataFrame]]:
    """Read obs of groups of cells; yields each group, and a frame with one row per cell of the group.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    groups
        int64 positions in `joinids`, ascending in each group. Use large groups, because each one takes about 30 ms.
    columns
        Columns to read in addition to soma_joinid; None: all columns.
    """

    def read(group: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], pd.DataFrame]:
        return group, _read_obs(census, joinids[group], columns)

    yield from read_ahead(read, groups, workers=1)


def tile_runs(joinids: npt.NDArray[np.int64], cells: int = 0) -> list[tuple[int, int]]:
    """Positions (first, after the last) of cells that are stored in the same complete rows of tiles of X.

    A tile is always decoded completely. Reading the same number of cells across a tile boundary takes twice as long.

    Parameters
    ----------
    joinids
        int64 (cells,), ascending; at least one cell.
    cells
        Rows of tiles (2,048 cells each) are joined to runs of at most this number of cells. A run of a single row of
        tiles may have more.
    """
    borders = np.arange(joinids[0] // X_TILE + 1, joinids[-1] // X_TILE + 1) * X_TILE
    ends = np.unique([*np.searchsorted(joinids, borders), len(joinids)])
    bounds = [0]
    while bounds[-1] < len(joinids):
        furthest = np.searchsorted(ends, bounds[-1] + max(cells, 1), side="right") - 1
        next_end = np.searchsorted(ends, bounds[-1], side="right")
        bounds.append(int(ends[max(furthest, next_end)]))
    return list(itertools.pairwise(bounds))


def consecutive(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Blocks (first, after the last) of `size` cells from `first` up to and excluding `last`."""
    return [(start, min(start + size, last)) for start in range(first, last, size)]


def stream_nonzeros(
    census: Census, joinids: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], *, measurement: str = MEASUREMENT
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Stream the non-zero raw counts of cells, all genes: label of the cell, soma_joinid of the gene, count.

    Counts within a block are not sorted, which takes half the time of `stream_blocks`. Counts of cells between the
    requested ones are included with the label -1, because removing them here would copy all data.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    labels
        int32 (cells,): label of each cell, 0 or more, for example its batch code.
    measurement
        Measurement with the counts.
    """
    matrix = census.experiment.ms[measurement].X["raw"]

    def read(run: tuple[int, int]) -> list[pa.Table]:
        return list(_tables(matrix, joinids[slice(*run)]))

    runs = tile_runs(joinids, 2 * X_TILE)
    for run, tables in zip(runs, read_ahead(read, runs, workers=1), strict=True):
        for table in tables:
            of_cells = _labels(joinids[slice(*run)], labels[slice(*run)], table["soma_dim_0"].to_numpy())
            yield of_cells, table["soma_dim_1"].to_numpy(), table["soma_data"].to_numpy()


def _labels(
    joinids: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], found: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Label of each id in `found`, from the labels of the requested ids (ascending); -1 if it was not requested."""
    if isinstance(_coordinates(joinids), slice):
        label_at = np.full(joinids[-1] - joinids[0] + 1, -1, np.int32)
        label_at[joinids - joinids[0]] = labels
        return _look_up(found, joinids[0], label_at)
    return labels[np.searchsorted(joinids, found)]


def _coordinates(joinids: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """Coordinates to read: one range if at least half of its ids are requested (the reader drops the others)."""
    if joinids[-1] - joinids[0] < 2 * len(joinids):
        return slice(int(joinids[0]), int(joinids[-1]))
    return joinids


def _read_obs(census: Census, joinids: npt.NDArray[np.int64], columns: list[str] | None) -> pd.DataFrame:
    names = None if columns is None else list(dict.fromkeys(["soma_joinid", *columns]))
    table = census.experiment.obs
    with reading(table.uri):
        obs = table.read(coords=(_coordinates(joinids),), column_names=names).concat().to_pandas()
    if not np.array_equal(obs["soma_joinid"].to_numpy(), joinids):  # more rows than requested, or another order
        obs = obs.set_index("soma_joinid", drop=False).loc[joinids].reset_index(drop=True)
    return obs


def _tables(matrix: Any, joinids: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """Non-zeros of cells, and possibly of cells between them; UserError if the matrix cannot be read."""
    with reading(matrix.uri):
        yield from matrix.read(coords=(_coordinates(joinids),)).tables()


def _read_counts(
    matrix: Any, joinids: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], n_genes: int
) -> sp.csr_matrix:
    places = np.arange(len(joinids), dtype=np.int32)
    row_ends = np.zeros(len(joinids) + 1, np.int64)
    found = []
    for table in _tables(matrix, joinids):
        rows = _labels(joinids, places, table["soma_dim_0"].to_numpy())
        found.append(_select(rows, table["soma_dim_1"].to_numpy(), table["soma_data"].to_numpy(), columns, row_ends))
    np.cumsum(row_ends, out=row_ends)
    indices, data = np.empty(row_ends[-1], np.int32), np.empty(row_ends[-1], np.float32)
    filled = row_ends[:-1].copy()
    in_order = True
    for rows, genes, values in found:
        in_order &= _place(rows, genes, values, filled, row_ends, indices, data)
    counts = sp.csr_matrix((data, indices, row_ends.astype(np.int32)), shape=(len(joinids), n_genes))
    if in_order:  # genes ascend, as the tiles are written
        counts.has_canonical_format = True
    else:
        counts.sum_duplicates()  # also sorts the indices
    return counts


@numba.njit(nogil=True, cache=True)
def _look_up(ids, first, label_at):  # type: ignore[no-untyped-def]  # numba infers the types
    labels = np.empty(len(ids), label_at.dtype)
    for i in range(len(ids)):
        labels[i] = label_at[ids[i] - first]
    return labels


@numba.njit(nogil=True, cache=True)
def _select(rows, genes, values, columns, row_ends):  # type: ignore[no-untyped-def]  # numba infers the types
    """Row, column and value of the non-zeros of requested rows and genes; adds their number to `row_ends[row + 1]`.

    Every non-zero is written, and the next one overwrites it if it was not requested. This avoids a branch that would
    often be mispredicted.
    """
    n = 0
    of_rows = np.empty(len(rows) + 1, np.int32)
    of_columns = np.empty(len(rows) + 1, np.int32)
    selected = np.empty(len(rows) + 1, values.dtype)
    for i in range(len(rows)):
        row, column = rows[i], columns[genes[i]]
        of_rows[n], of_columns[n], selected[n] = row, column, values[i]
        wanted = (row >= 0) & (column >= 0)
        row_ends[row + 1] += wanted
        n += wanted
    return of_rows[:n].copy(), of_columns[:n].copy(), selected[:n].copy()


@numba.njit(nogil=True, cache=True)
def _place(rows, genes, values, filled, row_starts, indices, data):  # type: ignore[no-untyped-def]  # numba infers the types
    """Append non-zeros to those already stored in their row; returns whether the genes of each row ascend."""
    in_order = True
    for i in range(len(rows)):
        row, gene = rows[i], genes[i]
        place = filled[row]
        if place > row_starts[row] and indices[place - 1] >= gene:
            in_order = False
        indices[place], data[place] = gene, values[i]
        filled[row] = place + 1
    return in_order
