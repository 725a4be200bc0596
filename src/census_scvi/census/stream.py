"""Counts and obs of chosen cells, some at a time, in memory that does not grow with the number of cells."""

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

from census_scvi.census.open import Census, reading
from census_scvi.census.schema import X_TILE
from census_scvi.files.readahead import read_ahead


@dataclass(frozen=True)
class Block:
    """Some consecutive cells of a selection.

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
        int64 (genes,): the genes, in the order of the wanted columns; -1 gives a column of zeros.
    blocks
        Position of the first cell, and of that after the last, of each block to read; see `tile_runs`.
    """
    matrix = census.experiment.ms["RNA"].X["raw"]
    # All genes are read and selected here: asking TileDB for 8,000 of 60,000 genes takes almost twice as long.
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
    """Read obs of groups of cells: each group, and a row for each of its cells.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    groups
        int64 positions in `joinids`, ascending in each group. Large groups: each costs some 30 ms.
    columns
        Columns to read in addition to soma_joinid; None: all.
    """

    def read(group: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], pd.DataFrame]:
        return group, _read_obs(census, joinids[group], columns)

    yield from read_ahead(read, groups, workers=1)


def tile_runs(joinids: npt.NDArray[np.int64], cells: int = 0) -> list[tuple[int, int]]:
    """Positions (first, after the last) of cells that are stored together in whole rows of tiles of X.

    A tile is decoded as a whole: reading the same number of cells across a tile boundary takes twice as long.

    Parameters
    ----------
    joinids
        int64 (cells,), ascending.
    cells
        Rows of tiles, 2,048 cells each, are joined to runs of no more cells than this; a single one may have more.
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
    """Blocks of `size` cells from `first` to `last`."""
    return [(start, min(start + size, last)) for start in range(first, last, size)]


def stream_nonzeros(
    census: Census, joinids: npt.NDArray[np.int64], labels: npt.NDArray[np.int32]
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Non-zero raw counts of cells, all genes: label of the cell, soma_joinid of the gene, count.

    In no order within a block, which is why it costs half of what `stream_blocks` does. Counts of cells between the
    wanted ones come as well, labelled -1: taking them out here would copy everything.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    labels
        int32 (cells,): 0 or more, whatever the consumer wants to know of the cell.
    """
    matrix = census.experiment.ms["RNA"].X["raw"]

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
    """Label of each id that was found, from those of the wanted ones, ascending; -1 where it is not wanted."""
    if isinstance(_coordinates(joinids), slice):
        label_at = np.full(joinids[-1] - joinids[0] + 1, -1, np.int32)
        label_at[joinids - joinids[0]] = labels
        return _look_up(found, joinids[0], label_at)
    return labels[np.searchsorted(joinids, found)]


def _coordinates(joinids: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """One range where most of its ids are wanted; the others are dropped."""
    if joinids[-1] - joinids[0] < 2 * len(joinids):
        return slice(int(joinids[0]), int(joinids[-1]))
    return joinids


def _read_obs(census: Census, joinids: npt.NDArray[np.int64], columns: list[str] | None) -> pd.DataFrame:
    names = None if columns is None else list(dict.fromkeys(["soma_joinid", *columns]))
    table = census.experiment.obs
    with reading(table.uri):
        obs = table.read(coords=(_coordinates(joinids),), column_names=names).concat().to_pandas()
    if not np.array_equal(obs["soma_joinid"].to_numpy(), joinids):  # more than was asked for, or in another order
        obs = obs.set_index("soma_joinid", drop=False).loc[joinids].reset_index(drop=True)
    return obs


def _tables(matrix: Any, joinids: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """Non-zeros of cells, and of some between them; UserError where the matrix is damaged."""
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
    if in_order:  # as written in tiles, genes ascending
        counts.has_canonical_format = True
    else:
        counts.sum_duplicates()  # sorts as well
    return counts


@numba.njit(nogil=True, cache=True)
def _look_up(ids, first, label_at):  # type: ignore[no-untyped-def]
    labels = np.empty(len(ids), label_at.dtype)
    for i in range(len(ids)):
        labels[i] = label_at[ids[i] - first]
    return labels


@numba.njit(nogil=True, cache=True)
def _select(rows, genes, values, columns, row_ends):  # type: ignore[no-untyped-def]
    """Non-zeros of wanted rows and genes: row, column and value of each; their number is added behind each row.

    Each is written, and the next one over it where it was not wanted: a branch would be mispredicted all the time.
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
def _place(rows, genes, values, filled, row_starts, indices, data):  # type: ignore[no-untyped-def]
    """Put non-zeros behind those of their row that are there; whether they were in ascending order."""
    in_order = True
    for i in range(len(rows)):
        row, gene = rows[i], genes[i]
        place = filled[row]
        if place > row_starts[row] and indices[place - 1] >= gene:
            in_order = False
        indices[place], data[place] = gene, values[i]
        filled[row] = place + 1
    return in_order
