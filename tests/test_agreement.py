"""Agreement of two embeddings: cases whose answer is known, and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, kneighbors_graph

from census_scvi.metrics.agreement import (
    CLASSIFIERS,
    LabelTransfer,
    cluster_agreement,
    mixing_within_types,
    neighbor_overlap,
    share_equal,
)
from census_scvi.metrics.distances import distances


def blobs(n_cells: int, seed: int, apart: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and types of cells."""
    numbers = np.random.default_rng(seed)
    kind = numbers.integers(0, 3, n_cells)
    points = numbers.normal(size=(n_cells, 5)).astype(np.float32)
    points[np.arange(n_cells), kind] += apart
    return points, np.array(["B", "T", "NK"], dtype=object)[kind]


def test_distances() -> None:
    one = np.array([[0, 0], [2, 0]], np.float32)
    found = distances(one, one + np.array([[3, 4], [0, 0]], np.float32))
    assert (found.mean, found.largest, found.largest_difference, found.scale) == (2.5, 5.0, 4.0, 1.0)


@settings(max_examples=20)
@given(st.integers(5, 60), st.integers(1, 20), st.integers(0, 1000))
def test_overlap_is_that_of_the_neighbor_graphs(n_cells: int, n_neighbors: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    one, other = numbers.normal(size=(2, n_cells, 4)).astype(np.float32)
    each = min(n_neighbors, n_cells - 1)
    both = kneighbors_graph(one, each).multiply(kneighbors_graph(other, each)).sum()
    assert neighbor_overlap(one, other, n_neighbors) == pytest.approx(both / (each * n_cells))


def test_a_rotation_changes_neither_neighbors_nor_clusters() -> None:
    points, _ = blobs(200, 0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0].astype(np.float32)
    assert neighbor_overlap(points, points @ rotation) > 0.999
    assert cluster_agreement(points, points @ rotation, resolution=0.1) > 0.99
    shuffled = points[np.random.default_rng(2).permutation(200)]
    assert neighbor_overlap(points, shuffled) == pytest.approx(15 / 199, abs=0.03)
    assert abs(cluster_agreement(points, shuffled, resolution=0.1)) < 0.05


def test_labels_are_transferred_by_each_classifier() -> None:
    (reference, labels), (query, truth) = blobs(300, 0), blobs(100, 1)
    found = LabelTransfer(reference, labels)(query)
    assert tuple(found) == CLASSIFIERS
    for predicted in found.values():
        assert share_equal(predicted, truth) == 1
    (reference, labels), (query, truth) = blobs(300, 0, apart=1.0), blobs(100, 1, apart=1.0)
    predicted = LabelTransfer(reference, labels, ["neighbors", "mlp"])(query)
    expected = KNeighborsClassifier(15, algorithm="brute").fit(reference, labels.astype(str)).predict(query)
    assert share_equal(predicted["neighbors"], expected.astype(object)) == 1
    assert 0.5 < share_equal(predicted["mlp"], truth) < 0.95
    again = LabelTransfer(reference, labels, ["mlp"])(query)
    assert share_equal(again["mlp"], predicted["mlp"]) == 1


def test_cells_without_a_label_do_not_count() -> None:
    one, other = np.array(["a", None, "b", "c"], dtype=object), np.array(["a", "b", None, "d"], dtype=object)
    assert share_equal(one, other) == 0.5
    assert np.isnan(share_equal(one, np.full(4, None, dtype=object)))


def test_mixing_is_1_if_shuffled_and_0_if_separated() -> None:
    points, types = blobs(600, 0)
    half = np.arange(600) % 3 == 0
    mixed = mixing_within_types(points[~half], types[~half], points[half], types[half])
    assert mixed == pytest.approx(1, abs=0.08)
    apart = mixing_within_types(points[~half], types[~half], points[half] + np.float32(50), types[half])
    assert apart == 0
    of_type = np.where(types == "B", None, types)  # a type that the reference lacks does not count
    assert 0.8 < mixing_within_types(points[~half], of_type[~half], points[half], types[half]) < 1.2
    assert np.isnan(mixing_within_types(points[~half], np.full(400, "x", object), points[half], types[half]))
