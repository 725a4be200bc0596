"""A map (UMAP) of reference cells, and where other cells lie on it."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import umap

from census_scvi.query.neighbours import Points

# Cells placed at a time: their neighbours and graph take some 10 kB each.
_BLOCK_CELLS = 10_000


class UmapMap:
    """UMAP fitted on reference cells.

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
        # Not through scanpy: its neighbours of more than 8,192 cells fail with the newest pynndescent.
        self._umap = umap.UMAP(n_neighbors=min(15, len(points) - 1), min_dist=0.5, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread, as we want
            self.positions = np.asarray(self._umap.fit_transform(np.asarray(points, np.float32)), np.float32)

    def place(self, points: Points) -> npt.NDArray[np.float32]:
        """Other cells on the map, float32 (cells, 2), among the reference cells that are like them."""
        blocks = [points[start : start + _BLOCK_CELLS] for start in range(0, len(points), _BLOCK_CELLS)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value")
            placed = [np.asarray(self._umap.transform(np.asarray(block, np.float32)), np.float32) for block in blocks]
        return np.concatenate(placed)
