"""Load minibatches for scVI from the prepared file, and read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from census_scvi.counts.kept_cells import EveryCell, KeptCells
from census_scvi.counts.minibatch import LABELLED, DenseMinibatches, Minibatch, SparseCounts, sparse_minibatch
from census_scvi.counts.order import CellOrder, Window, minibatch_sizes
from census_scvi.counts.reader import PreparedCells, Rows
from census_scvi.files.readahead import read_ahead


class MinibatchLoader:
    """An epoch of minibatches, as an iterable that Lightning accepts as a dataloader.

    `state_dict` contains the position of the current pass. After `load_state_dict`, the next pass starts at that
    position, without reading the minibatches before it.

    Each minibatch is `{"X": float32 (cells, genes), "batch": int64 (cells, 1), "labels": int64 (cells, 1), "row":
    int64 (cells,)}` on the CPU; `row` is the row of the cell in the prepared file. X of a sparse minibatch is a
    `SparseCounts`. If proteins are read, it also has `"proteins": float32 (cells, proteins)`; if labels are not read,
    they are 0.

    Parameters
    ----------
    cells
        The prepared file.
    order
        Cells to read, and their order.
    batch_size
        Cells per minibatch.
    workers
        Number of threads that read and decode ahead; 0 reads between minibatches.
    epoch
        Called at the start of each pass; returns the epoch, which determines the order.
    device
        Called at the start of each pass; returns the device of the model. For a GPU, minibatches are sparse and in
        pinned memory.
    sparse
        Called at the start of each pass; returns whether minibatches are sparse on the CPU, too.
    dense
        Creates and reuses dense minibatches; None: the loader has its own `DenseMinibatches`.
    kept
        Called at the start of each pass; returns cells in memory, all those of `order` among them, or None: they are
        read from the file.
    """

    def __init__(
        self,
        cells: PreparedCells,
        order: CellOrder,
        batch_size: int,
        workers: int,
        epoch: Callable[[], int],
        device: Callable[[], torch.device] = lambda: torch.device("cpu"),
        sparse: Callable[[], bool] = lambda: False,
        dense: DenseMinibatches | None = None,
        kept: Callable[[], KeptCells | EveryCell | None] = lambda: None,
    ) -> None:
        self._kept = kept
        self._cells = cells
        self._order = order
        self._workers = workers
        self._epoch = epoch
        self._device = device
        self._sparse = sparse
        n_wanted = int(order.wanted.sum())
        self._sizes = minibatch_sizes(n_wanted, batch_size, order.world_size, order.rank)
        self._dense = dense or DenseMinibatches(cells.n_genes)
        self._met = 0  # number of minibatches that the current pass has yielded or skipped
        self._skip = 0  # number of minibatches that the next pass skips

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Minibatch]:
        device = self._device()
        sparse = self._sparse() or device.type != "cpu"
        self._met, self._skip = self._skip, 0
        sizes = self._sizes[self._met :]
        order = self._order.windows(self._epoch(), skip=sum(self._sizes[: self._met]))
        with ThreadPoolExecutor(max(self._workers, 1), thread_name_prefix="decode") as pool:
            kept = self._kept()
            windows = read_ahead(self._reader(pool, kept), order, workers=min(self._workers, 1))
            make = self._dense.make
            if sparse:
                make = partial(sparse_minibatch, n_genes=self._cells.n_genes, pin=device.type == "cuda")
            for minibatch in read_ahead(make, _cut(windows, sizes), workers=self._makers(kept, sparse=sparse)):
                self._met += 1
                yield minibatch

    def _makers(self, kept: KeptCells | EveryCell | None, *, sparse: bool) -> int:
        """Threads that make minibatches; one for four that decode. None for dense minibatches, which reuse memory."""
        if not sparse:
            return 0
        return self._workers if kept else -(-self._workers // 4)

    def _reader(self, pool: ThreadPoolExecutor, kept: KeptCells | EveryCell | None) -> Callable[[Window], Rows]:
        if kept:
            return kept.take
        threads = pool if self._workers > 1 else None
        return lambda window: self._cells.read(window.blocks, threads, max(self._workers, 1)).take(window.chosen)

    @property
    def skipped(self) -> int:
        """Number of minibatches that the next pass skips."""
        return self._skip

    def state_dict(self) -> dict[str, int]:
        """Number of minibatches read in the current pass."""
        return {"minibatches": self._met}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass skip this number of minibatches."""
        self._skip = state["minibatches"]


class LabelledMinibatches:
    """Minibatches of cells, each with a minibatch of labelled cells, as scvi-tools trains SCANVI.

    The labelled cells are read in passes of their own, each in another order. The state is that of the minibatches of
    all cells.

    Parameters
    ----------
    every
        The minibatches of all cells.
    labelled
        Function that returns the minibatches of the labelled cells in the order of a pass, by its number.
    epoch
        Called at the start of each epoch; returns its number.
    sampled
        Whether each epoch has other labelled cells; its passes then end with it. Otherwise a pass continues in the
        next epoch.
    """

    def __init__(
        self,
        every: MinibatchLoader,
        labelled: Callable[[int], MinibatchLoader],
        epoch: Callable[[], int],
        *,
        sampled: bool = False,
    ) -> None:
        self._every, self._labelled, self._epoch, self._sampled = every, labelled, epoch, sampled

    def __len__(self) -> int:
        return len(self._every)

    def __iter__(self) -> Iterator[Minibatch]:
        before = self._epoch() * len(self)
        skipped = self._every.skipped
        labelled = self._endless(before, skipped) if self._sampled else self._endless(0, before + skipped)
        # Not strict: the passes over the labelled cells are endless.
        for minibatch, of_labelled in zip(self._every, labelled, strict=False):
            yield minibatch | {LABELLED: of_labelled}

    def _endless(self, number: int, skipped: int) -> Iterator[Minibatch]:
        """The minibatches of the labelled cells, pass after pass, `skipped` minibatches after the start of a pass."""
        passes, position = divmod(skipped, len(self._labelled(number)))
        number += passes
        while True:
            loader = self._labelled(number)
            loader.load_state_dict({"minibatches": position})
            yield from loader
            number, position = number + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Number of minibatches read in the current epoch."""
        return self._every.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch skip this number of minibatches."""
        self._every.load_state_dict(state)


# Bytes of validation minibatches that are kept in memory.
MOST_KEPT = 512_000_000


class KeptMinibatches:
    """Keeps sparse minibatches in memory after the first complete pass, if they are small enough.

    Parameters
    ----------
    loader
        Loader that yields the same minibatches in each pass.
    most
        Maximum number of bytes to keep; if all minibatches together are larger, none is kept. Below 2^20 cells, the
        validation cells are spread over the file, and all other cells would be decoded with them in each epoch.
    """

    def __init__(self, loader: MinibatchLoader, most: int = MOST_KEPT) -> None:
        self._loader = loader
        self._most = most
        self._kept: list[Minibatch] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Minibatch]:
        if self._kept:
            yield from self._kept
            return
        met, n_bytes = [], 0
        for minibatch in self._loader:
            counts = minibatch["X"]
            n_bytes += counts.nbytes if isinstance(counts, SparseCounts) else self._most + 1
            if n_bytes <= self._most:
                met.append(minibatch)
            else:
                met.clear()
            if len(met) == len(self):
                self._kept = met  # before the last one is yielded: Lightning does not ask for another
            yield minibatch


def _cut(windows: Iterator[Rows], sizes: Iterable[int]) -> Iterator[list[Rows]]:
    """Divide the cells of the windows into minibatches; a minibatch may consist of parts of several windows."""
    sizes = iter(sizes)
    parts: list[Rows] = []
    missing = next(sizes, 0)
    for window in windows:
        used = 0
        while used < len(window):
            taken = min(missing, len(window) - used)
            parts.append(window.take(slice(used, used + taken)))
            used, missing = used + taken, missing - taken
            if not missing:
                yield parts
                parts, missing = [], next(sizes, 0)
        del window  # else it would stay in memory while the window after the next is read
