"""Nearest neighbors in an embedding: an exact search for few reference cells, an approximate index for many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from census_scvi.config.arguments import require_whole
from census_scvi.errors import UserError

# Up to this number of reference cells, the exact search for 1,000 cells takes at most a second, less than building the
# index.
EXACT_CELLS = 50_000
# Neighbors per cell in the graph of the approximate index, and `epsilon` of its search (larger: slower, more accurate).
_GRAPH_NEIGHBORS, _EPSILON = 30, 0.3

Points = npt.NDArray[np.floating]
Distances = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


class NeighborIndex:
    """Finds nearest neighbors among reference cells, by Euclidean distance.

    Parameters
    ----------
    points
        (cells, dimensions): the reference.
    exact_cells
        Maximum number of reference cells for an exact search.
    seed
        Seed of the approximate index.

    Raises
    ------
    UserError
        There are no reference cells.
    """

    def __init__(self, points: Points, *, exact_cells: int = EXACT_CELLS, seed: int = 0) -> None:
        points = np.ascontiguousarray(points, np.float32)
        if not len(points):
            raise UserError("there are no cells among which to search neighbors")
        self._points, self._n_cells = points, len(points)
        self.exact = len(points) <= exact_cells
        if self.exact:
            self._search = NearestNeighbors(algorithm="brute").fit(points)
        else:
            # Their imports take seconds, and few cells do not need them.
            from pynndescent import NNDescent

            from census_scvi.neighbors.numba_threads import start_numba_threads

            start_numba_threads()
            self._index = NNDescent(points, n_neighbors=_GRAPH_NEIGHBORS, random_state=seed)
            self._index.prepare()

    def __len__(self) -> int:
        return self._n_cells

    def query(self, points: Points, n_neighbors: int) -> tuple[Distances, Positions]:
        """Distances, float32, and positions in the reference, int64, both (cells, neighbors), nearest first.

        All reference cells are neighbors if there are fewer than `n_neighbors`. UserError if `n_neighbors` is below 1.
        """
        require_whole("n_neighbors", n_neighbors, 1)
        n_neighbors = min(n_neighbors, self._n_cells)
        points = np.ascontiguousarray(points, np.float32)
        if not len(points):
            return np.empty((0, n_neighbors), np.float32), np.empty((0, n_neighbors), np.int64)
        if self.exact:
            distances, positions = self._search.kneighbors(points, n_neighbors)
        else:
            positions, distances = self._index.query(points, n_neighbors, epsilon=_EPSILON)
        return distances.astype(np.float32), positions.astype(np.int64)

    def others(self, n_neighbors: int) -> Positions:
        """Positions of the nearest neighbors of each reference cell, without the cell itself: int64 (cells, neighbors).

        All other cells are neighbors if the reference has `n_neighbors` cells or fewer.
        """
        _, positions = self.query(self._points, n_neighbors + 1)
        itself = positions == np.arange(self._n_cells)[:, None]
        itself[~itself.any(axis=1), 0] = True  # more copies than neighbors: remove one copy instead
        return positions[~itself].reshape(self._n_cells, -1)
