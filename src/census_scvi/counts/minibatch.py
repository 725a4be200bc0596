"""Cells as tensors: dense in memory that is used again, or sparse until they are on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from census_scvi.counts.reader import Rows

Minibatch = dict[str, Any]


class SparseCounts:
    """Counts of the cells of a minibatch: their non-zeros, one cell after another; a tenth of a dense one's bytes.

    Parameters
    ----------
    n_detected
        int64 (cells,): non-zeros of each cell.
    genes
        uint16 or int32 (non-zeros,): their columns.
    counts
        uint16 or float32 (non-zeros,).
    n_genes
        Columns.
    """

    __slots__ = ("counts", "genes", "n_detected", "n_genes")

    def __init__(self, n_detected: torch.Tensor, genes: torch.Tensor, counts: torch.Tensor, n_genes: int) -> None:
        self.n_detected, self.genes, self.counts, self.n_genes = n_detected, genes, counts, n_genes

    def __len__(self) -> int:
        return len(self.n_detected)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.n_detected.nbytes + self.genes.nbytes + self.counts.nbytes

    def to(self, device: torch.device | str) -> SparseCounts:
        """The same on a device; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> SparseCounts:
        """The same in page-locked memory, from where a GPU copies on its own."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SparseCounts:
        return SparseCounts(change(self.n_detected), change(self.genes), change(self.counts), self.n_genes)

    def cells(self) -> torch.Tensor:
        """int64 (non-zeros,): the cell of each non-zero."""
        cells = torch.arange(len(self), device=self.n_detected.device)
        # output_size spares a GPU a stop to count the non-zeros.
        return torch.repeat_interleave(cells, self.n_detected, output_size=len(self.genes))

    def places(self) -> torch.Tensor:
        """int64 (non-zeros,): position of each non-zero in the dense matrix, row by row."""
        return self.cells() * self.n_genes + self.genes.long()

    def library_size(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(cells,): sum of each cell's counts."""
        return self.sum_of_cells(self.counts.to(dtype))

    def sum_of_cells(self, values: torch.Tensor) -> torch.Tensor:
        """(cells,): sum over each cell of values of its non-zeros, (non-zeros,)."""
        # unsafe: the lengths would be checked, for which a GPU has to stop.
        return torch.segment_reduce(values, "sum", lengths=self.n_detected, unsafe=True)

    def dense(self, dtype: torch.dtype = torch.float32, *, log1p: bool = False) -> torch.Tensor:
        """(cells, genes): the counts, or log(1 + counts), zeros included, on the device where they are."""
        values = self.counts.to(dtype)
        values = values.log1p() if log1p else values
        dense = torch.zeros(len(self), self.n_genes, dtype=dtype, device=values.device)
        if values.device.type == "cpu":
            _scatter(self.n_detected.numpy(), self.genes.numpy(), values.numpy(), dense.numpy())
        else:
            dense.view(-1)[self.places()] = values
        return dense


def sparse_minibatch(parts: list[Rows], n_genes: int, *, pin: bool) -> Minibatch:
    """Cells as `{"X": SparseCounts, "batch", "labels", "row"}`; with `pin` in page-locked memory."""
    gathered = [_gather(part.first, part.last, part.genes, part.counts) for part in parts]
    counts = SparseCounts(
        torch.from_numpy(np.concatenate([part.last - part.first for part in parts])),
        torch.from_numpy(np.concatenate([genes for genes, _ in gathered])),
        torch.from_numpy(np.concatenate([counts for _, counts in gathered])),
        n_genes,
    )
    minibatch = {"X": counts, **_cells(parts)}
    return {name: values.pin_memory() for name, values in minibatch.items()} if pin else minibatch


def densify(minibatch: Minibatch) -> Minibatch:
    """A sparse minibatch as scvi-tools takes it: X float32 (cells, genes), on the device where the counts are."""
    return {**minibatch, "X": minibatch["X"].dense()}


class DenseMinibatches:
    """Makes dense minibatches, in memory of those that were given back.

    A minibatch is the consumer's for as long as it wants. `give_back` hands its memory over to later minibatches; one
    that is never given back costs fresh memory, which has to be mapped page by page and takes as long as writing the
    counts into it.
    """

    def __init__(self, n_genes: int) -> None:
        self._n_genes = n_genes
        self._free: list[torch.Tensor] = []

    def make(self, parts: list[Rows]) -> Minibatch:
        """The cells as `{"X": float32 (cells, genes), "batch", "labels", "row"}`."""
        counts = self._memory(sum(map(len, parts)))
        dense, done = counts.numpy(), 0
        for part in parts:
            part.fill(dense[done : done + len(part)])
            done += len(part)
        return {"X": counts, **_cells(parts)}

    def give_back(self, minibatch: Minibatch) -> None:
        """Take X from a minibatch if neither it nor a view of X is used any more; sparse ones are not changed."""
        counts = minibatch["X"]
        if isinstance(counts, torch.Tensor) and counts.device.type == "cpu" and counts.dtype == torch.float32:
            del minibatch["X"]
            if all(counts.data_ptr() != free.data_ptr() for free in self._free):  # the same memory in another dict
                self._free.append(counts.detach())

    def _memory(self, n_cells: int) -> torch.Tensor:
        """Memory that was given back by a minibatch of as many cells, or new one."""
        for place, free in enumerate(self._free):
            if len(free) == n_cells:
                return self._free.pop(place)
        return torch.empty(n_cells, self._n_genes)


def _cells(parts: list[Rows]) -> Minibatch:
    codes = torch.from_numpy(np.concatenate([part.batch_codes for part in parts])).unsqueeze(1)
    rows = torch.from_numpy(np.concatenate([part.rows for part in parts]))
    return {"batch": codes, "labels": torch.zeros_like(codes), "row": rows}


@numba.njit(nogil=True, cache=True)
def _gather(first, last, genes, counts):  # type: ignore[no-untyped-def]
    """Non-zeros of the cells, one cell after another."""
    n = (last - first).sum()
    some_genes, some_counts = np.empty(n, genes.dtype), np.empty(n, counts.dtype)
    done = 0
    for cell in range(len(first)):
        for i in range(first[cell], last[cell]):
            some_genes[done], some_counts[done] = genes[i], counts[i]
            done += 1
    return some_genes, some_counts


@numba.njit(nogil=True, cache=True)
def _scatter(n_detected, genes, values, dense):  # type: ignore[no-untyped-def]
    """Write non-zeros, one cell after another, into zeros."""
    done = 0
    for cell in range(len(n_detected)):
        row = dense[cell]
        for i in range(done, done + n_detected[cell]):
            row[genes[i]] = values[i]
        done += n_detected[cell]
