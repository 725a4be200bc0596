"""Labels by neighbours: what the reference knows is named, what it does not know is unknown."""

import logging

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from census_scvi.errors import UserError
from census_scvi.query.label_transfer import LabelTransfer
from census_scvi.query.neighbours import NeighbourIndex

CENTRES = {"B cell": (0, 0, 0), "T cell": (9, 0, 0), "monocyte": (0, 9, 0), "NK cell": (9, 9, 0)}


def blobs(
    n_cells: int, seed: int, labels: list[str] | None = None, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cells around the centres of their labels; `shift` moves a study as a whole."""
    generator = np.random.default_rng(seed)
    names = generator.choice(labels or list(CENTRES), n_cells)
    centres = np.array([CENTRES[name] for name in names], float)
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


def test_a_study_that_lies_apart_is_not_unknown_for_that_but_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    points, labels = blobs(800, 0)
    transfer = LabelTransfer(points, labels)
    logging.getLogger("census_scvi").addHandler(caplog.handler)
    found = transfer.predict(blobs(400, 2, shift=2.0)[0])
    logging.getLogger("census_scvi").removeHandler(caplog.handler)
    assert found.shift > 1.5
    assert f"the cells lie {found.shift:.1f} times as far from the reference" in caplog.text
    assert found.unknown.mean() < 0.2


def test_the_bound_is_set_between_studies_where_there_are_some() -> None:
    halves = [blobs(400, seed, shift=shift) for seed, shift in ((0, 0.0), (1, 2.0))]
    points, labels = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    apart = LabelTransfer(points, labels, np.repeat(["one", "other"], 400)).bound
    assert apart.typical > 1.5 * LabelTransfer(points, labels).bound.typical


def test_types_that_cannot_be_told_apart_make_nothing_unknown() -> None:
    points, _ = blobs(600, 0, ["B cell"])
    labels = np.random.default_rng(0).choice(["one", "two", "three"], 600).astype(object)
    assert LabelTransfer(points, labels).predict(blobs(300, 1, ["B cell"])[0]).unknown.mean() < 0.15


def test_few_types_and_few_cells() -> None:
    points, labels = blobs(100, 0, ["B cell"])
    one_type = LabelTransfer(points, labels)
    assert np.isnan(one_type.bound.left_out_found)
    assert one_type.predict(points).unknown.mean() < 0.05
    assert one_type.predict(points[:90] + 50).unknown.all()
    few = LabelTransfer(points[:3], labels[:3]).predict(points)
    assert (few.labels == "B cell").all()
    alone = LabelTransfer(points[:1], labels[:1]).predict(points)
    assert (alone.probability == 1).all()


def test_repeated_cells_do_no_harm() -> None:
    points, labels = blobs(60, 0)
    found = LabelTransfer(np.repeat(points, 20, axis=0), np.repeat(labels, 20)).predict(points)
    assert (found.labels == labels).all()
    assert np.isfinite(found.uncertainty).all()


def test_what_is_no_reference() -> None:
    points, labels = blobs(20, 0)
    with pytest.raises(UserError, match="has no cells"):
        LabelTransfer(points[:0], labels[:0])
    labels[3] = np.nan
    with pytest.raises(UserError, match="cells without a label"):
        LabelTransfer(points, labels)


def test_the_approximate_index_finds_the_neighbours() -> None:
    points = np.random.default_rng(0).normal(size=(5000, 20)).astype(np.float32)
    queries = np.random.default_rng(1).normal(size=(300, 20)).astype(np.float32)
    exact, approximate = NeighbourIndex(points), NeighbourIndex(points, exact_cells=10)
    assert exact.exact
    assert not approximate.exact
    _, true = exact.query(queries, 15)
    distances, found = approximate.query(queries, 15)
    shared = [len(set(one) & set(other)) for one, other in zip(true, found, strict=True)]
    assert np.mean(shared) / 15 > 0.99
    np.testing.assert_allclose(distances[:, 0], np.linalg.norm(points[found[:, 0]] - queries, axis=1), rtol=1e-4)
    again = NeighbourIndex(points, exact_cells=10).query(queries, 15)[1]
    assert np.array_equal(found, again)
