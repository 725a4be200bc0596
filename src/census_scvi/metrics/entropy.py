"""Entropy of the batches among a cell's nearest neighbors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

N_NEIGHBORS = 200


def neighbor_entropy(neighbors: npt.NDArray[np.int64], batches: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Entropy of the batches among the neighbors of each cell, in nats, float64 (cells,).

    It is 0 if all neighbors are of one batch, and ln(number of batches) if all batches are equally frequent. With
    perfect mixing it is slightly below the entropy of the batches of all cells, because there are few neighbors.

    Parameters
    ----------
    neighbors
        int64 (cells, neighbors): rows of the neighbors of each cell, including the cell itself.
    batches
        Integer (all cells,): batch of each cell.

    Source: the entropy of the Census' embedding benchmark, which includes the cell itself in the 200 neighbors.
    """
    n_neighbors = neighbors.shape[1]
    codes = np.sort(batches[neighbors], axis=1)
    # Runs of equal codes in the sorted rows: -sum p ln p = ln k - sum over runs of (length ln length) / k.
    ends = np.ones(codes.shape, bool)
    ends[:, :-1] = codes[:, 1:] != codes[:, :-1]
    rows, places = np.nonzero(ends)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    lengths = np.where(first, places + 1, np.diff(places, prepend=-1)).astype(np.float64)
    summed = np.bincount(rows, weights=lengths * np.log(lengths), minlength=len(codes))
    return np.log(n_neighbors) - summed / n_neighbors
