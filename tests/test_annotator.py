"""Annotation of a user's cells with labels of an atlas: columns of obs, quality in uns, what is refused."""

from __future__ import annotations

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

from census_scvi.annotation.annotate_labels import annotate_labels
from census_scvi.annotation.labelled.atlas import Counts, join_atlas
from census_scvi.annotation.labelled.sample import draw_balanced
from census_scvi.annotation.methods import TITLES
from census_scvi.annotation.results.columns import EMPTY, PREDICTION, add_results, results_of
from census_scvi.annotation.validation.held_out import HeldOut
from census_scvi.errors import UserError
from census_scvi.pictures.annotation_quality import draw_quality

N_GENES, TYPES = 60, np.array(["B cell", "T cell", "monocyte"], dtype=object)
GENES = [f"gene{n}" for n in range(N_GENES)]
ALL = np.ones(N_GENES, bool)


def cells(n_cells: int, seed: int, n_types: int = 3) -> tuple[sp.csr_matrix, np.ndarray]:
    """Raw counts and labels: each type has twenty genes of its own, cells differ in depth."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, n_types, n_cells)
    rates = np.where(np.arange(N_GENES) // 20 == codes[:, None], 3.0, 1.0)
    depth = generator.uniform(0.3, 2, (n_cells, 1))
    return sp.csr_matrix(generator.poisson(rates * depth).astype(np.float32)), TYPES[codes]


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


def annotated(
    reference: ad.AnnData,
    mine: ad.AnnData,
    counts: tuple[sp.csr_matrix, sp.csr_matrix] | None = None,
    *,
    method: str = "fast",
    measured: np.ndarray = ALL,
    batch_key: tuple[str, ...] = (),
) -> dict:
    """The quality of the annotation in uns; the results are written into `mine`."""
    both = None if counts is None else Counts(counts[1], lambda rows: counts[0][rows], GENES, measured, 10_000)
    joined = join_atlas(
        mine, reference, ["cell_type"], both, batch_key=batch_key, n_neighbors=15, seed=0, embedding="X_scvi",
        latent="scvi",
    )  # fmt: skip
    found = annotate_labels(joined, method, steps=50)
    empty = mine.obs[EMPTY].to_numpy(dtype=bool)
    add_results(mine, results_of(found, joined.query_rows, mine.obs_names, quality=PREDICTION, empty=empty))
    return mine.uns[PREDICTION]["cell_type"]


@pytest.mark.parametrize("latent_of", ["good", "poor"])
def test_a_user_sees_whether_the_model_helps(latent_of: str, tmp_path: Path) -> None:
    reference, counts, mine, query = atlas_cells(latent_of)
    found = annotated(reference, mine, (counts, query), method="neighbors", measured=np.arange(N_GENES) % 5 > 0)
    assert found["held_out_by"] == "dataset_id"
    assert found["baseline_cells"] == 400
    right = {name: score["accuracy"] for name, score in found["held_out"].items()}
    assert set(right) == {"neighbors", "pca", "logistic_regression"}
    for name in ("pca", "logistic_regression"):
        assert (mine.obs[f"cell_type_{name}"].astype(str) == mine.obs["truth"]).mean() > 0.9
    if latent_of == "good":
        assert right["neighbors"] > 0.99
        assert min(found["agreement"].values()) > 0.9
    else:
        assert right["neighbors"] < 0.5 < right["pca"]
        assert max(found["agreement"].values()) < 0.6
    warned = any("on held-out reference cells" in warning for warning in found["warnings"])
    assert warned == (latent_of == "poor")
    draw_quality(found, "cell type", TITLES).savefig(tmp_path / "quality.png")
    assert matplotlib.image.imread(tmp_path / "quality.png").std() > 0.05
    mine.write_h5ad(tmp_path / "mine.h5ad")
    stored = sc.read_h5ad(tmp_path / "mine.h5ad")
    assert stored.obs["cell_type_pca"].equals(mine.obs["cell_type_pca"])
    assert set(stored.uns[PREDICTION]["cell_type"]["batches"]["batch"]) == {"all"}


def test_members_and_their_agreement(tmp_path: Path) -> None:
    reference, counts, mine, query = atlas_cells("poor")
    mine.obs["lane"] = np.where(np.arange(100) % 2, "a/b", "c")
    found = annotated(reference, mine, (counts, query), batch_key=("lane",))
    assert found["members"] == ["harmony", "logistic_regression"]
    assert list(found["batches"]["batch"]) == ["a/b", "c"]
    mine.obs["day"] = np.where(np.arange(100) < 50, "x y", "x")
    mine.obs["plate"] = np.where(np.arange(100) < 50, "z", "y z")  # "x y" and "z" are not "x" and "y z"
    assert list(annotated(reference, mine, (counts, query), batch_key=("day", "plate"))["batches"]["batch"]) == [
        "x y|z",
        "x|y z",
    ]
    both = np.stack([mine.obs[f"cell_type_{name}"].astype(str) for name in found["members"]])
    expected = (both == mine.obs["cell_type_best"].astype(str).to_numpy()).mean(axis=0)
    np.testing.assert_allclose(mine.obs["cell_type_agreement"], expected)
    assert "cell_type_neighbors" in mine.obs  # what it is compared with
    assert (mine.obs["cell_type_best"].astype(str) == mine.obs["truth"]).mean() > 0.9
    mine.write_h5ad(tmp_path / "mine.h5ad")
    with pytest.raises(UserError, match=r"batch_key: the cells have no obs column 'lanes'; obs has scvi_empty, truth"):
        annotated(reference, mine, (counts, query), batch_key=("lanes",))


def test_without_counts_the_neighbors_in_the_embedding_annotate() -> None:
    reference, counts, mine, query = atlas_cells("good")
    found = annotated(reference, mine)
    assert found["method"] == "neighbors"
    assert "cell_type_pca" not in mine.obs
    assert (mine.obs["cell_type_best"].astype(str) == mine.obs["truth"]).mean() > 0.95
    # Counts that say nothing: of one gene, or none.
    for nothing in (counts * 0, sp.csr_matrix(counts.multiply(np.arange(N_GENES) == 3))):
        assert annotated(reference, mine, (nothing, query))["method"] == "neighbors"
    some = sp.vstack([counts[:100] * 0, counts[100:]]).tocsr()
    assert annotated(reference, mine, (some, query))["baseline_cells"] == 300


def test_one_label_has_nothing_to_compare_with() -> None:
    reference, counts, mine, query = atlas_cells("good")
    reference.obs["cell_type"] = "B cell"
    found = annotated(reference, mine, (counts, query))
    assert set(mine.obs["cell_type_best"]) == {"B cell"}
    assert "held_out" not in found
    with pytest.raises(UserError, match="there are no held-out cells to measure accuracy"):
        draw_quality(found, "cell type", TITLES)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "unknown", "nan", "", "Unlabeled"], ids=repr)
def test_cells_without_a_label_teach_nothing(missing: object) -> None:
    reference, _, mine, _ = atlas_cells("good")
    labels = reference.obs["cell_type"].astype(object)
    labels[(labels == "monocyte").to_numpy()] = missing
    reference.obs["cell_type"] = labels
    found = annotated(reference, mine)
    assert found["classes"] == ["B cell", "T cell"]
    assert found["reference_cells"] == labels.isin(found["classes"]).sum()
    reference.obs["cell_type"] = pd.Series(missing, index=reference.obs_names, dtype=object)
    with pytest.raises(UserError, match="none of the 400 reference cells has a cell_type; change obs_filter"):
        annotated(reference, mine)


def test_an_unknown_cell_keeps_its_most_probable_label() -> None:
    reference, _, mine, _ = atlas_cells("good")
    truth, latent = mine.obs["truth"].to_numpy(), reference.obsm["scvi"]
    middles = np.stack([latent[reference.obs["cell_type"] == name].mean(axis=0) for name in TYPES])
    mine.obsm["X_scvi"][:50] += 20 * null_space(middles)[:, 0]  # far from all types, and still nearest to their own
    mine.obs[EMPTY] = np.arange(100) >= 90
    annotated(reference, mine)
    found = {name: mine.obs[f"cell_type_{name}"].astype(str).to_numpy() for name in ("predicted", "best")}
    assert (found["predicted"][:50] == "unknown").mean() > 0.9
    assert (found["best"][:50] == truth[:50]).mean() > 0.9
    assert (found["best"][50:90] == truth[50:90]).mean() > 0.9
    assert set(found["best"][90:]) == {"unknown"}  # without counts there is no most probable label
    assert (mine.obs["cell_type_probability"][90:] == 0).all()


@pytest.mark.parametrize("n_cells", [1, 3, 15])
def test_few_reference_cells_are_refused(n_cells: int) -> None:
    reference, _, mine, _ = atlas_cells("good")
    with pytest.raises(UserError, match=f"{n_cells} labelled cells? and n_neighbors=15 needs 16 or more"):
        annotated(reference[:n_cells].copy(), mine)
    copies = reference[np.zeros(50, int)].copy()
    copies.obs_names_make_unique()
    with pytest.raises(UserError, match="50 labelled cells, 1 of them different, and n_neighbors=15 needs 16 or more"):
        annotated(copies, mine)


@given(st.lists(st.integers(0, 5), max_size=80), st.integers(1, 90), st.integers(1, 30) | st.none())
def test_a_balanced_sample(codes: list[int], size: int, per_type: int | None) -> None:
    labels = np.array([None if code == 5 else f"type {code}" for code in codes], dtype=object)
    rows = draw_balanced(labels, size, np.random.default_rng(0), per_type=per_type)
    labelled = np.flatnonzero([label is not None for label in labels])
    assert len(rows) <= size
    assert np.array_equal(rows, np.unique(rows))
    assert set(rows) <= set(labelled)
    whole = pd.Series(labels[labelled], dtype=object).value_counts().clip(upper=per_type)
    if whole.sum() <= size:
        assert len(rows) == whole.sum()
        return
    drawn = pd.Series(labels[rows], dtype=object).value_counts().reindex(whole.index, fill_value=0)
    cut = drawn < whole
    assert drawn[cut].nunique() == 1  # what is not complete is equally large, and not smaller than the others
    assert (drawn[~cut] <= drawn[cut].iloc[0]).all()
    assert len(rows) > size - len(whole)
