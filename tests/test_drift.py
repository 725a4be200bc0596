"""Measures of drift between two embeddings: what leaves them unchanged, and other implementations of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import scipy.spatial
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

from census_scvi.metrics.drift import (
    Procrustes,
    chance_of_agreement,
    labels_of_neighbors,
    shares_of_neighbors,
)
from census_scvi.neighbors.index import NeighborIndex

Points = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def moved(old: Points, new: Points, n_blocks: int = 1) -> Points:
    """Movement of each cell, with the cells added in blocks."""
    fit = Procrustes(old.shape[1], new.shape[1])
    for one, other in zip(np.array_split(old, n_blocks), np.array_split(new, n_blocks), strict=True):
        fit.add(one, other)
    return fit.superposition().movement(old, new)


@given(seeds, st.integers(2, 8), st.integers(2, 60), st.integers(1, 5), st.floats(0.01, 100), st.floats(-1e3, 1e3))
def test_rotation_scale_and_translation_are_no_movement(
    seed: int, dimensions: int, n_cells: int, n_blocks: int, scale: float, offset: float
) -> None:
    numbers = np.random.default_rng(seed)
    old = numbers.normal(size=(n_cells, dimensions))
    new = scale * old @ ortho_group.rvs(dimensions, random_state=numbers) + offset
    assert moved(old, new, n_blocks) == pytest.approx(0, abs=1e-6)


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(3, 60), st.integers(1, 5))
def test_movement_is_that_of_scipy_in_any_blocks_and_order(
    seed: int, n_old: int, n_new: int, n_cells: int, n_blocks: int
) -> None:
    """`scipy.spatial.procrustes` standardises both; dimensions of zeros are added as its documentation says."""
    numbers = np.random.default_rng(seed)
    old, new = numbers.normal(size=(n_cells, n_old)), numbers.normal(3, 2, size=(n_cells, n_new))
    found = moved(old, new, n_blocks)
    most = max(n_old, n_new)
    padded = [np.pad(points, ((0, 0), (0, most - points.shape[1]))) for points in (new, old)]
    assert np.square(found).mean() == pytest.approx(scipy.spatial.procrustes(*padded)[2], abs=1e-9)
    order = numbers.permutation(n_cells)
    assert moved(old[order], new[order]) == pytest.approx(found[order], abs=1e-9)


def test_cells_at_one_place_do_not_move() -> None:
    old, same = np.random.default_rng(0).normal(size=(10, 3)), np.ones((10, 3))
    assert moved(old, same) == pytest.approx(0)
    assert moved(same, same) == pytest.approx(0)
    assert np.square(moved(same, old)).mean() == pytest.approx(1)  # nothing of the new embedding is in the old one


@given(seeds, st.integers(3, 60), st.integers(1, 20))
def test_neighbors_in_common(seed: int, n_cells: int, n_neighbors: int) -> None:
    numbers = np.random.default_rng(seed)
    one, other = numbers.normal(size=(2, n_cells, 4))
    first, second = (NeighborIndex(points).others(n_neighbors) for points in (one, other))
    assert (shares_of_neighbors(first, first) == 1).all()
    share = shares_of_neighbors(first, second)
    expected = [len(set(a) & set(b)) / first.shape[1] for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert share.tolist() == pytest.approx(expected)
    order = numbers.permutation(n_cells)
    permuted = [NeighborIndex(points[order]).others(n_neighbors) for points in (one, other)]
    assert shares_of_neighbors(*permuted).tolist() == share[order].tolist()


@given(st.data())
def test_labels_of_neighbors(data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=2, max_size=12)), np.int64)
    rows = st.lists(st.integers(0, len(codes) - 1), min_size=3, max_size=3)
    neighbors = np.array(data.draw(st.lists(rows, min_size=1, max_size=5)), np.int64)
    expected = []
    for row in neighbors:
        votes = Counter(codes[row][codes[row] >= 0].tolist())
        expected.append(min((-number, code) for code, number in votes.items())[1] if votes else -1)
    assert labels_of_neighbors(neighbors, codes).tolist() == expected


def test_chance_of_agreement_is_the_mean_over_shuffled_cells() -> None:
    numbers = np.random.default_rng(0)
    one, other = numbers.choice(4, 500, p=[0.5, 0.3, 0.1, 0.1]), numbers.choice(3, 500)
    shuffled = np.mean([(one == numbers.permutation(other)).mean() for _ in range(400)])
    assert chance_of_agreement(one, other) == pytest.approx(shuffled, abs=0.004)
    assert chance_of_agreement(np.append(one, -1), np.append(other, -1)) == chance_of_agreement(one, other)
