"""UMAP of reference cells, and positions of other cells on it."""

from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
import numpy.typing as npt
import umap

from census_scvi.neighbors.compile_cache import keep_compiled
from census_scvi.neighbors.index import NeighborIndex, Points
from census_scvi.neighbors.numba_threads import start_numba_threads

keep_compiled("umap")

_NEIGHBORS = 15
# UMAP needs at least this many cells.
_FEWEST = 4
_BLOCK_CELLS = 2**14


class UmapMap:
    """UMAP fitted on reference cells; for fewer than four cells, the first two principal components.

    Parameters
    ----------
    points
        (cells, dimensions): the reference.
    seed
        Seed of UMAP, which makes the result reproducible.

    Attributes
    ----------
    positions
        float32 (cells, 2): positions of the reference cells on the UMAP.
    """

    def __init__(self, points: Points, *, seed: int = 0) -> None:
        self._points, self._seed = np.asarray(points, np.float32), seed
        if len(points) < _FEWEST:
            self.positions = _principal(self._points)
            return
        n_neighbors = min(_NEIGHBORS, len(points) - 1)
        # Neighbors from the index, which is exact for few cells. UMAP's own search compares fewer than 4,096 cells in
        # pairs in Python; for more cells it compiles pynndescent, which takes longer than everything else.
        distances, neighbors = self._index.query(self._points, n_neighbors)
        reducer = umap.UMAP(
            n_neighbors=n_neighbors, min_dist=0.5, random_state=seed, precomputed_knn=(neighbors, distances, None)
        )
        start_numba_threads()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value")  # with a seed UMAP uses one thread, as intended
            warnings.filterwarnings("ignore", message="precomputed_knn")  # concerns `transform`, which is not used
            self.positions = np.asarray(reducer.fit_transform(self._points), np.float32)

    @cached_property
    def _index(self) -> NeighborIndex:
        return NeighborIndex(self._points, seed=self._seed)

    def place(self, points: Points) -> npt.NDArray[np.float32]:
        """Positions of other cells on the UMAP, float32 (cells, 2): median of their 15 nearest reference cells.

        The median is used because the mean of neighbors in two clusters lies in the empty space between them. UMAP's
        own `transform` searches neighbors approximately, and finds them in the wrong cluster for cells far from the
        reference.
        """
        if not len(points):
            return np.empty((0, 2), np.float32)
        blocks = [points[start : start + _BLOCK_CELLS] for start in range(0, len(points), _BLOCK_CELLS)]
        found = [np.median(self.positions[self._index.query(block, _NEIGHBORS)[1]], axis=1) for block in blocks]
        return np.concatenate(found).astype(np.float32)


def _principal(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """First two principal components, float32 (cells, 2); components that do not exist are 0."""
    positions = np.zeros((len(points), 2), np.float32)
    if len(points):
        left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
        found = (left * sizes)[:, :2]
        positions[:, : found.shape[1]] = found
    return positions
