"""The approximate index of nearest neighbors compared with the exact search."""

from __future__ import annotations

import os

import numpy as np
import pytest

from census_scvi.neighbors.index import NeighborIndex, Points

N_CELLS, N_NEIGHBORS = 2000, 15

pytestmark = pytest.mark.skipif(
    os.environ.get("CENSUS_SCVI_TEST_INDEX") != "1",
    reason="numba compiles pynndescent for up to two minutes: set CENSUS_SCVI_TEST_INDEX=1",
)


@pytest.fixture(scope="module")
def points() -> Points:
    """Cells without types, in so many dimensions that the index misses neighbors; which ones depends on the seed."""
    return np.random.default_rng(0).normal(size=(N_CELLS, 30)).astype(np.float32)


@pytest.fixture(scope="module")
def queries() -> Points:
    return np.random.default_rng(1).normal(size=(300, 30)).astype(np.float32)


@pytest.fixture(scope="module")
def index(points: Points) -> NeighborIndex:
    return NeighborIndex(points, exact_cells=N_CELLS - 1)


def test_the_number_of_cells_decides_which_search(points: Points, index: NeighborIndex) -> None:
    assert not index.exact
    assert NeighborIndex(points, exact_cells=N_CELLS).exact


def test_neighbors_are_those_of_the_exact_search(points: Points, queries: Points, index: NeighborIndex) -> None:
    distances, positions = index.query(queries, N_NEIGHBORS)
    _, exact = NeighborIndex(points).query(queries, N_NEIGHBORS)
    assert (distances.dtype, positions.dtype) == (np.float32, np.int64)
    recall = np.mean([np.isin(found, expected).mean() for found, expected in zip(positions, exact, strict=True)])
    assert recall > 0.98
    there = np.linalg.norm(queries[:, None] - points[positions], axis=2)
    np.testing.assert_allclose(distances, there, rtol=1e-4)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_a_cell_is_not_its_own_neighbor(points: Points, index: NeighborIndex) -> None:
    others = index.others(N_NEIGHBORS)
    assert others.shape == (N_CELLS, N_NEIGHBORS)
    assert not (others == np.arange(N_CELLS)[:, None]).any()
    exact = NeighborIndex(points).others(N_NEIGHBORS)
    assert np.mean([np.isin(found, expected).mean() for found, expected in zip(others, exact, strict=True)]) > 0.98


def test_the_same_seed_gives_the_same_neighbors(points: Points, queries: Points, index: NeighborIndex) -> None:
    expected = index.query(queries, N_NEIGHBORS)
    same, other = (NeighborIndex(points, exact_cells=N_CELLS - 1, seed=seed) for seed in (0, 1))
    for found, values in zip(same.query(queries, N_NEIGHBORS), expected, strict=True):
        np.testing.assert_array_equal(found, values)
    assert (other.query(queries, N_NEIGHBORS)[1] != expected[1]).any()
