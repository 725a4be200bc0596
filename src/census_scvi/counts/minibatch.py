"""Cells as tensors: dense in memory that is used again, or sparse until they are on the device."""

from __future__ import annotations

import sys

import numba
import numpy as np
import numpy.typing as npt
import torch

from census_scvi.counts.reader import Rows

Minibatch = dict[str, torch.Tensor]
# The tensors of a sparse minibatch that `densify` makes X of.
_SPARSE = ("n_detected", "genes", "counts")


def sparse_minibatch(parts: list[Rows], *, pin: bool) -> Minibatch:
    """Cells with their non-zeros one after another; `densify` makes the minibatch that scVI takes.

    `n_detected` int64 (cells,): non-zeros of each; `genes` uint16 or int32, `counts` uint16 or float32 (non-zeros,).
    A tenth of the bytes of a dense one. With `pin` in page-locked memory, from where a GPU copies on its own.
    """
    gathered = [_gather(part.first, part.last, part.genes, part.counts) for part in parts]
    minibatch = _cells(parts) | {
        "n_detected": torch.from_numpy(np.concatenate([part.last - part.first for part in parts])),
        "genes": torch.from_numpy(np.concatenate([genes for genes, _ in gathered])),
        "counts": torch.from_numpy(np.concatenate([counts for _, counts in gathered])),
    }
    return {name: tensor.pin_memory() for name, tensor in minibatch.items()} if pin else minibatch


def densify(minibatch: Minibatch, n_genes: int) -> Minibatch:
    """A sparse minibatch with X float32 (cells, genes) for its non-zeros, on the device where they are."""
    n_detected, genes, counts = (minibatch[name] for name in _SPARSE)
    cells = torch.arange(len(n_detected), device=n_detected.device)
    # output_size spares the device a stop to count the non-zeros.
    starts = torch.repeat_interleave(cells * n_genes, n_detected, output_size=len(genes))
    dense = torch.zeros(len(n_detected) * n_genes, device=n_detected.device)
    dense[starts + genes.long()] = counts.float()
    rest = {name: tensor for name, tensor in minibatch.items() if name not in _SPARSE}
    return {"X": dense.view(-1, n_genes), **rest}


class DenseMinibatches:
    """Makes dense minibatches; memory that nobody holds any more is used again.

    Fresh memory has to be mapped page by page, which takes as long as writing the counts into it.
    """

    def __init__(self, n_genes: int) -> None:
        self._n_genes = n_genes
        self._arrays: list[npt.NDArray[np.float32]] = []

    def make(self, parts: list[Rows]) -> Minibatch:
        """The cells as `{"X": float32 (cells, genes), "batch", "labels", "row"}`."""
        dense = self._array(sum(map(len, parts)))
        done = 0
        for part in parts:
            part.fill(dense[done : done + len(part)])
            done += len(part)
        return {"X": torch.from_numpy(dense), **_cells(parts)}

    def _array(self, n_cells: int) -> npt.NDArray[np.float32]:
        # A tensor made from an array, and every view of it, hold the array: who else does is known by the count.
        self._arrays = [array for array in self._arrays if len(array) >= n_cells]
        for place in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[place]) == _UNUSED:
                return self._arrays[place][:n_cells]
        self._arrays.append(np.empty((n_cells, self._n_genes), np.float32))
        return self._arrays[-1][:]


# References to an array that only a list holds, the one of the call itself included.
_HELD_BY_A_LIST = [np.empty(0)]
_UNUSED = sys.getrefcount(_HELD_BY_A_LIST[0])


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
