"""Counts of cells in memory or in files, read in blocks of rows, and minibatches of them as sparse tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from census_scvi.annotation.scnym.network import TOTAL
from census_scvi.counts.minibatch import SparseCounts
from census_scvi.counts.order import CellOrder
from census_scvi.counts.raw_counts import Matrix

_BLOCK = 4096  # cells that are read at once where no order is needed

Blocks = list[tuple[int, int]]


class CellSource(Protocol):
    """Counts of cells, cells x genes.

    Only their ratios within a cell matter, so that counts per million do as well.
    """

    shape: tuple[int, int]

    def read(self, blocks: Blocks) -> sp.csr_matrix:
        """Counts of the rows of some blocks (first row, row after the last), which are in ascending order."""
        ...


class InMemory:
    """Counts of cells in memory: CSR (cells, genes)."""

    def __init__(self, counts: sp.csr_matrix) -> None:
        self.shape = (int(counts.shape[0]), int(counts.shape[1]))
        self._counts = sp.csr_matrix(counts)

    def read(self, blocks: Blocks) -> sp.csr_matrix:
        """Counts of the rows of some blocks."""
        return self._counts[np.concatenate([np.arange(start, stop) for start, stop in blocks])]


class InFile:
    """Counts of cells in a file, read when they are needed."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix, self.shape = matrix, matrix.shape

    def read(self, blocks: Blocks) -> sp.csr_matrix:
        """Counts of the rows of some blocks."""
        return sp.vstack([counts for _, counts in self._matrix.sample(_joined(blocks))], format="csr")


class Selected:
    """A source with other columns: `selection` is CSR (its columns, genes) of 0 and 1."""

    def __init__(self, source: CellSource, selection: sp.csr_matrix) -> None:
        self._source, self._selection = source, selection
        self.shape = (source.shape[0], int(selection.shape[1]))

    def read(self, blocks: Blocks) -> sp.csr_matrix:
        """Counts of the rows of some blocks."""
        return sp.csr_matrix(self._source.read(blocks) @ self._selection)


def _joined(blocks: Blocks) -> Blocks:
    """The same rows in fewer blocks: neighbours are read together."""
    joined = [blocks[0]]
    for start, stop in blocks[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


class Stacked:
    """Several sources with the same genes, one after another: for example a reference and a query."""

    def __init__(self, sources: Sequence[CellSource]) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *(source.shape[0] for source in sources)])
        self.shape = (int(self._starts[-1]), sources[0].shape[1])

    def read(self, blocks: Blocks) -> sp.csr_matrix:
        """Counts of the rows of some blocks."""
        parts = []
        for source, start, stop in zip(self._sources, self._starts, self._starts[1:], strict=False):
            within = [(max(first, start) - start, min(last, stop) - start) for first, last in blocks]
            within = [(int(first), int(last)) for first, last in within if first < last]
            if within:
                parts.append(source.read(within))
        return sp.vstack(parts, format="csr")


@dataclass(frozen=True)
class Overview:
    """What one pass over all cells finds.

    Attributes
    ----------
    filled
        bool (cells,): cells with counts.
    profile
        float64 (genes,): mean over the filled, wanted cells of each gene's share of a cell's counts.
    """

    filled: npt.NDArray[np.bool_]
    profile: npt.NDArray[np.float64]


def overview(source: CellSource, wanted: npt.NDArray[np.bool_]) -> Overview:
    """Find the cells without counts, and the mean profile of the wanted cells; reads every cell once."""
    n_cells, n_genes = source.shape
    filled, sums, number = np.zeros(n_cells, bool), np.zeros(n_genes), 0
    for start in range(0, n_cells, _BLOCK):
        stop = min(start + _BLOCK, n_cells)
        counts = source.read([(start, stop)])
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        filled[start:stop] = totals > 0
        used = np.flatnonzero(filled[start:stop] & wanted[start:stop])
        shares = sp.diags(1 / totals[used]) @ counts[used]
        sums += np.asarray(shares.sum(axis=0)).ravel()
        number += len(used)
    return Overview(filled, sums / max(number, 1))


def to_tensor(counts: sp.csr_matrix) -> SparseCounts:
    """Sparse counts, (cells, genes), for a device."""
    counts = sp.csr_matrix(counts, dtype=np.float32)
    return SparseCounts(
        torch.from_numpy(np.diff(counts.indptr).astype(np.int64)),
        torch.from_numpy(counts.indices.astype(np.int32)),
        torch.from_numpy(counts.data),
        counts.shape[1],
    )


def log_cpm(counts: SparseCounts) -> torch.Tensor:
    """log(1 + counts per million), float32 (cells, genes); a cell without counts stays 0."""
    sums = counts.library_size()
    scale = torch.where(sums > 0, TOTAL / sums, 0.0)
    values = (counts.counts * scale[counts.cells()]).log1p()
    return SparseCounts(counts.n_detected, counts.genes, values, counts.n_genes).dense()


def drop(counts: SparseCounts, share: float) -> SparseCounts:
    """Counts of which a random share is set to 0."""
    kept = torch.rand(len(counts.counts), device=counts.counts.device) >= share
    return SparseCounts(counts.n_detected, counts.genes, counts.counts * kept, counts.n_genes)


def in_order(
    source: CellSource, wanted: npt.NDArray[np.bool_], seed: int | None, epoch: int = 0
) -> Iterator[tuple[npt.NDArray[np.int64], sp.csr_matrix]]:
    """Yield all wanted cells once, in windows of limited size: their rows and counts.

    Parameters
    ----------
    wanted
        bool (cells,).
    seed
        Seed of the order, which differs between epochs; None: the order of the source.
    """
    for window in CellOrder(wanted, seed).windows(epoch):
        rows = np.concatenate([np.arange(start, stop) for start, stop in window.blocks])[window.chosen]
        blocks = sorted(window.blocks)
        read = np.concatenate([np.arange(start, stop) for start, stop in blocks])
        yield rows, source.read(blocks)[np.searchsorted(read, rows)]


def regrouped(
    parts: Iterable[tuple[npt.NDArray[np.int64], sp.csr_matrix]], sizes: Iterable[int]
) -> Iterator[tuple[npt.NDArray[np.int64], sp.csr_matrix]]:
    """Yield the cells of `parts` in groups of the given sizes, until the sizes end."""
    remaining = iter(parts)
    rows, counts, done = np.zeros(0, np.int64), None, 0
    for size in sizes:
        while counts is None or len(rows) - done < size:
            more = next(remaining)
            rows = np.concatenate([rows[done:], more[0]])
            counts = more[1] if counts is None else sp.vstack([counts[done:], more[1]], format="csr")
            done = 0
        yield rows[done : done + size], counts[done : done + size]
        done += size
