"""Statistics of one pass over the counts with which seurat_v3 scores are exact: moments and the largest counts.

seurat_v3 clips each count at `mean + regularised deviation * sqrt(cells)`, then sums the counts and their squares. The
clip value is known only after all cells were seen, so the published implementations read the counts twice. But no more
than `variance / regularised variance` counts of a gene can lie above it (Chebyshev's inequality: it is sqrt(cells)
deviations from the mean), a handful for nearly every gene. Keeping the largest counts of each gene and batch is
therefore enough: clipped sums are the plain sums, corrected by the few counts above the clip value.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

# Memory for the largest counts; how many of each gene and batch follows from it.
_LARGEST_BYTES = 2**30
_MOST_KEPT, _FEWEST_KEPT = 128, 16


class GeneTally:
    """Sums, sums of squares and largest counts of each gene in each batch.

    Parameters
    ----------
    n_batches, n_genes
        Size of the tally.
    kept
        Number of largest counts to keep per gene and batch; None: as many as fit into 1 GiB, at most 128.

    Attributes
    ----------
    sums, squares
        float64 (batches, genes).
    cells
        int64 (genes,): cells in which the gene is detected, of all batches.
    largest
        float32 (batches, genes, kept): in no order, 0 where there are fewer counts.
    """

    def __init__(self, n_batches: int, n_genes: int, *, kept: int | None = None) -> None:
        if kept is None:
            kept = _n_kept(n_batches, n_genes)
        # Side by side, since they are used together: sum, sum of squares, the smallest of the largest counts.
        self._moments = np.zeros((n_batches, n_genes, 3))
        self.largest = np.zeros((n_batches, n_genes, kept), dtype=np.float32)
        self.cells = np.zeros(n_genes, dtype=np.int64)

    @staticmethod
    def memory(n_batches: int, n_genes: int) -> int:
        """Bytes that a tally takes."""
        return n_batches * n_genes * (24 + 4 * _n_kept(n_batches, n_genes))

    @property
    def sums(self) -> npt.NDArray[np.float64]:
        """Sum of counts, float64 (batches, genes)."""
        return self._moments[:, :, 0]

    @property
    def squares(self) -> npt.NDArray[np.float64]:
        """Sum of squared counts, float64 (batches, genes)."""
        return self._moments[:, :, 1]

    def add(
        self, batch_codes: npt.NDArray[np.int32], genes: npt.NDArray[np.int64], counts: npt.NDArray[np.float32]
    ) -> None:
        """Take in non-zero counts: batch (-1: passed over), gene and value of each, arrays of equal length."""
        _add(batch_codes, genes, counts, self._moments, self.largest, self.cells)

    def clipped(
        self, clip: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Sums of counts clipped at `clip` and of their squares, and where they are exact.

        Parameters
        ----------
        clip
            float64 (batches, genes).

        Returns
        -------
        Two float64 arrays and a bool array (batches, genes); False where all the counts that were kept lie above the
        clip value, so that more of them may.
        """
        sums, squares = self.sums.copy(), self.squares.copy()
        exact = np.ones(sums.shape, dtype=bool)
        for batch in range(len(sums)):  # one at a time: all at once would double the memory
            kept, limit = self.largest[batch].astype(np.float64), clip[batch][:, None]
            above = kept > limit
            sums[batch] -= np.where(above, kept - limit, 0).sum(axis=1)
            squares[batch] -= np.where(above, kept**2 - limit**2, 0).sum(axis=1)
            exact[batch] = ~above.all(axis=1)
        return sums, squares, exact


def _n_kept(n_batches: int, n_genes: int) -> int:
    return int(np.clip(_LARGEST_BYTES // (4 * n_batches * n_genes), _FEWEST_KEPT, _MOST_KEPT))


@numba.njit(nogil=True, cache=True)
def _add(batch_codes, genes, counts, moments, largest, cells):  # type: ignore[no-untyped-def]
    """Update moments, and the heap of the largest counts (smallest first) where a count belongs into it."""
    kept = largest.shape[2]
    for i in range(len(counts)):
        batch, gene, count = batch_codes[i], genes[i], counts[i]
        if batch < 0:
            continue
        cells[gene] += count > 0
        moments[batch, gene, 0] += count
        moments[batch, gene, 1] += np.float64(count) * count
        if count <= moments[batch, gene, 2]:
            continue
        heap = largest[batch, gene]
        place = 0
        while True:  # sift down from the root, which goes
            child = 2 * place + 1
            if child >= kept:
                break
            if child + 1 < kept and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= count:
                break
            heap[place] = heap[child]
            place = child
        heap[place] = count
        moments[batch, gene, 2] = heap[0]
