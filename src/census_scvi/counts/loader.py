"""From the prepared file to minibatches for scVI, read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from census_scvi.counts.minibatch import DenseMinibatches, Minibatch, SparseCounts, sparse_minibatch
from census_scvi.counts.order import CellOrder, Window, minibatch_sizes
from census_scvi.counts.reader import PreparedCells, Rows
from census_scvi.files.readahead import read_ahead


class MinibatchLoader:
    """An epoch of minibatches, as an iterable that Lightning takes for a dataloader.

    `state_dict` says how far the current pass is; after `load_state_dict` the next pass begins there, without reading
    what lies before.

    Each minibatch is `{"X": float32 (cells, genes), "batch": int64 (cells, 1), "labels": int64 (cells, 1), "row":
    int64 (cells,)}` on the CPU; `row` is the cell's row in the prepared file. Sparse ones have a `SparseCounts` as X.

    Parameters
    ----------
    cells
        The prepared file.
    order
        Which cells, in which order.
    batch_size
        Cells per minibatch.
    workers
        Threads that read and decode ahead; 0 reads between minibatches.
    epoch
        Asked at the start of each pass for the epoch, which decides the order.
    device
        Asked at the start of each pass where the minibatches go: to a GPU they go sparse, in pinned memory.
    sparse
        Asked likewise whether they are to be sparse on the CPU too.
    dense
        Creates the dense ones and takes them back; None: each is allocated separately.
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
    ) -> None:
        self._cells = cells
        self._order = order
        self._workers = workers
        self._epoch = epoch
        self._device = device
        self._sparse = sparse
        n_wanted = int(order.wanted.sum())
        self._sizes = minibatch_sizes(n_wanted, batch_size, order.world_size, order.rank)
        self._dense = dense or DenseMinibatches(cells.n_genes)
        self._met = 0  # minibatches of the current pass
        self._skip = 0  # minibatches that the next pass skips

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Minibatch]:
        device = self._device()
        sparse = self._sparse() or device.type != "cpu"
        self._met, self._skip = self._skip, 0
        sizes = self._sizes[self._met :]
        order = self._order.windows(self._epoch(), skip=sum(self._sizes[: self._met]))
        with ThreadPoolExecutor(max(self._workers, 1), thread_name_prefix="decode") as pool:
            windows = read_ahead(self._reader(pool), order, workers=min(self._workers, 1))
            for parts in _cut(windows, sizes):
                self._met += 1
                if sparse:
                    yield sparse_minibatch(parts, self._cells.n_genes, pin=device.type == "cuda")
                else:
                    yield self._dense.make(parts)

    def _reader(self, pool: ThreadPoolExecutor) -> Callable[[Window], Rows]:
        threads = pool if self._workers > 1 else None
        return lambda window: self._cells.read(window.blocks, threads, max(self._workers, 1)).take(window.chosen)

    def state_dict(self) -> dict[str, int]:
        """Number of minibatches of the current pass that were read."""
        return {"minibatches": self._met}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass begin after as many minibatches."""
        self._skip = state["minibatches"]


class KeptMinibatches:
    """The same minibatches in each pass: small sparse ones are decoded once, in the first complete pass.

    Parameters
    ----------
    loader
        Gives the same minibatches in each pass.
    most
        Bytes that may be kept; of more, nothing is.
    """

    def __init__(self, loader: MinibatchLoader, most: int = 64_000_000) -> None:
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
            yield minibatch
        self._kept = met  # nothing if there was more than may be kept


def _cut(windows: Iterator[Rows], sizes: Iterable[int]) -> Iterator[list[Rows]]:
    """The windows' cells in portions of a minibatch, each from one window or more."""
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
        del window  # or it would stay in memory while the next but one is made
