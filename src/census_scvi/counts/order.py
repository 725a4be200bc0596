"""Training cells, validation cells, and their order: a function of seed, epoch and rank only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from census_scvi.config.random_streams import Stream, draw, generator

# Consecutive rows that are read at once; prepare has shuffled them (see `file_order`). Reading single rows would take a
# hundred times longer.
BLOCK_ROWS = 256
# Rows of blocks that are read and shuffled together. The blocks are drawn from the whole file, so that a window is a
# sample of it.
WINDOW_ROWS = 16384
# With at least this number of cells, whole blocks are held out for validation.
MANY_CELLS = 2**20


def validation_mask(n_cells: int, train_size: float, seed: int) -> npt.NDArray[np.bool_]:
    """Bool (cells,): cells held out for validation; `ceil(train_size * n_cells)` cells remain for training.

    With at least 2^20 cells, whole blocks are held out, so that neither training nor validation decodes unused cells.
    """
    n_validation = n_cells - math.ceil(train_size * n_cells)
    rows = BLOCK_ROWS if n_cells >= MANY_CELLS else 1
    blocks = generator(seed, Stream.VALIDATION_CELLS).permutation(-(-n_cells // rows))
    sizes = np.minimum(rows, n_cells - blocks * rows)
    whole = int(np.searchsorted(np.cumsum(sizes), n_validation, side="right"))
    held_out = np.zeros(len(blocks), dtype=bool)
    held_out[blocks[:whole]] = True
    mask = np.repeat(held_out, rows)[:n_cells]
    if whole < len(blocks):
        start = blocks[whole] * rows
        mask[start : start + n_validation - int(mask.sum())] = True
    return mask


def training_mask(validation: npt.NDArray[np.bool_], max_cells: int | None, seed: int) -> npt.NDArray[np.bool_]:
    """Bool (cells,): cells to train on: those that are not for validation, or `max_cells` of them, drawn at random."""
    mask = ~validation
    if max_cells is not None:
        rows = np.flatnonzero(mask)
        mask[:] = False
        mask[rows[draw(len(rows), max_cells, generator(seed, Stream.TRAINING_CELLS))]] = True
    return mask


@dataclass(frozen=True)
class Window:
    """Blocks that are read together, and those of their cells that are used, in order.

    Attributes
    ----------
    blocks
        First row, and row after the last, of each block.
    chosen
        int64 (cells,): cells to use, as positions among the rows of all blocks.
    """

    blocks: list[tuple[int, int]]
    chosen: npt.NDArray[np.int64]

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """int64 (cells,): rows of the file of the cells to use, in order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.blocks])[self.chosen]


@dataclass(frozen=True)
class CellOrder:
    """The order in which the wanted cells of a file are read.

    Parameters
    ----------
    wanted
        Bool (cells,): the cells to read.
    seed
        Seed of the order; None: the order of the file.
    rank, world_size
        Number of this process, and number of processes; their shares of the cells differ by at most one cell.
    """

    wanted: npt.NDArray[np.bool_]
    seed: int | None
    rank: int = 0
    world_size: int = 1

    def share(self) -> tuple[int, int]:
        """First place of this rank's share, and the place after its last, in the common order of an epoch."""
        total = int(self.wanted.sum())
        return self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size

    def windows(self, epoch: int, skip: int = 0) -> Iterator[Window]:
        """Yield the windows to read for an epoch, in order: each cell of this rank's share exactly once.

        The first `skip` cells are omitted, to resume in the middle of an epoch.
        """
        for window in self._windows(epoch):
            if skip < len(window.chosen):
                yield replace(window, chosen=window.chosen[skip:])
            skip = max(skip - len(window.chosen), 0)

    def _windows(self, epoch: int) -> Iterator[Window]:
        numbers = None if self.seed is None else generator(self.seed, Stream.CELLS_OF_EPOCH, epoch, self.rank)
        blocks = list[tuple[int, int]]()
        chosen = list[npt.NDArray[np.int64]]()
        n_rows = 0
        for start, stop, cells in self._blocks(epoch):
            blocks.append((start, stop))
            chosen.append(cells + n_rows)
            n_rows += stop - start
            if n_rows >= WINDOW_ROWS:
                yield _window(blocks, chosen, numbers)
                blocks, chosen, n_rows = [], [], 0
        if blocks:
            yield _window(blocks, chosen, numbers)

    def _blocks(self, epoch: int) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Yield the blocks of this rank's share in the order of the epoch: first row, row after the last, its cells."""
        starts = np.arange(0, len(self.wanted), BLOCK_ROWS)
        sizes = np.add.reduceat(self.wanted, starts, dtype=np.int64)
        blocks = np.arange(len(starts))
        if self.seed is not None:  # the same permutation on every rank: the shares are parts of one common order
            blocks = generator(self.seed, Stream.BLOCKS_OF_EPOCH, epoch).permutation(blocks)
        ends = np.cumsum(sizes[blocks])
        low, high = self.share()
        for block, end in zip(blocks, ends, strict=True):
            begin = end - sizes[block]
            first, last = max(low, begin), min(high, end)
            if first < last:
                start = int(starts[block])
                stop = min(start + BLOCK_ROWS, len(self.wanted))
                yield start, stop, np.flatnonzero(self.wanted[start:stop])[first - begin : last - begin]


def _window(
    blocks: list[tuple[int, int]], chosen: list[npt.NDArray[np.int64]], numbers: np.random.Generator | None
) -> Window:
    cells = np.concatenate(chosen)
    return Window(blocks, cells if numbers is None else numbers.permutation(cells))


def minibatch_sizes(n_cells: int, batch_size: int, world_size: int = 1, rank: int = 0) -> list[int]:
    """Number of cells in each minibatch of a rank.

    Every rank has the same number of minibatches, and no cell is dropped. If a single cell would remain, it joins the
    last minibatch, because BatchNorm cannot normalise a single cell.
    """
    mine = (rank + 1) * n_cells // world_size - rank * n_cells // world_size
    least = n_cells // world_size
    full, tail = divmod(least, batch_size)
    count = max(full + (tail > 1), 1)
    return [batch_size] * (count - 1) + [mine - batch_size * (count - 1)]
