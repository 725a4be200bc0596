"""Minibatches as tensors: dense in reused memory, or sparse until they are on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from census_scvi.counts.reader import Rows

Minibatch = dict[str, Any]
# Key of the minibatch of labelled cells in a minibatch of SCANVI.
LABELLED = "labelled"


class SparseCounts:
    """Sparse counts of a minibatch: the non-zeros, one cell after another; about a tenth of the dense matrix' bytes.

    Parameters
    ----------
    n_detected
        int64 (cells,): number of non-zeros of each cell.
    genes
        uint16 or int32 (non-zeros,): column of each non-zero.
    counts
        uint16 or float32 (non-zeros,): value of each non-zero.
    n_genes
        Number of columns.
    """

    __slots__ = ("counts", "genes", "n_detected", "n_genes")

    def __init__(self, n_detected: torch.Tensor, genes: torch.Tensor, counts: torch.Tensor, n_genes: int) -> None:
        self.n_detected, self.genes, self.counts, self.n_genes = n_detected, genes, counts, n_genes

    def __len__(self) -> int:
        return len(self.n_detected)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.n_detected.nbytes + self.genes.nbytes + self.counts.nbytes

    def to(self, device: torch.device | str) -> SparseCounts:
        """Copy to a device; from pinned memory, the copy is asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> SparseCounts:
        """Copy to page-locked memory, from which a GPU can copy asynchronously."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SparseCounts:
        return SparseCounts(change(self.n_detected), change(self.genes), change(self.counts), self.n_genes)

    def cells(self) -> torch.Tensor:
        """int64 (non-zeros,): the cell of each non-zero."""
        cells = torch.arange(len(self), device=self.n_detected.device)
        # output_size avoids that the CPU waits for a GPU to count the non-zeros.
        return torch.repeat_interleave(cells, self.n_detected, output_size=len(self.genes))

    def places(self) -> torch.Tensor:
        """int64 (non-zeros,): position of each non-zero in the dense matrix, row by row."""
        return self.cells() * self.n_genes + self.genes.long()

    def library_size(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(cells,): sum of each cell's counts."""
        return self.sum_of_cells(self.counts.to(dtype))

    def sum_of_cells(self, values: torch.Tensor) -> torch.Tensor:
        """(cells,): sum per cell of `values` (non-zeros,)."""
        # unsafe=True skips a check of the lengths, for which the CPU would wait for a GPU.
        return torch.segment_reduce(values, "sum", lengths=self.n_detected, unsafe=True)

    def dense(self, dtype: torch.dtype = torch.float32, *, log1p: bool = False) -> torch.Tensor:
        """(cells, genes): dense counts, or log(1 + counts), on the device of the sparse counts."""
        values = self.counts.to(dtype)
        values = values.log1p() if log1p else values
        dense = torch.zeros(len(self), self.n_genes, dtype=dtype, device=values.device)
        if values.device.type == "cpu":
            _scatter(self.n_detected.numpy(), self.genes.numpy(), values.numpy(), dense.numpy())
        else:
            dense.view(-1)[self.places()] = values
        return dense


def sparse_minibatch(parts: list[Rows], n_genes: int, *, pin: bool) -> Minibatch:
    """Create a minibatch with `SparseCounts` from cells (see `MinibatchLoader`); in page-locked memory if `pin`."""
    n_detected = np.concatenate([part.last - part.first for part in parts])
    # Each part has counts of its own dtype: uint16, or float32 if uint16 does not represent all of them.
    dtype = np.result_type(*(part.counts.dtype for part in parts))
    genes = _empty(int(n_detected.sum()), parts[0].genes.dtype, pin)
    counts = _empty(len(genes), dtype, pin)
    done = 0
    for part in parts:
        done = _gather(part.first, part.last, part.genes, part.counts, genes.numpy(), counts.numpy(), done)
    sparse = SparseCounts(_in_memory(n_detected, pin), genes, counts, n_genes)
    return {"X": sparse, **{name: _in_memory(values, pin) for name, values in _cells(parts).items()}}


def _empty(n: int, dtype: npt.DTypeLike, pin: bool) -> torch.Tensor:
    """Memory for n values; page-locked if `pin`: torch uses it again when the copies from it are complete."""
    return torch.empty(n, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=pin)


def _in_memory(values: npt.NDArray[Any], pin: bool) -> torch.Tensor:
    """A tensor of the values; a copy in page-locked memory if `pin`."""
    if not pin:
        return torch.from_numpy(values)
    copied = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, pin_memory=True)
    copied.numpy()[...] = values
    return copied


def densify(minibatch: Minibatch) -> Minibatch:
    """Convert sparse counts to the form of scvi-tools: X float32 (cells, genes), on the device of the counts."""
    return each_value(minibatch, lambda value: value.dense() if isinstance(value, SparseCounts) else value)


def each_value(minibatch: Minibatch, change: Callable[[Any], Any]) -> Minibatch:
    """A minibatch with changed values, also those of its `labelled` cells."""
    return {
        name: each_value(value, change) if isinstance(value, dict) else change(value)
        for name, value in minibatch.items()
    }


class DenseMinibatches:
    """Creates dense minibatches, and reuses the memory of minibatches that were returned with `give_back`.

    A consumer may keep a minibatch as long as it likes. If it is never returned, a later minibatch needs new memory.
    The system maps new memory page by page, which takes as long as writing the counts into it.
    """

    def __init__(self, n_genes: int) -> None:
        self._n_genes = n_genes
        self._free: list[torch.Tensor] = []

    def make(self, parts: list[Rows]) -> Minibatch:
        """Create a minibatch with X float32 (cells, genes) from cells (see `MinibatchLoader`)."""
        counts = self._memory(sum(map(len, parts)))
        dense, done = counts.numpy(), 0
        for part in parts:
            part.fill(dense[done : done + len(part)])
            done += len(part)
        return {"X": counts, **{name: torch.from_numpy(values) for name, values in _cells(parts).items()}}

    def give_back(self, minibatch: Minibatch) -> None:
        """Remove X from a minibatch and reuse its memory; no view of X may be in use. Sparse ones are not changed."""
        if LABELLED in minibatch:
            self.give_back(minibatch[LABELLED])
        counts = minibatch["X"]
        if isinstance(counts, torch.Tensor) and counts.device.type == "cpu" and counts.dtype == torch.float32:
            del minibatch["X"]
            if all(counts.data_ptr() != free.data_ptr() for free in self._free):  # the same memory in another dict
                self._free.append(counts.detach())

    def _memory(self, n_cells: int) -> torch.Tensor:
        """Returned memory of a minibatch with the same number of cells, or new memory."""
        for place, free in enumerate(self._free):
            if len(free) == n_cells:
                return self._free.pop(place)
        return torch.empty(n_cells, self._n_genes)


def _cells(parts: list[Rows]) -> dict[str, npt.NDArray[Any]]:
    """Arrays of a minibatch with one row per cell."""
    batch = np.concatenate([part.batch_codes for part in parts])[:, np.newaxis]
    labels = [part.label_codes for part in parts if part.label_codes is not None]
    proteins = [part.proteins for part in parts if part.proteins is not None]
    return {
        "batch": batch,
        "labels": np.concatenate(labels)[:, np.newaxis] if labels else np.zeros_like(batch),
        "row": np.concatenate([part.rows for part in parts]),
        **({"proteins": np.concatenate(proteins)} if proteins else {}),
    }


@numba.njit(nogil=True, cache=True)
def _gather(first, last, genes, counts, all_genes, all_counts, done):  # type: ignore[no-untyped-def]  # numba infers
    """Copy the non-zeros of the cells, one cell after another, behind the first `done`; return the new number."""
    for cell in range(len(first)):
        for i in range(first[cell], last[cell]):
            all_genes[done], all_counts[done] = genes[i], counts[i]
            done += 1
    return done


@numba.njit(nogil=True, cache=True)
def _scatter(n_detected, genes, values, dense):  # type: ignore[no-untyped-def]  # numba infers the types
    """Write the non-zeros of cells into a dense matrix of zeros."""
    done = 0
    for cell in range(len(n_detected)):
        row = dense[cell]
        for i in range(done, done + n_detected[cell]):
            row[genes[i]] = values[i]
        done += n_detected[cell]
