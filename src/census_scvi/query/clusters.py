"""Leiden clusters in an embedding."""

from __future__ import annotations

import random

import igraph
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from umap.umap_ import fuzzy_simplicial_set

from census_scvi.query.neighbours import NeighbourIndex, Points

_NEIGHBOURS = 15


def leiden(points: Points, resolution: float, seed: int) -> pd.Categorical:
    """Clusters of cells, as scanpy makes them: Leiden with modularity on UMAP's graph of 15 neighbours.

    Not through scanpy, whose neighbours of more than 8,192 cells fail with the newest pynndescent.

    Parameters
    ----------
    points
        (cells, dimensions).
    resolution
        The higher, the more clusters.
    seed
        Of the clustering.

    Returns
    -------
    "0", "1", ... for each cell, the largest cluster first.
    """
    graph = _graph(points, seed)
    rows, columns = sp.triu(graph, k=1).nonzero()
    weights = np.asarray(graph[rows, columns]).ravel()
    network = igraph.Graph(n=graph.shape[0], edges=np.column_stack([rows, columns]), edge_attrs={"weight": weights})
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = network.community_leiden("modularity", weights="weight", resolution=resolution, n_iterations=2)
    finally:
        igraph.set_random_number_generator(random)
    codes = np.array(found.membership)
    order = np.argsort(-np.bincount(codes), kind="stable")
    rank: npt.NDArray[np.int64] = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return pd.Categorical.from_codes(rank[codes], categories=[str(number) for number in range(len(order))])


def _graph(points: Points, seed: int) -> sp.csr_matrix:
    n_neighbours = min(_NEIGHBOURS, len(points))
    distances, positions = NeighbourIndex(points, seed=seed).query(points, n_neighbours)
    graph, _, _ = fuzzy_simplicial_set(
        sp.coo_matrix((len(points), 1)),
        n_neighbours,
        np.random.RandomState(seed),
        "euclidean",
        knn_indices=positions,
        knn_dists=distances,
    )
    return sp.csr_matrix(graph)
