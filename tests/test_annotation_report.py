"""The report of an annotation: its numbers, its markers, and a page that opens without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from census_scvi.annotation.ontology import build_hierarchy
from census_scvi.annotation.protocol import Annotation
from census_scvi.annotation.results.markers import Markers, dots
from census_scvi.report.annotation import Reported, write_annotation_report

TYPES = ["B cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"]
B, CD4, CD8 = range(3)
# Markers of each type; gene 6 is in both types of T cell.
OWN = {B: (0, 1), CD4: (2, 3, 6), CD8: (4, 5, 6)}
GENES = [f"GENE{number}" for number in range(12)]


def counts_of(types: np.ndarray, seed: int) -> sp.csr_matrix:
    """Raw counts, Poisson: 20 of the markers of a cell's type, the first the highest, and 1 of other genes."""
    means = np.ones((len(types), len(GENES)))
    for row, kind in enumerate(types):
        means[row, list(OWN[kind])] = (24, 16, 12)[: len(OWN[kind])]
    return sp.csr_matrix(np.random.default_rng(seed).poisson(means).astype(np.float32))


def cells(types: np.ndarray, seed: int) -> ad.AnnData:
    var = pd.DataFrame({"feature_name": GENES}, index=[f"ENSG{number:011}" for number in range(len(GENES))])
    obs = pd.DataFrame({"cell_type": np.array(TYPES)[types]}, index=[f"cell-{row}" for row in range(len(types))])
    return ad.AnnData(counts_of(types, seed), obs=obs, var=var)


@pytest.fixture(scope="module")
def reference() -> ad.AnnData:
    return cells(np.repeat([B, CD4, CD8], 50), seed=0)


# 40 B cells (group 0), 30 CD4 T cells (1), 20 T cells that are CD4 or CD8 (2), 10 unknown cells (3).
GROUPS = np.repeat([0, 1, 2, 3], [40, 30, 20, 10])
PROBABILITY = np.array([[0.96, 0.02, 0.02], [0.1, 0.8, 0.1], [0.1, 0.5, 0.4], [0.4, 0.3, 0.3]], np.float32)[GROUPS]
QUERY = cells(np.array([B, CD4, CD4, B])[GROUPS], seed=1)


def annotation(**changes: Any) -> Annotation:
    second = PROBABILITY.copy()
    second[GROUPS == 2] = (0.1, 0.4, 0.5)
    values: dict[str, Any] = {
        "classes": TYPES,
        "probability": PROBABILITY,
        "members": {"harmony": PROBABILITY, "logistic_regression": second},
        "unknown": GROUPS == 3,
        "uncertainty": np.where(GROUPS == 3, 0.9, 0.1).astype(np.float32),
        "groups": GROUPS,
        "embedding": np.random.default_rng(0).normal(3.0 * GROUPS[:, None], size=(100, 4)).astype(np.float32),
        "validation": pd.DataFrame(
            {"accuracy": [0.875], "macro_f1": [np.nan], "cells": [80], "risk": [np.zeros(3)]}, index=["harmony"]
        ),
        "warnings": ["few of the cells of batch <b> agree"],
    }
    return Annotation(**values | changes)


@pytest.fixture(scope="module")
def written(reference: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "cells-cell_type.html"
    write_annotation_report(
        path,
        [Reported("cell_type", annotation(), QUERY, reference, build_hierarchy(TYPES))],
        facts={"file": "mine.h5ad"},
        refused=["2 cells have no counts"],
    )
    return path


@pytest.fixture(scope="module")
def record(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written.with_suffix(".json").read_text())
    return found


def test_types_found(record: dict[str, Any]) -> None:
    types = {row["label"]: row for row in record["types"]}
    assert list(types) == [TYPES[CD4], TYPES[B], "unknown"]
    assert [row["cells"] for row in record["types"]] == [50, 40, 10]
    assert types[TYPES[CD4]]["mean_probability"] == pytest.approx((30 * 0.8 + 20 * 0.5) / 50)
    assert types[TYPES[CD4]]["agree"] == pytest.approx(0.6)
    assert types[TYPES[B]]["term"] == "CL:0000236"
    assert (record["cells"], record["unknown"], record["not_found"]) == (100, 10, [TYPES[CD8]])
    assert record["agreement"]["with_label"] == {"harmony": 1, "logistic_regression": pytest.approx(0.8)}
    assert record["agreement"]["pairs"] == [
        {"first": "harmony", "second": "logistic_regression", "share": pytest.approx(0.8)}
    ]
    assert record["validation"] == [{"method": "Harmony", "accuracy": 0.875, "macro_f1": None, "cells": 80}]


def test_cells_whose_label_is_uncertain_have_a_less_specific_name(record: dict[str, Any]) -> None:
    (row,) = record["names"]
    assert row == {"name": "T cell", "term": "CL:0000084", "cells": 20, "labels": TYPES[1:]}


def test_uncertain_groups_have_two_candidates_and_the_genes_between_them(record: dict[str, Any]) -> None:
    groups = {group["group"]: group for group in record["groups"]}
    assert [number for number, group in groups.items() if group["uncertain"]] == [2, 3]
    group = groups[2]
    assert (group["candidates"], group["probability"]) == (TYPES[1:], pytest.approx([0.5, 0.4]))
    assert group["name"] == {"name": "T cell", "term": "CL:0000084", "probability": pytest.approx(0.9)}
    genes = {name: [gene["gene"] for gene in group["genes"] if gene["higher_in"] == name] for name in TYPES[1:]}
    assert set(genes[TYPES[CD4]][:2]) == {"GENE2", "GENE3"}
    assert set(genes[TYPES[CD8]][:2]) == {"GENE4", "GENE5"}
    first = group["genes"][0]
    # The cells of the group are CD4 T cells: their expression is that of the first candidate.
    assert first["mean"] == pytest.approx(first["reference"][0], rel=0.05)
    assert first["reference"][0] > first["reference"][1] + 1
    assert groups[3]["unknown"] == 1


def test_the_page_is_one_file_with_all_sections(written: Path) -> None:
    page = written.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == 4  # labels, probability, dots, annotators
    sections = ("types", "names", "map", "markers", "accuracy", "annotators", "uncertain", "input")
    assert [name for name in sections if f'<h2 id="{name}">' in page] == list(sections)
    assert "batch &lt;b&gt; agree" in page
    assert "All 4 groups" in page
    for text in ("mine.h5ad", "2 cells have no counts", "CL:0000084", "scanpy", "<b>GENE2</b>"):
        assert text in page


MINIMAL = {
    "no reference": {},
    "one class": {"classes": ["B cell"], "probability": np.ones((100, 1), np.float32)},
    "all unknown": {"unknown": np.ones(100, bool)},
    "labels without a term": {"classes": ["x", "y", "<z>"]},
}


@pytest.mark.parametrize("changes", MINIMAL.values(), ids=MINIMAL)
def test_a_report_of_little(changes: dict[str, Any], tmp_path: Path) -> None:
    """No counts, no reference, no other annotator, nothing held out."""
    query = ad.AnnData(obs=QUERY.obs)
    found = annotation(members={}, validation=pd.DataFrame(), warnings=[], **changes)
    path = tmp_path / "report.html"
    positions = np.zeros((100, 2), np.float32)
    record = write_annotation_report(
        path, [Reported("cell_type", found, query, hierarchy=build_hierarchy(found.classes))], positions=positions
    )
    page = path.read_text()
    assert not any(f'id="{name}"' in page for name in ("markers", "accuracy", "annotators"))
    assert sum(row["cells"] for row in record["types"]) == 100
    if "<z>" in found.classes:
        assert record["refused"] == [
            "3 of 3 labels have no term of the Cell Ontology and therefore no less specific name: x, y, <z>"
        ]
        assert "x, y, &lt;z&gt;" in page


def test_markers_are_the_genes_that_are_higher(reference: ad.AnnData) -> None:
    markers = Markers(reference.X, reference.obs["cell_type"])
    found = markers.of_types(2)
    assert {TYPES.index(name): set(genes) for name, genes in found.items()} == {B: {0, 1}, CD4: {2, 3}, CD8: {4, 5}}
    assert [set(genes) & {2, 3, 4, 5, 6} for genes in markers.between(TYPES[CD4], TYPES[CD8], 2)] == [{2, 3}, {4, 5}]
    assert markers.between(TYPES[CD4], "a type with two cells") == ([], [])


def test_types_with_few_cells_have_no_markers(reference: ad.AnnData) -> None:
    labels = reference.obs["cell_type"].astype(str).to_numpy(dtype=object)
    labels[:2] = "rare"
    assert "rare" not in Markers(reference.X, labels).of_types()
    assert Markers(reference.X[:50], labels[:50]).of_types() == {TYPES[B]: []}


def test_dots_are_shares_and_means_of_log_counts() -> None:
    counts = sp.csr_matrix(np.array([[1, 3], [0, 4], [0, 0], [5, 5]], np.float32))
    found = dots(counts, ["a", "a", "b", "a"], ["a", "b", "none"], [0])
    expected = np.mean([np.log1p(2500), 0, np.log1p(5000)])
    np.testing.assert_allclose(found.share[:, 0], [2 / 3, 0, np.nan])
    np.testing.assert_allclose(found.mean[:, 0], [expected, 0, np.nan], rtol=1e-6)
