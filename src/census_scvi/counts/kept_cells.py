"""Cells of a prepared file that are kept in memory: all of them, or a few that are used again and again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.counts.order import CellOrder, Window
from census_scvi.counts.reader import PreparedCells, Rows

# Cells are kept if fewer than one of this number of cells is used; of more, a pass uses most of what it decodes.
_ONE_OF = 4
# Most bytes that are kept.
_MOST = 512_000_000


class KeptCells:
    """Some cells in memory: 4 bytes per non-zero (8 where counts exceed 65,535), and 4 per protein.

    Parameters
    ----------
    cells
        The prepared file.
    wanted
        Bool (cells,): the cells to keep.
    """

    def __init__(self, cells: PreparedCells, wanted: npt.NDArray[np.bool_]) -> None:
        read = (cells.read(window.blocks).take(window.chosen) for window in CellOrder(wanted, None).windows(0))
        self._kept = _joined([_compact(rows) for rows in read])

    def take(self, window: Window) -> Rows:
        """The cells of a window, in its order; all must be kept."""
        return self._kept.take(np.searchsorted(self._kept.rows, window.rows))


# Rows that a thread decodes at a time, of all cells.
_BLOCK = 4096
# Of a cell, its row, batch, label, and the positions of its counts.
_BYTES_A_ROW = 40


class EveryCell:
    """All cells of a file in memory, decoded once: 4 bytes per non-zero (6 where counts exceed 65,535).

    Parameters
    ----------
    cells
        The prepared file.
    threads
        Number of threads that decode.
    """

    def __init__(self, cells: PreparedCells, threads: int) -> None:
        blocks = [(start, min(start + _BLOCK, cells.n_cells)) for start in range(0, cells.n_cells, _BLOCK)]
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode") as pool:
            self._rows = cells.read(blocks, pool, max(threads, 1))

    def take(self, window: Window) -> Rows:
        """The cells of a window, in its order."""
        return self._rows.take(window.rows)


def bytes_in_memory(cells: PreparedCells, n_cells: int | None = None) -> float:
    """Memory of `EveryCell`, for this number of cells like those of the file; None: its own number."""
    per_cell = 4 * (cells.density * cells.n_genes + len(cells.proteins)) + _BYTES_A_ROW
    return per_cell * (cells.n_cells if n_cells is None else n_cells)


def worth_keeping(cells: PreparedCells, wanted: npt.NDArray[np.bool_]) -> bool:
    """Whether to keep cells: they are a small share of the file, and small enough."""
    n_wanted = int(wanted.sum())
    n_bytes = 4 * n_wanted * (cells.density * cells.n_genes + len(cells.proteins))
    return n_wanted * _ONE_OF < len(wanted) and n_bytes <= _MOST


def _compact(rows: Rows) -> Rows:
    """A copy without the counts of other cells."""
    sizes = rows.last - rows.first
    ends = np.cumsum(sizes)
    places = np.repeat(rows.first - (ends - sizes), sizes) + np.arange(sizes.sum())
    return replace(rows, first=ends - sizes, last=ends, genes=rows.genes[places], counts=rows.counts[places])


def _joined(parts: list[Rows]) -> Rows:
    """Compact parts one after another."""
    starts = np.concatenate([[0], np.cumsum([len(part.genes) for part in parts])])
    moved = [
        replace(part, first=part.first + start, last=part.last + start)
        for part, start in zip(parts, starts[:-1], strict=True)
    ]
    values = {field.name: [getattr(part, field.name) for part in moved] for field in fields(Rows)}
    joined: dict[str, Any] = {name: None if each[0] is None else np.concatenate(each) for name, each in values.items()}
    return Rows(**joined)
