"""Label probabilities by a weighted vote of the nearest labelled cells in an embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.label_shares import label_shares
from census_scvi.neighbors.index import NeighborIndex

NEIGHBORS = 10
# A type with n cells has the weight n to the power -0.25 per cell: a type with fewer cells than neighbors can win.
_POWER = -0.25
_BLOCK_CELLS = 2**14


def neighbor_vote(
    space: npt.NDArray[np.float32],
    train: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
    n_classes: int,
    test: npt.NDArray[np.int64],
    *,
    n_neighbors: int = NEIGHBORS,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Label shares of the nearest training cells; nearer ones, and those of rarer types, have a larger weight.

    Parameters
    ----------
    space
        float32 (cells, dimensions): the embedding.
    train, codes, n_classes, test
        As in `Annotator.predict`.
    n_neighbors
        Neighbors per cell.
    seed
        Seed of the approximate index of many cells.

    Returns
    -------
    float32 (test cells, n_classes).
    """
    index = NeighborIndex(space[train], seed=seed)
    of_type = np.maximum(np.bincount(codes, minlength=n_classes), 1) ** _POWER
    found = np.empty((len(test), n_classes), np.float32)
    for start in range(0, len(test), _BLOCK_CELLS):
        rows = slice(start, start + _BLOCK_CELLS)
        distances, positions = index.query(space[test[rows]], n_neighbors)
        near = np.exp(-np.square(distances / np.maximum(distances.mean(axis=1, keepdims=True), 1e-12)))
        found[rows] = label_shares(near * of_type[codes[positions]], codes[positions], n_classes)
    return found
