"""Label transfer, its baselines, and their accuracy on held-out studies."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from census_scvi.annotation.annotator import EMPTY, PREDICTION, TITLES, Annotator
from census_scvi.annotation.baselines import Baselines
from census_scvi.annotation.held_out import HeldOut, hold_out
from census_scvi.annotation.label_transfer import METHODS
from census_scvi.errors import UserError
from census_scvi.pictures.annotation_quality import draw_quality

N_GENES, TYPES = 60, np.array(["B cell", "T cell", "monocyte"], dtype=object)


def cells(n_cells: int, seed: int, n_types: int = 3) -> tuple[sp.csr_matrix, np.ndarray]:
    """Raw counts and labels: each type has twenty genes of its own, cells differ in depth."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, n_types, n_cells)
    rates = np.where(np.arange(N_GENES) // 20 == codes[:, None], 3.0, 1.0)
    depth = generator.uniform(0.3, 2, (n_cells, 1))
    return sp.csr_matrix(generator.poisson(rates * depth).astype(np.float32)), TYPES[codes]


ALL = np.ones(N_GENES, bool)


def test_baselines_are_what_scanpy_and_scikit_learn_give() -> None:
    (counts, labels), (query, truth) = cells(300, 0), cells(200, 1)
    genes = np.arange(N_GENES) % 5 != 0
    both = ad.AnnData(sp.vstack([counts, query])[:, genes].tocsr())
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    logged, other = both.X.toarray()[:300], both.X.toarray()[300:]
    pca = PCA(47, random_state=0).fit(logged)
    neighbors = KNeighborsClassifier(15, weights="distance").fit(pca.transform(logged), labels.astype(str))
    regression = LogisticRegression(C=0.1, max_iter=300).fit(logged, labels.astype(str))
    found = Baselines(counts, labels, genes).predict(query)
    assert (found["pca"][0] == neighbors.predict(pca.transform(other))).mean() > 0.97
    assert (found["logistic_regression"][0] == regression.predict(other)).all()
    np.testing.assert_allclose(
        found["logistic_regression"][1], regression.predict_proba(other).max(axis=1), atol=1e-3, rtol=0
    )
    for named, sure in found.values():
        assert (named == truth).mean() > 0.9
        assert ((sure > 1 / 3) & (sure <= 1.00001)).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 1)), min_size=1, max_size=60))
def test_curves_of_any_cells(found: list[tuple[bool, float]]) -> None:
    right, probability = (np.array(values) for values in zip(*found, strict=True))
    truth = np.full(len(right), "a", dtype=object)
    score = HeldOut.of(truth, (np.where(right, "a", "b").astype(object), probability))
    assert score.accuracy == pytest.approx(right.mean())
    assert score.risk[-1] == pytest.approx(1 - right.mean())
    assert len(score.risk) == len(score.coverage) == 20
    assert ((score.risk >= 0) & (score.risk <= 1)).all()
    assert 0 <= score.calibration_error <= 1


def test_a_calibrated_and_sure_guesser() -> None:
    """Right with the probability that it gives: known error at every coverage."""
    generator = np.random.default_rng(0)
    probability = generator.uniform(0, 1, 200_000)
    right = generator.uniform(0, 1, 200_000) < probability
    score = HeldOut.of(np.full(200_000, "a", dtype=object), (np.where(right, "a", "b").astype(object), probability))
    assert score.calibration_error < 0.01
    np.testing.assert_allclose(score.risk, score.coverage / 2, atol=0.01)
    overconfident = HeldOut.of(
        np.full(200_000, "a", dtype=object), (np.where(right, "a", "b").astype(object), np.sqrt(probability))
    )
    assert overconfident.calibration_error == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
    np.testing.assert_allclose(overconfident.risk, score.risk)


def test_a_type_is_only_held_out_where_another_study_has_it() -> None:
    counts, labels = cells(240, 0)
    studies = np.repeat(np.array(["one", "two"], dtype=object), 120)
    labels[:120][labels[:120] == "monocyte"] = "B cell"  # of the second study alone
    latent = np.random.default_rng(0).normal(size=(240, 4)).astype(np.float32)
    found = hold_out(latent, counts, labels, studies, ALL)
    # One way labels of two types, the other way all: monocytes are no test case, and a label that can be given.
    assert set(found) == {"scvi", "pca", "logistic_regression"}
    assert found["pca"].accuracy > 0.6 > found["scvi"].accuracy
    alone = np.where(studies == "one", "B cell", "T cell").astype(object)
    assert hold_out(latent, counts, alone, studies, ALL) == {}


@pytest.mark.parametrize("method", METHODS)
def test_held_out_cells_do_not_name_themselves(method: str) -> None:
    """A latent that tells every cell but no type: whatever names held-out cells rightly has seen them."""
    counts, _ = cells(300, 0)
    generator = np.random.default_rng(5)
    labels = generator.choice(TYPES, 300)
    latent = generator.normal(size=(300, 5)).astype(np.float32)
    for studies in (None, generator.choice(np.array(["one", "two", "three", "four"], dtype=object), 300)):
        for score in hold_out(latent, counts, labels, studies, ALL, method=method).values():
            assert score.accuracy == pytest.approx(1 / 3, abs=0.1)


def atlas_cells(latent_of: str) -> tuple[ad.AnnData, sp.csr_matrix, ad.AnnData, sp.csr_matrix]:
    """A reference of two studies and a query, with a latent that knows the type (`good`), or nothing (`poor`)."""
    generator = np.random.default_rng(0)
    (counts, labels), (query, truth) = cells(400, 0), cells(100, 1)
    places = {label: generator.normal(size=4) * 10 for label in TYPES}

    def latent(names: np.ndarray) -> np.ndarray:
        known = np.stack([places[name] for name in names]) if latent_of == "good" else 0
        return (known + generator.normal(size=(len(names), 4))).astype(np.float32)

    obs = pd.DataFrame({"cell_type": labels, "dataset_id": generator.choice(["a", "b"], 400), "donor_id": "d"})
    obs.index = obs.index.astype(str)
    reference = ad.AnnData(obs=obs, obsm={"scvi": latent(labels)})
    mine = ad.AnnData(obs=pd.DataFrame({EMPTY: False, "truth": truth}, index=[str(n) for n in range(100)]))
    mine.obsm["X_scvi"] = latent(truth)
    return reference, counts, mine, query


@pytest.mark.parametrize("latent_of", ["good", "poor"])
def test_a_user_sees_whether_the_model_helps(
    latent_of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("census_scvi"), "propagate", True)
    reference, counts, mine, query = atlas_cells(latent_of)
    annotator = Annotator(reference, "scvi", "cell_type")
    with caplog.at_level(logging.INFO):
        annotator.annotate(mine, "X_scvi")
        annotator.compare(mine, [query[:60], query[60:]], counts, np.arange(400), ALL)
    prediction = mine.uns[PREDICTION]["cell_type"]
    assert prediction["held_out_by"] == "dataset_id"
    assert prediction["baseline_cells"] == 400
    right = {name: score["accuracy"] for name, score in prediction["held_out"].items()}
    for name in ("pca", "logistic_regression"):
        assert (mine.obs[f"cell_type_{name}"].astype(str) == mine.obs["truth"]).mean() > 0.9
    assert "cell_type, accuracy on held-out reference cells (by dataset_id): model" in caplog.text
    if latent_of == "good":
        assert right["scvi"] > 0.99
        assert min(prediction["agreement"].values()) > 0.9
        assert "look at" not in caplog.text
    else:
        assert right["scvi"] < 0.5 < right["pca"]
        assert max(prediction["agreement"].values()) < 0.6
        assert "compare with obs['cell_type_" in caplog.text
    draw_quality(prediction, "cell type", TITLES).savefig(tmp_path / "quality.png")
    assert matplotlib.image.imread(tmp_path / "quality.png").std() > 0.05
    mine.write_h5ad(tmp_path / "mine.h5ad")
    assert sc.read_h5ad(tmp_path / "mine.h5ad").obs["cell_type_pca"].equals(mine.obs["cell_type_pca"])


def test_one_label_has_nothing_beside_it() -> None:
    reference, counts, mine, query = atlas_cells("good")
    reference.obs["cell_type"] = "B cell"
    annotator = Annotator(reference, "scvi", "cell_type", method="logistic_regression")
    annotator.annotate(mine, "X_scvi")
    annotator.compare(mine, [query], counts, np.arange(400), ALL)
    assert "held_out" not in mine.uns[PREDICTION]["cell_type"]
    with pytest.raises(UserError, match="there are no held-out cells to measure accuracy"):
        draw_quality(mine.uns[PREDICTION]["cell_type"], "cell type", TITLES)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "unknown", "nan", ""], ids=repr)
def test_cells_without_a_label_teach_nothing(missing: object) -> None:
    reference, _, mine, _ = atlas_cells("good")
    labels = reference.obs["cell_type"].astype(object)
    labels[(labels == "monocyte").to_numpy()] = missing
    reference.obs["cell_type"] = labels
    annotator = Annotator(reference, "scvi", "cell_type")
    annotator.annotate(mine, "X_scvi")
    found = mine.uns[PREDICTION]["cell_type"]
    assert found["classes"] == ["B cell", "T cell"]
    assert found["reference_cells"] == labels.isin(found["classes"]).sum()
    reference.obs["cell_type"] = pd.Series(missing, index=reference.obs_names, dtype=object)
    with pytest.raises(UserError, match="none of the 400 reference cells has a cell_type; change obs_filter"):
        Annotator(reference, "scvi", "cell_type")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_cell_keeps_its_most_probable_label(method: str) -> None:
    reference, _, mine, _ = atlas_cells("good")
    truth, latent = mine.obs["truth"].to_numpy(), reference.obsm["scvi"]
    middles = np.stack([latent[reference.obs["cell_type"] == name].mean(axis=0) for name in TYPES])
    mine.obsm["X_scvi"][:50] += 20 * null_space(middles)[:, 0]  # far from all types, and still nearest to their own
    mine.obs[EMPTY] = np.arange(100) >= 90
    Annotator(reference, "scvi", "cell_type", method=method).annotate(mine, "X_scvi")
    found = {name: mine.obs[f"cell_type_{name}"].astype(str).to_numpy() for name in ("predicted", "best")}
    assert (found["predicted"][:50] == "unknown").mean() > 0.9
    assert (found["best"][:50] == truth[:50]).mean() > 0.6  # of three types: a forest is less sure out there
    assert np.array_equal(found["best"][50:], found["predicted"][50:])
    assert set(found["best"][90:]) == {"unknown"}  # without counts there is no most probable label


@pytest.mark.parametrize("n_cells", [1, 3, 15])
def test_few_reference_cells_are_refused(n_cells: int) -> None:
    reference, _, _, _ = atlas_cells("good")
    with pytest.raises(UserError, match=f"{n_cells} labelled cells? and n_neighbors=15 needs 16 or more"):
        Annotator(reference[:n_cells].copy(), "scvi", "cell_type")


@pytest.mark.parametrize("studies", ["none", "one label each"])
def test_what_cannot_be_held_out_is_said(studies: str, caplog: pytest.LogCaptureFixture) -> None:
    reference, counts, mine, query = atlas_cells("good")
    rows = np.arange(4)
    if studies == "none":
        reference.obs["dataset_id"], reference.obs["donor_id"] = "a", "b"
        labels, expected = ["a", "a", "b", "b"], "the reference has too few cells"
    else:
        reference.obs["dataset_id"] = np.where(np.arange(reference.n_obs) % 2, "a", "b")
        labels, expected = ["a", "b", "a", "b"], "no label is in two values of dataset_id"
    reference.obs["cell_type"] = reference.obs["cell_type"].astype(object)
    reference.obs.loc[reference.obs_names[:4], "cell_type"] = labels
    annotator = Annotator(reference, "scvi", "cell_type")
    annotator.annotate(mine, "X_scvi")
    with caplog.at_level(logging.INFO):
        annotator.compare(mine, [query], counts[:4], rows, ALL)
    assert f"no accuracy on held-out cells, because {expected}" in caplog.text


def test_counts_that_tell_nothing_are_not_compared_with(caplog: pytest.LogCaptureFixture) -> None:
    """Cells without counts, and counts of a single gene: there is nothing to compare the model with."""
    reference, counts, mine, query = atlas_cells("good")
    annotator = Annotator(reference, "scvi", "cell_type")
    annotator.annotate(mine, "X_scvi")
    for genes in (np.zeros(N_GENES, bool), np.arange(N_GENES) == 3):
        annotator.compare(mine, [query], counts, np.arange(400), genes)
    annotator.compare(mine, [query], counts * 0, np.arange(400), ALL)
    assert "held_out" not in mine.uns[PREDICTION]["cell_type"]
    some = sp.vstack([counts[:100] * 0, counts[100:]]).tocsr()
    annotator.compare(mine, [query], some, np.arange(400), ALL)
    assert mine.uns[PREDICTION]["cell_type"]["baseline_cells"] == 300
