"""The metrics against independent implementations, and cases whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scib_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scib_metrics.nearest_neighbors import NeighborsResults
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

from census_scvi.errors import UserError
from census_scvi.metrics import classify
from census_scvi.metrics.biology import biology
from census_scvi.metrics.cluster_agreement import adjusted_rand_index, agreement, normalized_mutual_information
from census_scvi.metrics.entropy import neighbor_entropy
from census_scvi.metrics.interval import interval
from census_scvi.metrics.mixing import mixing
from census_scvi.metrics.score import CHANCE, MIXED, WITHIN, Score
from census_scvi.metrics.space import Space

N_CELLS = 700  # in most tests, since JAX compiles for each number; more than 200, the neighbors, in each third
TYPES = np.array(["B cell", "T cell", "monocyte"], dtype=object)
STUDIES = np.array(["one", "two", "three"], dtype=object)


def cells(
    n_cells: int = N_CELLS, *, of_type: float = 12.0, of_study: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, types and studies: blobs so far apart for the type, and for the study."""
    generator = np.random.default_rng(seed)
    types, studies = generator.integers(0, 3, n_cells), generator.integers(0, 3, n_cells)
    points = generator.normal(size=(n_cells, 8))
    points[np.arange(n_cells), types] += of_type
    points[np.arange(n_cells), 3 + studies] += of_study
    return points.astype(np.float32), TYPES[types], STUDIES[studies]


def space_of(points: np.ndarray) -> Space:
    return Space(points, np.arange(len(points)), 0)


def measured(points: np.ndarray, types: np.ndarray, studies: np.ndarray) -> dict[str, Score]:
    """Scores by name; those of the batch have `batch_` before it."""
    mixed = of_batches(points, types, studies)
    return of_types(points, types, studies) | {f"batch_{name}": score for name, score in mixed.items()}


def of_types(points: np.ndarray, types: np.ndarray, studies: np.ndarray, *lineage: Any) -> dict[str, Score]:
    return {score.metric: score for score in biology(space_of(points), "t", types, None, studies, *lineage)}


def of_batches(points: np.ndarray, types: np.ndarray, studies: np.ndarray) -> dict[str, Score]:
    return {score.metric: score for score in mixing(space_of(points), "d", studies, studies, "t", types, None)}


@settings(deadline=None, max_examples=50)
@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 30)), elements=st.integers(0, 19)),
    st.lists(st.integers(0, 6), min_size=20, max_size=20),
)
def test_entropy_is_scipy_s(neighbors: np.ndarray, batches: list[int]) -> None:
    found = neighbor_entropy(neighbors, np.array(batches))
    expected = [scipy_entropy(np.bincount(np.array(batches)[row])) for row in neighbors]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60), st.data())
def test_agreement_with_clusters_is_scikit_learn_s(cells: list[tuple[int, int]], data: st.DataObject) -> None:
    labels, clusters = np.array(cells).T
    rows = np.array(data.draw(st.lists(st.integers(0, len(cells) - 1), min_size=1, max_size=60)))
    for measure, theirs in (
        (normalized_mutual_information, normalized_mutual_info_score),
        (adjusted_rand_index, adjusted_rand_score),
    ):
        found = agreement(measure, labels, clusters)(rows)
        assert found == pytest.approx(theirs(labels[rows], clusters[rows]), abs=1e-9)


def test_types_apart_and_studies_mixed_is_as_good_as_it_gets() -> None:
    found = measured(*cells())
    for metric in ("leiden_nmi", "leiden_ari", "clisi", "classifier_svm", "classifier_forest", "classifier_lr"):
        assert found[metric].value > 0.95, metric
        assert found[metric].levels[CHANCE] < 0.7, metric
    assert found["silhouette_label"].value > 0.75
    assert found["silhouette_label"].levels[CHANCE] == pytest.approx(0.5, abs=0.03)
    for metric in ("entropy", "entropy_scaled", "ilisi", "kbet", "silhouette_batch"):
        score = found[f"batch_{metric}"]
        assert score.value == pytest.approx(score.levels[MIXED], abs=0.06), metric
    assert found["batch_entropy"].value == pytest.approx(found["batch_entropy"].levels[WITHIN], abs=0.02)
    assert found["batch_entropy_scaled"].value > 0.95
    assert found["batch_kbet"].value > 0.9
    for name in classify.NAMES:
        score = found[f"batch_classifier_{name}"]
        assert score.value == pytest.approx(score.levels[MIXED], abs=0.06)
        assert score.levels[MIXED] == pytest.approx(2 / 3, abs=0.05)


def test_studies_apart_is_seen_by_every_batch_metric() -> None:
    found = measured(*cells(of_study=24.0))  # other types of the same study are nearer than other studies
    for metric in ("entropy", "ilisi", "kbet", "classifier_svm", "classifier_forest", "classifier_lr"):
        assert found[f"batch_{metric}"].value < 0.06, metric
    assert found["batch_silhouette_batch"].value < 0.4
    assert found["classifier_svm"].value > 0.95


def test_types_mixed_up_is_chance() -> None:
    found = of_types(*cells(of_type=0.0))
    for metric in (
        "leiden_nmi",
        "leiden_ari",
        "silhouette_label",
        "clisi",
        *(f"classifier_{n}" for n in classify.NAMES),
    ):
        assert found[metric].value == pytest.approx(found[metric].levels[CHANCE], abs=0.06), metric


def test_each_interval_holds_its_value() -> None:
    for score in measured(*cells(of_type=3.0, of_study=1.5)).values():
        if score.low is not None and score.high is not None:
            assert score.low - 0.02 <= score.value <= score.high + 0.02, score
            assert score.high - score.low < 0.2


def test_values_are_those_of_the_libraries() -> None:
    points, types, studies = cells(of_type=3.0, of_study=1.5)
    names, codes = types.astype(str), np.unique(studies.astype(str), return_inverse=True)[1]
    distances, positions = NearestNeighbors(n_neighbors=90, algorithm="brute").fit(points).kneighbors(points)
    graph = NeighborsResults(indices=positions, distances=distances)
    found = measured(points, types, studies)
    assert found["silhouette_label"].value == pytest.approx(scib_metrics.silhouette_label(points, names), abs=1e-5)
    sklearn_s = (silhouette_score(points, names) + 1) / 2
    assert found["silhouette_label"].value == pytest.approx(sklearn_s, abs=1e-4)
    expected = scib_metrics.silhouette_batch(points, names, studies.astype(str))
    assert found["batch_silhouette_batch"].value == pytest.approx(expected, abs=1e-5)
    nmi_ari = scib_metrics.nmi_ari_cluster_labels_leiden(graph.subset_neighbors(15), names)
    assert found["leiden_nmi"].value == pytest.approx(nmi_ari["nmi"], abs=0.05)
    assert found["leiden_ari"].value == pytest.approx(nmi_ari["ari"], abs=0.08)
    assert found["clisi"].value == pytest.approx(scib_metrics.clisi_knn(graph, names), abs=1e-4)
    assert found["batch_ilisi"].value == pytest.approx(scib_metrics.ilisi_knn(graph, codes), abs=1e-4)
    assert found["batch_kbet"].value == pytest.approx(scib_metrics.kbet(graph.subset_neighbors(50), codes)[0], abs=1e-6)


def test_entropy_is_that_of_200_neighbours_in_nats() -> None:
    points, types, studies = cells(of_type=2.0, of_study=1.0)
    found = of_batches(points, types, studies)
    positions = (
        NearestNeighbors(n_neighbors=200, algorithm="brute").fit(points).kneighbors(points, return_distance=False)
    )
    entropies = [scipy_entropy(np.unique(studies[row].astype(str), return_counts=True)[1]) for row in positions]
    assert found["entropy"].value == pytest.approx(np.mean(entropies), abs=1e-6)


def test_donors_are_never_on_both_sides() -> None:
    """An embedding that knows each donor and nothing else: a split of cells finds the label, one of donors does not."""
    generator = np.random.default_rng(0)
    places = generator.normal(size=(30, 6)) * 20
    donors = np.repeat(np.arange(30), 20)
    codes = (np.arange(30) % 2)[donors]
    points = (places[donors] + generator.normal(size=(600, 6))).astype(np.float32)
    names = donors.astype(str).astype(object)
    split = classify.held_out(points, codes, names, "donors")
    assert split.held_out == "donors"
    assert np.sort(split.rows).tolist() == list(range(600))
    assert max(right.mean() for right in split.right.values()) < 0.75
    of_cells = classify.held_out(points, codes, None, "donors")
    assert of_cells.held_out == "cells"
    assert min(of_cells.right[name].mean() for name in ("svm", "forest")) > 0.9
    # a label that each donor has of his own cannot be held out by donor
    assert classify.held_out(points, donors % 3, (donors % 3).astype(str).astype(object), "donors").held_out == "cells"


def test_hierarchical_metrics_see_how_far_a_wrong_label_is() -> None:
    """Types one and two overlap; the same mistakes weigh less if the two have an ancestor in common."""
    points, types, studies = cells()
    generator = np.random.default_rng(1)
    mixed = np.isin(types, TYPES[:2])
    types[mixed] = TYPES[generator.integers(0, 2, mixed.sum())]
    # Columns: the three types, an ancestor of the first two.
    above = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0]], bool)
    found = of_types(points, types, studies, lambda names: above)
    accuracy = found["classifier_lr"].value
    assert 0.5 < accuracy < 0.8
    assert found["right_or_ancestor"].value == accuracy  # all labels are leaves
    wrong, terms = 1 - accuracy, 2 - (types == TYPES[2]).mean()
    assert found["hierarchical_f1"].value == pytest.approx((terms - wrong) / terms)
    assert found["hierarchical_precision"].value == found["hierarchical_recall"].value
    flat = of_types(points, types, studies, lambda names: np.eye(3, dtype=bool))
    assert flat["hierarchical_f1"].value == pytest.approx(accuracy)
    assert flat["hierarchical_f1"].levels[CHANCE] == pytest.approx(flat["classifier_lr"].levels[CHANCE])
    assert not {"hierarchical_f1", "right_or_ancestor"} & set(of_types(points, types, studies))


def test_intervals() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    low, high = interval(lambda rows: float(values[rows].mean()), None, 2000)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(2000), rel=0.2)
    donors = np.repeat(np.arange(20), 100).astype(str).astype(object)
    alike = np.repeat(np.random.default_rng(1).normal(size=20), 100)
    low, high = interval(lambda rows: float(alike[rows].mean()), donors, 2000)
    assert high - low == pytest.approx(2 * 1.96 * alike.std() / np.sqrt(20), rel=0.3)
    assert all(np.isnan(interval(lambda rows: float("nan"), None, 10)))


def test_the_measured_cells_stand_for_all() -> None:
    points, types, studies = cells(2 * N_CELLS, of_type=3.0, of_study=1.0)
    rows = np.sort(np.random.default_rng(0).choice(len(points), N_CELLS, replace=False))
    some = Space(points, rows, 0)
    found = {s.metric: s for s in mixing(some, "d", studies[rows], studies, "t", types[rows], None)}
    whole = of_batches(points, types, studies)
    for metric in ("entropy", "silhouette_batch", "classifier_lr"):
        assert found[metric].value == pytest.approx(whole[metric].value, abs=0.04), metric


@pytest.mark.parametrize("usable", [0, 1])
def test_too_few_labels(usable: int) -> None:
    points, types, studies = cells(100)
    types[:] = None if not usable else "B cell"
    types[:9] = "T cell"  # of nine cells
    with pytest.raises(UserError, match=f"cell_type has too few usable values, {usable} "):
        biology(space_of(points), "cell_type", types, None, studies)
    studies[:] = "one"
    with pytest.raises(UserError, match="dataset_id has one value, 'one'; there is nothing to mix"):
        mixing(space_of(points), "dataset_id", studies, studies, "cell_type", types, None)


def test_labels_of_no_use_are_left_out_and_it_is_said() -> None:
    points, types, studies = cells(N_CELLS + 45)
    types[:40] = None
    types[40:45] = "rare"
    found = measured(points, types, studies)
    assert found["leiden_nmi"].cells == found["silhouette_label"].cells == N_CELLS
    assert found["leiden_nmi"].note == "45 cells without a usable label excluded"
    assert found["batch_silhouette_batch"].cells == N_CELLS
    assert found["batch_entropy"].cells == N_CELLS + 45


def test_thousands_of_batches() -> None:
    points, types, _ = cells(2 * N_CELLS)
    numbers = np.arange(len(points))
    many = np.array([f"donor {number}" for number in numbers % 1300], dtype=object)
    found = of_batches(points, types, many)
    assert "entropy" in found and "ilisi" in found
    assert "classifier_svm" not in found  # no donor has ten cells
    fewer = np.array([f"donor {number}" for number in numbers % 140], dtype=object)
    found = of_batches(points, types, fewer)
    assert (
        found["classifier_svm"].note == "classifiers: the 100 most frequent of 140 values; classifiers: cells held out"
    )
