"""From the prepared file to minibatches for scVI, read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import numpy as np
import numpy.typing as npt
import torch

from census_scvi.counts.order import CellOrder, Window, minibatch_sizes, validation_mask
from census_scvi.counts.reader import PreparedCells, Rows, concatenate
from census_scvi.errors import UserError
from census_scvi.readahead import read_ahead

Minibatch = dict[str, torch.Tensor]


class MinibatchLoader:
    """An epoch of minibatches, as an iterable that Lightning takes for a dataloader.

    Each minibatch is `{"X": float32 (cells, genes), "batch": int64 (cells, 1), "labels": int64 (cells, 1), "row":
    int64 (cells,)}`, dense, on the CPU; `row` is the cell's row in the prepared file.

    Parameters
    ----------
    cells
        The prepared file.
    order
        Which cells, in which order.
    batch_size
        Cells a minibatch.
    workers
        Windows read ahead.
    epoch
        Asked at the start of each pass for the epoch, which decides the order.
    """

    def __init__(
        self, cells: PreparedCells, order: CellOrder, batch_size: int, workers: int, epoch: Callable[[], int]
    ) -> None:
        self._cells = cells
        self._order = order
        self._workers = workers
        self._epoch = epoch
        n_wanted = int(order.wanted.sum())
        self._sizes = minibatch_sizes(n_wanted, batch_size, order.world_size, order.rank)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Minibatch]:
        windows = read_ahead(self._read, self._order.windows(self._epoch()), self._workers)
        window, used = next(windows), 0
        for size in self._sizes:
            parts: list[Rows] = []
            missing = size
            while missing:
                if used == len(window.rows):
                    window, used = next(windows), 0
                taken = min(missing, len(window.rows) - used)
                parts.append(_take(window, slice(used, used + taken)))
                used, missing = used + taken, missing - taken
            yield _minibatch(concatenate(parts))

    def _read(self, window: Window) -> Rows:
        parts = []
        for piece in window.pieces:
            rows = self._cells.read(piece.start, piece.stop)
            chosen = np.flatnonzero(self._order.wanted[piece.start : piece.stop])[piece.first : piece.last]
            parts.append(rows if len(chosen) == len(rows.rows) else _take(rows, chosen))
        return concatenate(parts, window.order)


def _take(rows: Rows, chosen: npt.NDArray[np.int64] | slice) -> Rows:
    return Rows(rows.rows[chosen], rows.counts[chosen], rows.batch_codes[chosen])


def _minibatch(rows: Rows) -> Minibatch:
    codes = torch.from_numpy(rows.batch_codes).unsqueeze(1)
    return {
        "X": torch.from_numpy(rows.counts.toarray()),
        "batch": codes,
        "labels": torch.zeros_like(codes),
        "row": torch.from_numpy(rows.rows),
    }


class PreparedDataModule(lightning.LightningDataModule):
    """Training and validation minibatches of a prepared file, for one process or for each rank of DDP.

    Parameters
    ----------
    path
        The .h5ad that prepare wrote.
    batch_size
        Cells a minibatch (and rank).
    train_size
        Share of cells trained on.
    seed
        Seed of the split and of the order.
    workers
        Windows read ahead.

    Raises
    ------
    UserError
        Too few cells for a minibatch of two on every rank.
    """

    def __init__(self, path: Path, *, batch_size: int, train_size: float, seed: int, workers: int) -> None:
        super().__init__()
        self.cells = PreparedCells(path)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._validation = validation_mask(self.cells.n_cells, train_size, seed)
        self.n_val = int(self._validation.sum())
        self.n_train = self.cells.n_cells - self.n_val

    def train_dataloader(self) -> MinibatchLoader:
        """Training cells, in another order each epoch."""
        rank, world_size = self._rank()
        if self.n_train < 2 * world_size:
            raise UserError(f"{self.n_train} training cells are too few for {world_size} processes; 2 each are needed")
        order = CellOrder(~self._validation, self._seed, rank, world_size)
        return MinibatchLoader(self.cells, order, self._batch_size, self._workers, epoch=self._epoch)

    def val_dataloader(self) -> MinibatchLoader | list[Minibatch]:
        """Validation cells, in the order of the file; nothing where all cells train."""
        rank, world_size = self._rank()
        if self.n_val < world_size:
            return []
        order = CellOrder(self._validation, None, rank, world_size)
        return MinibatchLoader(self.cells, order, self._batch_size, self._workers, epoch=lambda: 0)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
