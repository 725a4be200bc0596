"""Labels by neighbours: what the reference knows is named, what it does not know is unknown."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.neighbors import KNeighborsClassifier

from census_scvi.annotation.label_transfer import LabelTransfer
from census_scvi.errors import UserError
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.neighbors.log_pca import log_normalized

CENTRES = {"B cell": (0, 0, 0), "T cell": (9, 0, 0), "monocyte": (0, 9, 0), "NK cell": (9, 9, 0)}


def blobs(
    n_cells: int, seed: int, labels: list[str] | None = None, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cells around the centres of their labels; `shift` moves a study as a whole."""
    generator = np.random.default_rng(seed)
    names = generator.choice(labels or list(CENTRES), n_cells)
    centres = np.array([CENTRES[name] for name in names], float).reshape(-1, 3)
    return (centres + generator.normal(size=(n_cells, 3)) + shift).astype(np.float32), names.astype(object)


def test_labels_are_those_of_the_neighbours() -> None:
    points, labels = blobs(600, 0)
    query, truth = blobs(300, 1)
    found = LabelTransfer(points, labels).predict(query)
    assert (found.labels == truth).mean() > 0.98
    plain = KNeighborsClassifier(15).fit(points, labels.astype(str)).predict(query)
    assert (found.labels == plain).mean() > 0.99
    assert ((found.probability > 1 / len(CENTRES)) & (found.probability <= 1.00001)).all()
    assert found.shift == pytest.approx(1, abs=0.2)
    assert ((found.uncertainty >= 0) & (found.uncertainty < 1)).all()
    assert np.array_equal(found.unknown, found.uncertainty > 0.5)


@pytest.mark.parametrize("label", CENTRES)
def test_a_type_that_the_reference_lacks_is_unknown(label: str) -> None:
    known = [name for name in CENTRES if name != label]
    points, labels = blobs(800, 0, known)
    transfer = LabelTransfer(points, labels)
    new, _ = blobs(200, 1, [label])
    seen, _ = blobs(200, 2, known)
    assert transfer.predict(seen).unknown.mean() < 0.1
    both = transfer.predict(np.concatenate([seen, new[:90]])).unknown
    assert both[200:].mean() > 0.95
    assert transfer.predict(new[:90]).unknown.mean() > 0.95  # too few to be a study of their own
    assert transfer.bound.known_kept > 0.8
    assert transfer.bound.left_out_found > 0.8


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("census_scvi"), "propagate", True)
    return caplog


def studies(offsets: dict[str, float], n_cells: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference cells of several studies, each moved by an offset."""
    parts = [blobs(n_cells, seed, shift=offset) for seed, offset in enumerate(offsets.values())]
    points, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    return points, labels, np.repeat(list(offsets), n_cells)


def test_a_study_as_far_as_the_references_own_is_corrected_for_it(messages: pytest.LogCaptureFixture) -> None:
    transfer = LabelTransfer(*studies({"one": 0.0, "two": 0.5, "three": 2.0}))
    found = transfer.predict(blobs(400, 7, shift=-1.2)[0])
    assert 1.1 < found.corrected_by == found.shift < transfer.bound.usual_ratio * 1.1
    assert not found.far
    assert found.unknown.mean() < 0.1
    assert "distance ratio" not in messages.text


@pytest.mark.parametrize("groups", [None, {"one": 0.0, "two": 0.2}], ids=["one study", "two studies"])
def test_a_study_that_is_farther_than_usual_is_not_corrected_and_it_is_said(
    groups: dict[str, float] | None, messages: pytest.LogCaptureFixture
) -> None:
    transfer = LabelTransfer(*(studies(groups) if groups else blobs(800, 0)))
    found = transfer.predict(blobs(400, 2, shift=2.0)[0])
    assert (found.far, found.corrected_by) == (True, 1.0)
    assert found.shift > 1.5
    assert f"the distance ratio of the cells to the reference is {found.shift:.1f}" in messages.text
    assert ("it has one study with enough cells" in messages.text) == (groups is None)
    quiet = LabelTransfer(*blobs(800, 0)).predict(blobs(400, 3)[0])
    assert (quiet.far, round(quiet.shift, 1)) == (False, 1.0)
    assert messages.text.count("the distance ratio of the cells") == 1


@pytest.mark.parametrize("spread", [1.0, 1.3], ids=["same chemistry", "another chemistry"])
@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.6, 1.0])
@pytest.mark.parametrize("n_studies", [1, 3])
def test_a_missing_type_is_found_however_many_of_the_cells_are_of_it(
    n_studies: int, share: float, spread: float
) -> None:
    """And as often as the reference says that it will be."""
    known = [name for name in CENTRES if name != "NK cell"]
    parts = [blobs(500, seed, known) for seed in range(n_studies)]
    points, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    groups = np.repeat([f"study {n}" for n in range(n_studies)], 500)
    transfer = LabelTransfer(points, labels, groups if n_studies > 1 else None)
    new, _ = blobs(max(int(600 * share), 1), 11, ["NK cell"])
    old, _ = blobs(600 - len(new), 12, known)
    cells = np.concatenate([new, old])
    noise = np.random.default_rng(13).normal(size=cells.shape) * np.sqrt(spread**2 - 1)
    found = transfer.predict((cells + noise).astype(np.float32))
    assert transfer.bound.left_out_found > 0.9
    assert found.unknown[: len(new)].mean() > transfer.bound.left_out_found - 0.1
    if len(old):
        assert found.unknown[len(new) :].mean() < 1 - transfer.bound.known_kept + 0.1
    assert found.far or share < 0.5


def test_what_is_expected_is_measured_with_the_correction() -> None:
    """Studies that differ as much as types do: a missing type is hidden by what is corrected, and that is said."""
    offsets = {"one": 0.0, "two": 4.0, "three": -4.0, "four": 0.5}
    points, labels, groups = studies(offsets, 300)
    apart = LabelTransfer(points, labels, groups).bound
    together = LabelTransfer(*blobs(1200, 0)).bound
    assert apart.usual_ratio > 1.1
    assert np.isnan(together.usual_ratio)
    assert apart.left_out_found < 0.6 < together.left_out_found
    assert apart.known_kept > 0.8


def test_types_that_cannot_be_told_apart_make_nothing_unknown() -> None:
    points, _ = blobs(600, 0, ["B cell"])
    labels = np.random.default_rng(0).choice(["one", "two", "three"], 600).astype(object)
    assert LabelTransfer(points, labels).predict(blobs(300, 1, ["B cell"])[0]).unknown.mean() < 0.15


def test_one_type() -> None:
    points, labels = blobs(100, 0, ["B cell"])
    one_type = LabelTransfer(points, labels)
    assert np.isnan(one_type.bound.left_out_found)
    assert one_type.predict(points).unknown.mean() < 0.05
    assert one_type.predict(points[:90] + 50).unknown.all()


@pytest.mark.parametrize("n_labels", [1, 4, 8, 16], ids=lambda n: f"{n} labels")
def test_rare_types_have_a_threshold_too(n_labels: int) -> None:
    """Of 16 cells, no label has the ten that make one count."""
    points, _ = blobs(16, 0, ["B cell"])
    transfer = LabelTransfer(points, np.array([f"type {n % n_labels}" for n in range(16)], dtype=object))
    assert np.isfinite(transfer.bound.distance)
    assert transfer.predict(points + 50).unknown.all()
    assert transfer.predict(points).unknown.mean() < 0.5


@pytest.mark.parametrize(
    ("n_cells", "copies", "n_neighbors"), [(0, 1, 15), (1, 1, 15), (5, 1, 15), (15, 1, 15), (3, 40, 15), (1, 1, 1)]
)
def test_too_few_cells_are_no_reference(n_cells: int, copies: int, n_neighbors: int) -> None:
    points, labels = (np.repeat(values[:n_cells], copies, axis=0) for values in blobs(20, 0))
    different = f", {n_cells} of them different," if copies > 1 else ""
    message = (
        f"the reference has {n_cells * copies} labelled cells?{different} and n_neighbors={n_neighbors} needs"
        f" {n_neighbors + 1} or more"
    )
    with pytest.raises(UserError, match=message):
        LabelTransfer(points, labels, n_neighbors=n_neighbors)
    assert LabelTransfer(*blobs(n_neighbors + 1, 0), n_neighbors=n_neighbors).predict(points).unknown.shape == (
        len(points),
    )


@pytest.mark.parametrize("copies", [2, 20])
def test_copies_of_a_cell_count_once(copies: int) -> None:
    """Published in two studies, or many times: neither threshold nor votes change."""
    points, labels = blobs(60, 0)
    query, _ = blobs(200, 1)
    groups = np.array([f"study {n % 2}" for n in range(60)])
    once, often = (
        LabelTransfer(*(np.repeat(values, n, axis=0) for values in (points, labels, groups))) for n in (1, copies)
    )
    assert often.bound.distance == once.bound.distance > 0
    for name in ("labels", "probability", "unknown"):
        assert np.array_equal(getattr(often.predict(query), name), getattr(once.predict(query), name))


def test_cells_without_counts_are_unknown_and_do_not_count() -> None:
    points, labels = blobs(600, 0)
    transfer = LabelTransfer(points, labels)
    query, _ = blobs(200, 1)
    nowhere = np.full((300, 3), 4.5, np.float32)  # where a decoder of zeros may lie: far from all
    for place in (nowhere, np.repeat(points[:1], 300, axis=0)):
        found = transfer.predict(np.concatenate([query, place]), empty=np.arange(500) >= 200)
        assert found.unknown[200:].all()
        assert (found.uncertainty[200:] == 1).all()
        assert (found.probability[200:] == 0).all()
        assert not found.far
        assert np.array_equal(found.unknown[:200], transfer.predict(query).unknown)
    assert transfer.predict(nowhere, empty=np.ones(300, bool)).unknown.all()


def test_what_is_no_reference() -> None:
    points, labels = blobs(20, 0)
    for wrong in (0, -3, 2.5, True):
        with pytest.raises(UserError, match="expected a whole number of 1 or more"):
            LabelTransfer(points, labels, n_neighbors=wrong)
    points[2] = np.nan
    with pytest.raises(UserError, match="cells without a finite position"):
        LabelTransfer(points, labels)
    labels[3] = np.nan
    with pytest.raises(UserError, match="cells without a label"):
        LabelTransfer(points, labels)


def test_the_approximate_index_finds_the_neighbours() -> None:
    points = np.random.default_rng(0).normal(size=(5000, 20)).astype(np.float32)
    queries = np.random.default_rng(1).normal(size=(300, 20)).astype(np.float32)
    exact, approximate = NeighborIndex(points), NeighborIndex(points, exact_cells=10)
    assert exact.exact
    assert not approximate.exact
    _, true = exact.query(queries, 15)
    distances, found = approximate.query(queries, 15)
    shared = [len(set(one) & set(other)) for one, other in zip(true, found, strict=True)]
    assert np.mean(shared) / 15 > 0.99
    np.testing.assert_allclose(distances[:, 0], np.linalg.norm(points[found[:, 0]] - queries, axis=1), rtol=1e-4)
    again = NeighborIndex(points, exact_cells=10).query(queries, 15)[1]
    assert np.array_equal(found, again)


@settings(max_examples=50)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 3)), elements=st.integers(-3, 3)),
    st.integers(1, 8),
)
def test_the_others_of_a_cell_are_its_nearest_and_never_itself(points: np.ndarray, n_neighbors: int) -> None:
    """Copies among them: as many cells at the same place as there are."""
    found = NeighborIndex(points).others(n_neighbors)
    assert found.shape == (len(points), min(n_neighbors, len(points) - 1))
    assert not (found == np.arange(len(points))[:, None]).any()
    away = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=2)
    np.fill_diagonal(away, np.inf)
    nearest = np.sort(away, axis=1)[:, : found.shape[1]]
    np.testing.assert_allclose(np.sort(np.take_along_axis(away, found, axis=1), axis=1), nearest, atol=1e-6)


def test_the_approximate_index_leaves_the_cell_itself_out() -> None:
    points = np.random.default_rng(0).normal(size=(600, 5)).astype(np.float32)
    exact, approximate = (NeighborIndex(points, exact_cells=cells).others(15) for cells in (1000, 10))
    assert not (approximate == np.arange(600)[:, None]).any()
    assert np.mean([len(np.intersect1d(*pair)) for pair in zip(exact, approximate, strict=True)]) > 14.5


@pytest.mark.parametrize(("dtype", "rounding"), [(np.float64, 1e-12), (np.float32, 1e-6), (np.int64, 1e-6)])
@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray])
def test_counts_are_log_normalized_within_each_cell(dtype: type, rounding: float, form: Callable[[Any], Any]) -> None:
    counts = np.random.default_rng(0).poisson(0.5, (40, 30)).astype(dtype)
    counts[3] = 0
    given = form(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = log_normalized(given)
    totals = counts.sum(axis=1, keepdims=True)
    expected = np.log1p(counts * (1e4 / np.where(totals, totals, 1)))
    assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_allclose(found.toarray() if sp.issparse(found) else found, expected, rtol=rounding)
    assert np.array_equal(given.toarray() if sp.issparse(given) else given, counts)
