"""Leiden clusters in an embedding."""

from __future__ import annotations

import random
from collections.abc import Sequence

import igraph
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from umap.umap_ import fuzzy_simplicial_set

from census_scvi.neighbors.compile_cache import keep_compiled
from census_scvi.neighbors.index import NeighborIndex, Points
from census_scvi.neighbors.numba_threads import start_numba_threads

keep_compiled("umap")

_NEIGHBORS = 15


def leiden(points: Points, resolution: float, seed: int) -> pd.Categorical:
    """Leiden clusters of cells, as in scanpy: modularity on UMAP's graph of 15 neighbors.

    scanpy is not used, because its neighbor search of more than 8,192 cells fails with the newest pynndescent.

    Parameters
    ----------
    points
        (cells, dimensions).
    resolution
        A higher resolution gives more clusters.
    seed
        Seed of the neighbor search, the graph and the clustering.

    Returns
    -------
    Cluster of each cell, "0", "1", ...; "0" is the largest cluster.
    """
    return LeidenGraph(points, seed).clusters(resolution)


class LeidenGraph:
    """UMAP's graph of 15 neighbors, for clusterings at several resolutions; parameters as in `leiden`."""

    def __init__(self, points: Points, seed: int) -> None:
        graph = _graph(points, seed)
        rows, columns = sp.triu(graph, k=1).nonzero()
        weights = np.asarray(graph[rows, columns]).ravel()
        edges = np.column_stack([rows, columns])
        self._network = igraph.Graph(n=graph.shape[0], edges=edges, edge_attrs={"weight": weights})
        self._seed = seed

    def clusters(self, resolution: float) -> pd.Categorical:
        """Leiden clusters at a resolution, as in `leiden`."""
        igraph.set_random_number_generator(random.Random(self._seed))
        try:
            found = self._network.community_leiden(
                "modularity", weights="weight", resolution=resolution, n_iterations=2
            )
        finally:
            igraph.set_random_number_generator(random)
        codes = np.array(found.membership)
        order = np.argsort(-np.bincount(codes), kind="stable")
        rank: npt.NDArray[np.int64] = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return pd.Categorical.from_codes(rank[codes], categories=[str(number) for number in range(len(order))])


def composition(obs: pd.DataFrame, groups: str, columns: Sequence[str]) -> pd.DataFrame:
    """Composition of each group of cells.

    Parameters
    ----------
    obs
        obs of the cells.
    groups
        obs column of the groups.
    columns
        obs columns to summarise; columns that obs does not have are ignored.

    Returns
    -------
    One row per group, in the order of the groups: `n_cells`, and for each column its most frequent value and
    `<column>_share`, the share of this value.
    """
    rows = []
    for group, some in obs.groupby(groups, observed=True):
        row = {groups: group, "n_cells": len(some)}
        for column in columns:
            if column in some:
                shares = some[column].astype(str).value_counts(normalize=True)
                row |= {column: shares.index[0], f"{column}_share": float(shares.iloc[0])}
        rows.append(row)
    return pd.DataFrame(rows).set_index(groups)


def _graph(points: Points, seed: int) -> sp.csr_matrix:
    n_neighbors = min(_NEIGHBORS, len(points))
    distances, positions = NeighborIndex(points, seed=seed).query(points, n_neighbors)
    start_numba_threads()
    graph, _, _ = fuzzy_simplicial_set(
        sp.coo_matrix((len(points), 1)),
        n_neighbors,
        np.random.RandomState(seed),
        "euclidean",
        knn_indices=positions,
        knn_dists=distances,
    )
    return sp.csr_matrix(graph)
