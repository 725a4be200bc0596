"""An index for very many cells, in the layout of tiledb-vector-search's IVF_FLAT (storage version 0.3).

The cells are divided into partitions by k-means, and stored partition by partition. A search reads only the partitions
whose centroids are nearest to the query. `IVFFlatIndex` of tiledb-vector-search reads the index, and so does
`cellxgene_census.experimental.find_nearest_obs`. Its `ingest` is not used, because it samples the cells for k-means
without a seed (or takes the first ones, which belong to few datasets), and starts from the beginning after a kill.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.files.atomic import remove, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.tiledb_py import tiledb_py
from census_scvi.neighbors.scaled import Ids, Vectors, scaled
from census_scvi.neighbors.settings import Metric

# Cells per block that is divided into partitions. Bytes of a tile, as in the library, and tiles per written block.
_BLOCK_CELLS, _TILE_BYTES, _TILES = 2**16, 64_000_000, 2
# k-means: cells per partition, and passes over them.
_SAMPLE_CELLS, _PASSES = 100, 10
_LAST = np.iinfo(np.int32).max


class IvfFlatBuilder:
    """Builds an index in steps that a killed run does not do again; it needs about 16 bytes per cell, and some blocks.

    Parameters
    ----------
    vectors
        float32 (cells, dimensions), possibly memory-mapped: finite numbers.
    joinids
        int64 (cells,): soma_joinid of each cell, the result of a search.
    folder
        Folder of the index; what is not finished is in files next to it, whose names begin with its name.
    metric
        `euclidean` or `cosine`.
    n_partitions
        Number of partitions, at most that of the cells.
    seed
        Seed of the sample and of the initial centroids.
    """

    def __init__(
        self, vectors: Vectors, joinids: Ids, folder: Path, metric: Metric, n_partitions: int, seed: int
    ) -> None:
        self._vectors, self._joinids, self._folder = vectors, joinids, folder
        self._metric, self._n_partitions, self._seed = metric, n_partitions, seed
        self._centroids, self._partitions, self._progress = (
            folder.with_name(f"{folder.name}-{what}") for what in ("centroids.npy", "partitions.npy", "progress.json")
        )

    def build(self) -> Iterator[int]:
        """Do what is missing; yields the number of cells of each finished block, twice per cell in all."""
        centroids = self._found_centroids()
        yield from self._divide(centroids)
        yield from self._store(centroids)
        for path in (self._centroids, self._partitions, self._progress):
            path.unlink(missing_ok=True)

    def _found_centroids(self) -> Vectors:
        """float32 (partitions, dimensions): k-means of a sample of the cells."""
        if self._centroids.exists():
            return np.asarray(np.load(self._centroids))
        from sklearn.cluster import KMeans

        rows = draw(len(self._vectors), _SAMPLE_CELLS * self._n_partitions, generator(self._seed, Stream.INDEX_CELLS))
        sample = scaled(self._vectors[rows], self._metric)
        means = KMeans(
            self._n_partitions, init="random", n_init=1, max_iter=_PASSES, random_state=self._seed, copy_x=False
        ).fit(sample)
        centroids = means.cluster_centers_.astype(np.float32)
        partial = self._centroids.with_suffix(".partial.npy")
        np.save(partial, centroids)
        partial.replace(self._centroids)
        return centroids

    def _divide(self, centroids: Vectors) -> Iterator[int]:
        """Write the partition of each cell to a file of int32."""
        from sklearn.metrics import pairwise_distances_argmin

        with self._partitions.open("ab") as file:
            done = file.tell() // 4
            file.truncate(4 * done)
            if done:
                yield done
            for start in range(done, len(self._vectors), _BLOCK_CELLS):
                block = scaled(self._vectors[start : start + _BLOCK_CELLS], self._metric)
                file.write(pairwise_distances_argmin(block, centroids).astype(np.int32).tobytes())
                file.flush()
                yield len(block)

    def _store(self, centroids: Vectors) -> Iterator[int]:
        """Write the arrays of the index, the cells of each partition one after the other."""
        tiledb = tiledb_py()
        partitions = np.fromfile(self._partitions, np.int32)
        order = np.argsort(partitions, kind="stable")
        sizes = np.bincount(partitions, minlength=self._n_partitions)
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
        done = int(read_json(self._progress)["cells"]) if self._progress.exists() else 0
        if not done:
            remove(self._folder)
            self._create()
            places = self._places()
            with tiledb.open(places["partition_centroids"], "w") as array:
                array[:, : len(centroids)] = np.ascontiguousarray(centroids.T)
            with tiledb.open(places["partition_indexes"], "w") as array:
                array[: len(ends)] = ends
        else:
            places = self._places()
            yield done
        step = _TILES * _tile_cells(self._vectors.shape[1])
        for start in range(done, len(order), step):
            rows = order[start : start + step]
            stop = start + len(rows)
            with tiledb.open(places["shuffled_vectors"], "w") as array:
                array[:, start:stop] = np.ascontiguousarray(scaled(self._vectors[rows], self._metric).T)
            with tiledb.open(places["shuffled_vector_ids"], "w") as array:
                array[start:stop] = self._joinids[rows].astype(np.uint64)
            write_json(self._progress, {"cells": stop})
            yield len(rows)

    def _places(self) -> dict[str, str]:
        return {name: str(self._folder / name) for name in _ARRAYS}

    def _create(self) -> None:
        """Create the group and its empty arrays."""
        tiledb, library = tiledb_py(), importlib.import_module("tiledb.vector_search._tiledbvspy")
        n_dimensions = self._vectors.shape[1]
        # The library's enumeration: squared Euclidean distance or cosine distance.
        distances = library.DistanceMetric
        metric = {"euclidean": distances.SUM_OF_SQUARES, "cosine": distances.COSINE}[self._metric]
        tiledb.group_create(str(self._folder))
        for name, (attribute, dtype, rows) in _ARRAYS.items():
            tile = _tile_cells(n_dimensions) if name.startswith("shuffled") else 100_000
            tiledb.Array.create(self._places()[name], _schema(attribute, dtype, n_dimensions * rows, tile))
        with tiledb.Group(str(self._folder), "w") as group:
            for name in _ARRAYS:
                group.add(name, name=name, relative=True)
            group.meta.update(
                {
                    "dataset_type": "vector_search", "index_type": "IVF_FLAT", "storage_version": "0.3",
                    "dtype": "float32", "dimensions": n_dimensions, "distance_metric": int(metric), "has_updates": 0,
                    "base_sizes": json.dumps([len(self._vectors)]), "ingestion_timestamps": "[0]",
                    "partition_history": json.dumps([self._n_partitions]), "temp_size": len(self._vectors),
                }
            )  # fmt: skip


# Attribute and dtype of each array of the group, and whether it has a dimension for those of the vectors.
_ARRAYS: dict[str, tuple[str, Any, bool]] = {
    "partition_centroids": ("centroids", np.float32, True),
    "partition_indexes": ("values", np.uint64, False),
    "shuffled_vectors": ("values", np.float32, True),
    "shuffled_vector_ids": ("values", np.uint64, False),
}


def _tile_cells(n_dimensions: int) -> int:
    return max(_TILE_BYTES // (4 * n_dimensions), 1)


def _schema(attribute: str, dtype: Any, n_rows: int, tile: int) -> Any:
    """Schema of a dense array: of one dimension, or of `n_rows` rows."""
    tiledb = tiledb_py()
    zipped = tiledb.FilterList([tiledb.ZstdFilter()])
    of_cells = {"domain": (0, _LAST), "tile": tile, "dtype": np.int32, "filters": zipped}
    dimensions = [tiledb.Dim(name="cols" if n_rows else "rows", **of_cells)]
    if n_rows:
        rows = tiledb.Dim(name="rows", domain=(0, n_rows - 1), tile=n_rows, dtype=np.int32, filters=zipped)
        dimensions.insert(0, rows)
    return tiledb.ArraySchema(
        domain=tiledb.Domain(*dimensions),
        attrs=[tiledb.Attr(name=attribute, dtype=dtype, filters=zipped)],
        cell_order="col-major",
        tile_order="col-major",
    )
