"""Nearest neighbors among all cells of an embedding, by an index on disk or in a bucket; and the recall of an index."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.errors import UserError
from census_scvi.files.tiledb_py import tiledb_py
from census_scvi.files.uri import without_credentials
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.neighbors.scaled import Ids, Vectors, scaled
from census_scvi.neighbors.settings import Metric

log = logging.getLogger(__name__)

# Neighbors that are searched at most for a point, if only some cells may be neighbors; and for all points at a time.
_MOST_NEIGHBORS, _MOST_FOUND = 10_000, 10_000_000
# An index of up to this size is read into memory when it is opened; of a larger one, the searched partitions are read.
_MEMORY_BYTES = 2 * 2**30
_BLOCK_CELLS = 2**18
# Relative difference of two distances that counts as rounding.
_ROUNDING = 1e-4


class CellIndex:
    """Searches an index; it is opened with the first search, which needs the extra `index` of the installation.

    Parameters
    ----------
    uri
        The index: a folder or a URL.
    metric
        Its distance.
    n_cells, n_dimensions, n_partitions
        Its size.
    nprobe
        Partitions to search for each query.
    tiledb
        Settings of TileDB, for a bucket.
    """

    def __init__(
        self,
        uri: str,
        metric: Metric,
        n_cells: int,
        n_dimensions: int,
        n_partitions: int,
        nprobe: int,
        tiledb: Mapping[str, str] | None = None,
    ) -> None:
        self.uri, self.metric, self.n_cells, self.n_dimensions = uri, metric, n_cells, n_dimensions
        self.n_partitions, self.nprobe, self._tiledb = n_partitions, nprobe, dict(tiledb or {})

    @cached_property
    def _index(self) -> Any:
        # Not by an import statement: the classes that use an index where there is one do not need the extra.
        tiledb, library = tiledb_py(), importlib.import_module("tiledb.vector_search")
        of_vector = 4 * self.n_dimensions
        held = {} if of_vector * self.n_cells <= _MEMORY_BYTES else {"memory_budget": _MEMORY_BYTES // of_vector}
        try:
            return library.IVFFlatIndex(uri=self.uri, config=self._tiledb, **held)
        except (tiledb.TileDBError, KeyError) as error:
            raise UserError(
                f"the index {without_credentials(self.uri)} cannot be read ({str(error).splitlines()[0]}); build it"
                " again with scvi-index.py --force"
            ) from None

    def query(self, points: Vectors, n_neighbors: int, nprobe: int | None = None) -> tuple[Vectors, Ids]:
        """Find the nearest cells of each point, nearest first.

        Parameters
        ----------
        points
            float32 (points, dimensions): finite.
        n_neighbors
            Neighbors per point; if the index has fewer cells, all of them.
        nprobe
            Partitions to search; None: those of the index. More are searched if these have too few cells.

        Returns
        -------
        Distances (Euclidean, or 1 - cosine), float32, and soma_joinids, int64: each (points, n_neighbors).

        Raises
        ------
        UserError
            The points have other dimensions than the index, or it cannot be read.
        """
        points = np.ascontiguousarray(points, np.float32)
        if points.ndim != 2 or points.shape[1] != self.n_dimensions:
            raise UserError(
                f"the cells have {points.shape[-1]} dimensions, the index {self.uri} has {self.n_dimensions}: it is the"
                " index of another embedding"
            )
        n_neighbors, searched = min(n_neighbors, self.n_cells), nprobe or self.nprobe
        while True:
            distances, found = self._index.query(points, k=n_neighbors, nprobe=searched)
            if searched >= self.n_partitions or not (found == np.iinfo(np.uint64).max).any():
                break
            searched *= 4
        distances = np.maximum(distances, 0, dtype=np.float32)  # rounding of the distance of equal vectors
        return np.sqrt(distances) if self.metric == "euclidean" else distances, np.asarray(found).astype(np.int64)


def nearest_matching(index: CellIndex, points: Vectors, n_neighbors: int, matching: Ids) -> tuple[Vectors, Ids] | None:
    """The result of `CellIndex.query` among some of the cells: more neighbors are searched, and the others excluded.

    Parameters
    ----------
    index, points, n_neighbors
        As of `query`.
    matching
        int64 (cells,), ascending: soma_joinids of the cells that may be neighbors.

    Returns
    -------
    As `query`; None if more than 10,000 neighbors would have to be searched for a point.
    """
    n_neighbors = min(n_neighbors, len(matching))
    wanted = 2 * math.ceil(n_neighbors * max(index.n_cells / len(matching), 1))
    parts = []
    step = max(_MOST_FOUND // wanted, 1)
    for start in range(0, len(points), step):
        part = _nearest_matching(index, points[start : start + step], n_neighbors, matching, wanted)
        if part is None:
            return None
        parts.append(part)
    log.info("%d or more neighbors of each cell were searched, because only some match the filter", wanted)
    distances, found = (np.concatenate(each) for each in zip(*parts, strict=True))
    return distances, found


def _nearest_matching(
    index: CellIndex, points: Vectors, n_neighbors: int, matching: Ids, wanted: int
) -> tuple[Vectors, Ids] | None:
    while wanted <= _MOST_NEIGHBORS:
        # Partitions with ten times as many cells: the nearest matching cells are further away than the nearest cells.
        nprobe = max(index.nprobe, math.ceil(10 * wanted * index.n_partitions / index.n_cells))
        distances, found = index.query(points, wanted, nprobe)
        places = np.minimum(np.searchsorted(matching, found), len(matching) - 1)
        there = matching[places] == found
        if (there.sum(axis=1) >= n_neighbors).all():
            first = np.argsort(~there, axis=1, kind="stable")[:, :n_neighbors]
            return np.take_along_axis(distances, first, 1), np.take_along_axis(found, first, 1)
        if wanted >= index.n_cells:
            break
        wanted *= 4
    return None


def recall_at_ten(
    index: CellIndex, vectors: Vectors, joinids: Ids, n_cells: int, nprobes: Iterable[int], seed: int
) -> dict[int, float]:
    """Share of the ten nearest other cells that a search finds, compared with exact search.

    Parameters
    ----------
    index
        The index.
    vectors, joinids
        float32 (cells, dimensions) and int64 (cells,): the embedding; it is read in blocks.
    n_cells
        Random cells whose neighbors are searched.
    nprobes
        Numbers of searched partitions.
    seed
        Seed of the sample.

    Returns
    -------
    The recall for each number of partitions. A cell at the distance of the tenth neighbor counts as one of the ten.
    """
    rows = draw(len(vectors), n_cells, generator(seed, Stream.RECALL_CELLS))
    queries, wanted = np.asarray(vectors[rows], np.float32), min(11, len(vectors))
    if wanted == 1:
        return dict.fromkeys(nprobes, 1.0)
    exact = _exact_distances(queries, vectors, wanted, index.metric)
    # Rounding errors of distances grow with the vectors.
    size = float(np.linalg.norm(scaled(queries, index.metric), axis=1).max(initial=0))
    furthest = exact[:, -1:] * (1 + _ROUNDING) + _ROUNDING * size
    recalls = {}
    for nprobe in nprobes:
        _, found = index.query(queries, wanted, nprobe)
        places = np.searchsorted(joinids, found).reshape(-1)
        there = scaled(vectors[places], index.metric).reshape(*found.shape, -1)
        distances = np.linalg.norm(there - scaled(queries, index.metric)[:, None], axis=2)
        near = ((distances <= furthest) & (found != joinids[rows][:, None])).sum(axis=1)
        recalls[nprobe] = float(np.minimum(near, wanted - 1).mean() / (wanted - 1))
    return recalls


def _exact_distances(queries: Vectors, vectors: Vectors, n_nearest: int, metric: Metric) -> npt.NDArray[np.float64]:
    """Euclidean distances of the nearest vectors, ascending; the vectors are read in blocks."""
    queries, nearest = scaled(queries, metric), np.empty((len(queries), 0))
    for start in range(0, len(vectors), _BLOCK_CELLS):
        block = scaled(vectors[start : start + _BLOCK_CELLS], metric)
        distances, _ = NeighborIndex(block, exact_cells=len(block)).query(queries, n_nearest)
        nearest = np.sort(np.concatenate([nearest, distances], axis=1), axis=1)[:, :n_nearest]
    return nearest
