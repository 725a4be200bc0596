"""The Cell Ontology: which terms are above labels, which name is certain enough, and how predictions are scored."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import expit, logit

from census_scvi.annotation import ontology
from census_scvi.annotation.methods import create
from census_scvi.annotation.ontology import Hierarchy, back_off, build_hierarchy, calibrated_threshold, term_columns
from census_scvi.annotation.protocol import Cells
from census_scvi.annotation.results.groups import group_columns, label_groups
from census_scvi.census.ontology import cell_ontology
from census_scvi.metrics.hierarchy import hierarchical_scores, right_or_ancestor

BLOOD = {
    "CD4 T": "CL:0000624",
    "CD8 T": "CL:0000625",
    "NK": "CL:0000623",
    "B": "CL:0000236",
    "CD14 monocyte": "CL:0001054",
    "CD16 monocyte": "CL:0002396",
    "DC": "CL:0000451",
    "platelet": "CL:0000233",
}
# The labels of real blood, which are not names of terms.
BLOOD_LABELS = {
    "CD4 T cell": "CL:0000624",
    "CD8 T cell": "CL:0000625",
    "NK cell": "CL:0000623",
    "CD14 monocyte": "CL:0001054",
    "CD16 monocyte": "CL:0002396",
    "platelet/megakaryocyte": "CL:0000233",
    "CD34+ progenitor": "CL:0008001",
    "T cell, activated": "CL:0000084",
}
CELLS = st.integers(1, 40)


@pytest.fixture(scope="module")
def blood() -> Hierarchy:
    return build_hierarchy([*BLOOD, "doublet"], BLOOD)


def probability_of(blood: Hierarchy, **shares: float) -> np.ndarray:
    """One cell with these probabilities; underscores stand for spaces."""
    row = np.zeros((1, len(blood.classes)), np.float32)
    for label, share in shares.items():
        row[0, blood.classes.index(label.replace("_", " "))] = share
    return row


def test_terms_are_found_by_exact_name_only() -> None:
    found = cell_ontology()
    assert found.term("natural killer cell") == found.term("Natural killer cell") == "CL:0000623"
    assert found.term("NK cell") is None  # a synonym, and so is "alpha cell": of a cell of the retina
    assert found.term("alpha cell") is None
    assert found.current("CL:0000003") == "CL:0000000"  # replaced: "native cell"
    assert found.current("CL:0000002") is None  # replaced by a term of another ontology
    assert found.current("UBERON:0000178") is None
    assert found.current("CL:9999999") is None


def test_terms_above_blood(blood: Hierarchy) -> None:
    """The groups that a person would make, without "nucleate cell", "motile cell" or "progenitor cell"."""
    inner = {
        blood.names[node]: [name for name, member in zip(blood.classes, blood.members[node], strict=True) if member]
        for node in range(len(blood.classes), len(blood.names))
    }
    lymphocytes, monocytes = ["CD4 T", "CD8 T", "NK", "B"], ["CD14 monocyte", "CD16 monocyte"]
    assert inner == {
        "T cell": ["CD4 T", "CD8 T"],
        "monocyte": monocytes,
        "phagocyte": [*monocytes, "DC"],
        "myeloid cell": [*monocytes, "platelet"],
        "lymphocyte": lymphocytes,
        "leukocyte": [*lymphocytes, *monocytes, "DC"],
        "hematopoietic cell": list(BLOOD),
        "cell": [*BLOOD, "doublet"],
    }
    assert blood.flat == ["doublet"]
    assert blood.term_ids[blood.names.index("T cell")] == "CL:0000084"


@pytest.mark.parametrize(
    ("shares", "name", "probability"),
    [
        ({"CD4_T": 0.8, "CD8_T": 0.2}, "CD4 T", 0.8),
        ({"CD4_T": 0.5, "CD8_T": 0.4, "NK": 0.1}, "T cell", 0.9),
        ({"CD4_T": 0.4, "NK": 0.4, "B": 0.2}, "lymphocyte", 1.0),
        ({"CD14_monocyte": 0.5, "CD16_monocyte": 0.4, "B": 0.1}, "monocyte", 0.9),
        ({"CD14_monocyte": 0.95, "CD16_monocyte": 0.05}, "CD14 monocyte", 0.95),
        ({"CD4_T": 0.5, "CD14_monocyte": 0.5}, "leukocyte", 1.0),
        ({"B": 0.6, "platelet": 0.4}, "hematopoietic cell", 1.0),
        ({"doublet": 0.9, "B": 0.1}, "doublet", 0.9),
        ({"doublet": 0.5, "B": 0.5}, "cell", 1.0),
    ],
    ids=str,
)
def test_the_most_specific_name_that_is_certain_enough(
    blood: Hierarchy, shares: dict[str, float], name: str, probability: float
) -> None:
    found = back_off(blood, probability_of(blood, **shares), 0.7)
    assert (blood.names[found.nodes[0]], pytest.approx(probability)) == (name, found.probability[0])


def test_a_label_that_is_an_ancestor_of_others() -> None:
    """As in the Census, where "T cell" is a label next to its subtypes; the root is the term above every label."""
    labels = ["T cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"]
    above = build_hierarchy(labels)
    assert above.names == [*labels, "mature alpha-beta T cell", "T cell"]
    scores = hierarchical_scores(above.lineage, np.array([1, 1, 0]), np.array([0, 2, 1]))
    assert (scores.right, scores.right_or_ancestor) == (0, pytest.approx(1 / 3))
    assert build_hierarchy(["B cell"]).names == ["B cell", "B cell"]


@settings(deadline=None, max_examples=60)
@given(st.data(), CELLS)
def test_higher_thresholds_give_more_general_and_more_probable_names(data: st.DataObject, n_cells: int) -> None:
    blood = build_hierarchy([*BLOOD, "doublet"], BLOOD)
    drawn = data.draw(arrays.arrays(np.float32, (n_cells, 9), elements=st.floats(0.015625, 1, width=32)))
    probability = drawn / drawn.sum(axis=1, keepdims=True)
    low, high = sorted(data.draw(st.tuples(*[st.floats(0.5, 1)] * 2)))
    wide, narrow = back_off(blood, probability, high), back_off(blood, probability, low)
    assert (wide.probability >= high - 1e-5).all()
    sizes = blood.members.sum(axis=1)
    assert (sizes[wide.nodes] >= sizes[narrow.nodes]).all()
    sure = probability.max(axis=1) >= high
    np.testing.assert_array_equal(wide.nodes[sure], probability.argmax(axis=1)[sure])


@settings(deadline=None, max_examples=60)
@given(st.data(), CELLS)
def test_scores_hold_for_any_predictions(data: st.DataObject, n_cells: int) -> None:
    lineage = build_hierarchy([*BLOOD, "doublet"], BLOOD).lineage
    codes = arrays.arrays(np.int64, n_cells, elements=st.integers(0, len(lineage) - 1))
    truth, predicted = data.draw(arrays.arrays(np.int64, n_cells, elements=st.integers(0, 8))), data.draw(codes)
    found, reverse = hierarchical_scores(lineage, truth, predicted), hierarchical_scores(lineage, predicted, truth)
    assert 0 <= found.right <= found.right_or_ancestor <= 1
    assert found.precision == pytest.approx(reverse.recall, nan_ok=True)
    assert found.f1 == pytest.approx(reverse.f1)
    if found.precision > 0:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))
    perfect = hierarchical_scores(lineage, truth, truth)
    assert (perfect.precision, perfect.recall, perfect.f1, perfect.right) == (1, 1, 1, 1)
    # An ancestor adds no wrong term: precision over these cells is 1.
    above = right_or_ancestor(lineage, truth, predicted)
    if above.any():
        assert hierarchical_scores(lineage, truth[above], predicted[above]).precision == 1


def test_a_near_miss_scores_higher_than_a_far_one(blood: Hierarchy) -> None:
    """The values by hand; the terms of CD4 T: itself, T cell, lymphocyte, leukocyte, hematopoietic cell."""
    cd4, cd8, monocyte, t_cell = (blood.names.index(name) for name in ("CD4 T", "CD8 T", "CD14 monocyte", "T cell"))
    truth = np.array([cd4])
    assert hierarchical_scores(blood.lineage, truth, np.array([cd8])).f1 == pytest.approx(4 / 5)
    coarse = hierarchical_scores(blood.lineage, truth, np.array([t_cell]))
    assert (coarse.precision, coarse.recall, coarse.right, coarse.right_or_ancestor) == (1, pytest.approx(4 / 5), 0, 1)
    assert hierarchical_scores(blood.lineage, truth, np.array([monocyte])).f1 == pytest.approx(2 * 2 / 10)
    root = hierarchical_scores(blood.lineage, truth, np.array([len(blood.names) - 1]))
    assert (root.recall, root.right_or_ancestor) == (0, 0)


def test_the_threshold_follows_the_calibration_of_held_out_cells() -> None:
    generator = np.random.default_rng(0)
    sharp = generator.dirichlet((1, 1), 20_000)
    truth = (generator.random(20_000) > sharp[:, 0]).astype(int)
    over = sharp**1.5 / (sharp**1.5).sum(axis=1, keepdims=True)
    for share in (0.7, 0.8):
        assert calibrated_threshold(sharp, truth, share) == pytest.approx(share, abs=0.02)
        assert calibrated_threshold(over, truth, share) == pytest.approx(expit(1.5 * logit(share)), abs=0.02)
    assert calibrated_threshold(sharp, truth) == calibrated_threshold(sharp, truth, 0.8)
    assert calibrated_threshold(sharp[:99], truth[:99]) == 0.7  # too few cells
    # Wrong labels of the most certain cells, as where studies disagree about a border, change nothing.
    certain = sharp.max(axis=1) > 0.9
    assert calibrated_threshold(sharp, np.where(certain, 1 - truth, truth)) == calibrated_threshold(sharp, truth)
    assert calibrated_threshold(sharp, generator.permutation(truth)) == 0.9  # no threshold is high enough
    assert calibrated_threshold(sharp, sharp.argmin(axis=1)) == 0.9
    assert calibrated_threshold(sharp, sharp.argmax(axis=1)) == 0.6


def test_terms_in_obs() -> None:
    obs = pd.DataFrame({"cell_type": ["B", "B", "B", "T", "blob"]})
    assert ontology.terms_in(obs, "cell_type") == {}
    obs["cell_type_ontology_term_id"] = ["CL:0000236", "CL:0000788", "CL:0000236", "CL:0000084", "unknown"]
    assert ontology.terms_in(obs, "cell_type") == {"B": "CL:0000236", "T": "CL:0000084", "blob": "unknown"}
    assert build_hierarchy(["B", "blob"], ontology.terms_in(obs, "cell_type")).terms == ["CL:0000236", None]


def test_columns_of_an_annotation(blood: Hierarchy, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"CD4_T": 0.5, "CD8_T": 0.5}, {"B": 1.0}, {"doublet": 1.0}, {"B": 1.0}]
    probability = np.vstack([probability_of(blood, **row) for row in rows])
    found = pd.DataFrame(term_columns(blood, "cell_type", probability, np.array([False, False, False, True])))
    assert found["cell_type_ontology"].tolist() == ["T cell", "B", "doublet", "unknown"]
    assert found["cell_type_ontology_id"].tolist() == ["CL:0000084", "CL:0000236", "", "unknown"]
    assert found["cell_type_ontology_probability"].tolist() == [1, 1, 1, 1]
    flat = found["cell_type_predicted_ontology_term_id"].tolist()
    assert flat == ["CL:0000624", "CL:0000236", "", "unknown"]
    with caplog.at_level("INFO"):
        assert term_columns(build_hierarchy(["x", "y"]), "kind", np.eye(2), np.zeros(2, bool)) == {}
    assert caplog.messages == ["kind: none of the 2 labels is a term of the Cell Ontology"]


def test_groups_have_the_label_of_most_of_their_cells() -> None:
    labels = np.array(["T", "T", "B", "B", "B", "T"], dtype=object)
    groups = np.array([4, 4, 4, 7, 7, 9])
    unknown = np.array([False, False, False, False, False, True])
    found = label_groups(groups, labels, unknown)
    assert found.to_dict("index") == {
        4: {
            "cells": 3,
            "label": "T",
            "share": pytest.approx(2 / 3),
            "second": "B",
            "second_share": pytest.approx(1 / 3),
        },
        7: {"cells": 2, "label": "B", "share": 1, "second": "", "second_share": 0},
        9: {"cells": 1, "label": "unknown", "share": 1, "second": "", "second_share": 0},
    }
    columns = group_columns("cell_type", groups, labels, unknown)
    assert columns["cell_type_group"].tolist() == ["4", "4", "4", "7", "7", "9"]
    assert columns["cell_type_group_label"].tolist() == ["T", "T", "T", "B", "B", "unknown"]
    assert columns["cell_type_group_share"] == pytest.approx([2 / 3] * 3 + [1] * 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "leaf_wrong", "coarse"),
    [("kang_GSE96583", 0.046, 0.19), ("others", 0.076, 0.09)],
    ids=["forward", "backward"],
)
def test_blood_of_other_studies(real_data: Path, query: str, leaf_wrong: float, coarse: float) -> None:
    """Harmony and logistic regression, at 0.7: wrong names become less specific, right ones."""
    cells = ad.read_h5ad(real_data / "pbmc_multi_human.h5ad")
    measured = cells.var.filter(regex="measured_in_(pbmc3k|zheng_facs|kang)").all(axis=1).to_numpy()
    cells = cells[~cells.obs["cell_type_coarse"].isin(["unknown", "unlabelled"]), measured]
    own = (cells.obs["dataset"] == "kang_GSE96583").to_numpy() == (query == "kang_GSE96583")
    cells = cells[np.argsort(own, kind="stable")].copy()
    n_reference = int((~own).sum())
    genes = sc.pp.highly_variable_genes(
        cells[:n_reference], flavor="seurat_v3", n_top_genes=2000, batch_key="batch", inplace=False
    )["highly_variable"].to_numpy()
    shared = Cells(
        sp.csr_matrix(cells.X[:, genes]), cells.obs["batch"].astype(str).to_numpy(object), n_reference,
        cells.var_names[genes].tolist(),
    )  # fmt: skip
    labels = cells.obs["cell_type_coarse"].astype(str).to_numpy()
    classes, codes = np.unique(labels[:n_reference], return_inverse=True)
    probability = np.zeros((len(shared.query), len(classes)), np.float32)
    for name in ("harmony", "logistic_regression"):
        annotator = create(name)
        annotator.fit(shared)
        probability += annotator.predict(shared.reference, codes, len(classes), shared.query) / 2
    named = np.isin(labels[n_reference:], classes)
    truth = np.searchsorted(classes, labels[n_reference:][named])
    above = build_hierarchy(classes, BLOOD_LABELS)
    found = back_off(above, probability[named]).nodes
    right, leaf = above.members[found, truth], found < len(classes)
    wrong = float((probability[named].argmax(axis=1) != truth).mean())
    assert (leaf & ~right).mean() <= leaf_wrong < wrong
    assert (~leaf & ~right).mean() <= 0.01
    assert (~leaf & right).mean() == pytest.approx(coarse, abs=0.02)
    scores = hierarchical_scores(above.lineage, truth, found)
    assert scores.precision > 0.96
    assert scores.right_or_ancestor > 1 - wrong
