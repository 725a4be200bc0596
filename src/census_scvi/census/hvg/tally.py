"""Statistics from one pass over the counts that give exact seurat_v3 scores: moments and the largest counts.

seurat_v3 clips each count at `mean + regularised deviation * sqrt(cells)`, then sums the counts and their squares. The
clip value is known only after all cells have been read, so the published implementations read the counts twice. But at
most `variance / regularised variance` counts of a gene can exceed the clip value, because it is sqrt(cells) deviations
above the mean (Chebyshev's inequality). For nearly every gene, these are only a few counts. It is therefore enough to
keep the largest counts of each gene and batch: the clipped sums are the plain sums, corrected for these counts.
"""

from __future__ import annotations

from typing import IO

import numba
import numpy as np
import numpy.typing as npt

# Memory for the largest counts; it determines how many are kept per gene and batch.
_LARGEST_BYTES = 2**30
_MOST_KEPT, _FEWEST_KEPT = 128, 16


class GeneTally:
    """Sums, sums of squares and largest counts of each gene in each batch.

    Parameters
    ----------
    n_batches, n_genes
        Size of the tally.
    kept
        Number of largest counts to keep per gene and batch; None: see `n_kept`.

    Attributes
    ----------
    sums, squares
        float64 (batches, genes).
    cells
        int64 (genes,): number of cells in which the gene is detected, over all batches.
    largest
        float32 (batches, genes, kept): the largest counts in no order, filled up with 0 if there are fewer.
    """

    def __init__(self, n_batches: int, n_genes: int, *, kept: int | None = None) -> None:
        if kept is None:
            kept = n_kept(n_batches, n_genes)
        # Adjacent in memory, because they are used together: sum, sum of squares, smallest of the largest counts.
        self._moments = np.zeros((n_batches, n_genes, 3))
        self.largest = np.zeros((n_batches, n_genes, kept), dtype=np.float32)
        self.cells = np.zeros(n_genes, dtype=np.int64)

    @staticmethod
    def memory(n_batches: int, n_genes: int) -> int:
        """Memory of a tally in bytes."""
        return n_batches * n_genes * (24 + 4 * n_kept(n_batches, n_genes))

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
        """Add non-zero counts, given as arrays of equal length: batch (-1: ignored), gene and value."""
        _add(batch_codes, genes, counts, self._moments, self.largest, self.cells)

    def merge(self, other: GeneTally, batches: npt.NDArray[np.integer]) -> None:
        """Add the tally of other cells, which keeps as many counts; the result does not depend on the order of merging.

        Sums are exact, so this holds if the counts are whole numbers (and the sums of squares below 2^53).

        Parameters
        ----------
        other
            The tally.
        batches
            The batch in this tally of each batch of the other, each once.
        """
        kept = self.largest.shape[2]
        self.cells += other.cells
        for place, batch in enumerate(batches):
            self._moments[batch, :, :2] += other._moments[place, :, :2]
            both = np.concatenate([self.largest[batch], other.largest[place]], axis=1)
            self.largest[batch] = np.sort(both, axis=1)[:, -kept:]  # ascending, which is a min-heap, too
            self._moments[batch, :, 2] = self.largest[batch, :, 0]

    def save(self, file: IO[bytes], batches: npt.NDArray[np.int64]) -> None:
        """Write the tally, and the batches that it has."""
        np.savez(file, batches=batches, moments=self._moments, largest=self.largest, cells=self.cells)

    @classmethod
    def load(cls, file: IO[bytes]) -> tuple[GeneTally, npt.NDArray[np.int64]]:
        """The tally of a file, and its batches."""
        with np.load(file) as saved:
            moments = saved["moments"]
            tally = cls(*moments.shape[:2], kept=1)
            tally._moments, tally.largest, tally.cells = moments, saved["largest"], saved["cells"]
            return tally, saved["batches"]

    def clipped(
        self, clip: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Sums of the counts clipped at `clip`, sums of their squares, and whether these sums are exact.

        Parameters
        ----------
        clip
            float64 (batches, genes).

        Returns
        -------
        Two float64 arrays and a bool array, each (batches, genes). It is False if all kept counts exceed the clip
        value, because counts that were not kept may then exceed it, too.
        """
        sums, squares = self.sums.copy(), self.squares.copy()
        exact = np.ones(sums.shape, dtype=bool)
        for batch in range(len(sums)):  # one batch at a time; all at once would double the memory
            # Sorted, so that the sums do not depend on the order in which the counts were added.
            kept, limit = np.sort(self.largest[batch], axis=1).astype(np.float64), clip[batch][:, None]
            above = kept > limit
            sums[batch] -= np.where(above, kept - limit, 0).sum(axis=1)
            squares[batch] -= np.where(above, kept**2 - limit**2, 0).sum(axis=1)
            exact[batch] = ~above.all(axis=1)
        return sums, squares, exact


def n_kept(n_batches: int, n_genes: int) -> int:
    """Number of largest counts that are kept per gene and batch: as many as fit into 1 GiB, from 16 to 128."""
    return int(np.clip(_LARGEST_BYTES // (4 * n_batches * n_genes), _FEWEST_KEPT, _MOST_KEPT))


@numba.njit(nogil=True, cache=True)
def _add(batch_codes, genes, counts, moments, largest, cells):  # type: ignore[no-untyped-def]  # numba infers the types
    """Update the moments, and the min-heap of the largest counts if a count is larger than its smallest."""
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
        while True:  # sift down from the root, which is replaced
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
