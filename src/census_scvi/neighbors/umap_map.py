"""UMAP of reference cells, and positions of other cells on it."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import umap

from census_scvi.neighbors.compile_cache import keep_compiled
from census_scvi.neighbors.index import NeighborIndex, Points

keep_compiled("umap")

_NEIGHBORS = 15
# Of fewer cells UMAP makes no map.
_FEWEST = 4
_BLOCK_CELLS = 2**14


class UmapMap:
    """UMAP fitted on reference cells; of fewer than four, their first two principal components.

    Parameters
    ----------
    points
        (cells, dimensions): the reference.
    seed
        Of UMAP, which is then repeatable.

    Attributes
    ----------
    positions
        float32 (cells, 2): the reference on the map.
    """

    def __init__(self, points: Points, *, seed: int = 0) -> None:
        self._points, self._seed = np.asarray(points, np.float32), seed
        if len(self._points) < _FEWEST:
            self.positions = _principal(self._points)
            return
        # Not through scanpy: its neighbours of more than 8,192 cells fail with the newest pynndescent.
        reducer = umap.UMAP(n_neighbors=min(_NEIGHBORS, len(points) - 1), min_dist=0.5, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread, as we want
            self.positions = np.asarray(reducer.fit_transform(self._points), np.float32)

    def place(self, points: Points) -> npt.NDArray[np.float32]:
        """Other cells on the map, float32 (cells, 2): each in the middle of its 15 nearest reference cells.

        In the median, not the mean: neighbours on two islands would put it into the sea. UMAP's own `transform` seeks
        neighbours approximately, and among cells that lie far from all it finds them on the wrong island.
        """
        index = NeighborIndex(self._points, seed=self._seed)
        if not len(points):
            return np.empty((0, 2), np.float32)
        blocks = [points[start : start + _BLOCK_CELLS] for start in range(0, len(points), _BLOCK_CELLS)]
        found = [np.median(self.positions[index.query(block, _NEIGHBORS)[1]], axis=1) for block in blocks]
        return np.concatenate(found).astype(np.float32)


def _principal(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """First two principal components, float32 (cells, 2); 0 where there are fewer."""
    positions = np.zeros((len(points), 2), np.float32)
    if len(points):
        left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
        found = (left * sizes)[:, :2]
        positions[:, : found.shape[1]] = found
    return positions
