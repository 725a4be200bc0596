"""An embedding of the cells of a slice, with the neighbors and clusters that several metrics use."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from census_scvi.metrics.entropy import N_NEIGHBORS
from census_scvi.neighbors.clusters import LeidenGraph
from census_scvi.neighbors.index import NeighborIndex

_RESOLUTIONS = tuple(np.linspace(0.2, 2, 10).round(1).tolist())

Points = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


class Space:
    """An embedding of the cells of a slice.

    Parameters
    ----------
    points
        float32 (cells, dimensions).
    measured
        int64 (measured cells,): rows of the cells that are measured; the neighbors for the entropy are searched among
        all cells.
    seed
        Random seed.
    """

    def __init__(self, points: Points, measured: npt.NDArray[np.int64], seed: int) -> None:
        self.measured, self.seed = measured, seed
        self.points = np.ascontiguousarray(points[measured], np.float32)
        self._all = points

    @cached_property
    def neighbors(self) -> npt.NDArray[np.int64]:
        """int64 (measured cells, 200): rows of the nearest neighbors among all cells, including the cell itself."""
        index = NeighborIndex(self._all, exact_cells=len(self._all), seed=self.seed)
        blocks = np.array_split(self.points, max(len(self.points) // 1000, 1))
        return np.concatenate([index.query(block, N_NEIGHBORS)[1] for block in blocks])

    @cached_property
    def clusterings(self) -> list[Codes]:
        """Leiden clusters of the measured cells at ten resolutions."""
        graph = LeidenGraph(self.points, self.seed)
        return [np.asarray(graph.clusters(resolution).codes, np.int64) for resolution in _RESOLUTIONS]
