"""scvi-annotate.py: from a file to annotated cells, terms and a report; mistakes in one line; scanpy-like functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import yaml
from pipeline import ROOT

from census_scvi import annotation
from census_scvi.annotation.annotate_query import open_sources
from census_scvi.annotation.cost import effort
from census_scvi.annotation.methods import METHODS, MODEL
from census_scvi.annotation.settings import AnnotateSection, BudgetSection, Method, ReferenceSection
from census_scvi.census.settings import CensusSection
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells
from census_scvi.settings import load_config

# A short training for few cells.
TRAINING = {"n_epochs": 20, "min_epochs": 10, "batch_size": 64, "optimizer_name": "adam", "lr": 3e-3}
BLOOD = "dataset_id == 'demo-human-blood'"
OTHERS = "dataset_id != 'demo-human-blood' and is_primary_data == True"


def census_cells(uri: str, value_filter: str) -> ad.AnnData:
    """Cells of the demo Census as a user may have them: symbols, donors, and the true types."""
    with cellxgene_census.open_soma(uri=uri) as root:
        cells = cellxgene_census.get_anndata(root, "homo_sapiens", obs_value_filter=value_filter)
    names = cells.var["feature_name"].astype(str).to_numpy()
    obs = {name: cells.obs[name].astype(str).to_numpy() for name in ("cell_type", "donor_id", "dataset_id")}
    obs["mine"] = np.arange(cells.n_obs) % 3
    index = [f"cell-{number}" for number in range(cells.n_obs)]
    return ad.AnnData(cells.X.astype(np.float32), pd.DataFrame(obs, index=index), pd.DataFrame(index=names))


@pytest.fixture(scope="module")
def blood(demo_census: str) -> ad.AnnData:
    return census_cells(demo_census, BLOOD)


@pytest.fixture(scope="module")
def others(demo_census: str) -> ad.AnnData:
    return census_cells(demo_census, OTHERS)


@pytest.fixture
def files(tmp_path: Path, blood: ad.AnnData, others: ad.AnnData) -> Path:
    """A folder with the query without its types, `cells.h5ad`, and a labelled file, `labelled.h5ad`."""
    query = blood.copy()
    del query.obs["cell_type"], query.obs["dataset_id"]
    query.write_h5ad(tmp_path / "cells.h5ad")
    others.write_h5ad(tmp_path / "labelled.h5ad")
    return tmp_path


def annotate(folder: Path, *arguments: str, **sections: dict[str, Any]) -> int:
    values: dict[str, Any] = {
        "query": {"file": str(folder / "cells.h5ad"), "batch_key": ["donor_id"]} | sections.pop("query", {}),
        "annotate": {"method": "fast", "reference": {"file": str(folder / "labelled.h5ad")}}
        | sections.pop("annotate", {}),
        "output": {"directory": str(folder / "none")},
        **sections,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return main("annotate", ["--config", str(folder / "config.yaml"), *arguments])


def accuracy(found: pd.Series, truth: pd.Series) -> float:
    return float((found.astype(str).to_numpy() == truth.to_numpy()).mean())


@pytest.mark.slow
def test_a_slice_of_the_census_annotates_a_file(
    files: Path, demo_census: str, blood: ad.AnnData, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (files / "cells.h5ad").read_bytes()
    reference = {"file": None, "obs_filter": OTHERS, "cells_per_type": 60}
    settings: dict[str, Any] = {"method": "consensus", "overrides": {"steps": 150}, "reference": reference}
    assert annotate(files, annotate=settings | {"key_added": "scNym"}, census={"uri": demo_census}) == 0
    messages = capsys.readouterr().err
    assert "at most 60 per label" in messages
    assert (files / "cells.h5ad").read_bytes() == before
    found = ad.read_h5ad(files / "cells-annotated.h5ad")
    assert (found.X != blood.X).nnz == 0
    assert found.obs["mine"].tolist() == blood.obs["mine"].tolist()
    assert accuracy(found.obs["cell_type_best"], blood.obs["cell_type"]) > 0.9
    for column in ("probability", "uncertainty", "agreement"):
        assert found.obs[f"cell_type_{column}"].between(0, 1).all()
    members = {"joint", "harmony", "logistic_regression"}
    assert {f"cell_type_{member}" for member in members} <= set(found.obs)
    terms = found.obs["cell_type_predicted_ontology_term_id"].astype(str)
    assert terms[~found.obs["cell_type_unknown"]].str.match(r"CL:\d{7}$").all()
    assert terms[found.obs["cell_type_best"].astype(str) == "B cell"].isin(["CL:0000236", "unknown"]).all()
    # names as scNym gives them
    probability = found.uns["scNym_probabilities"]
    assert (probability.idxmax(axis=1).to_numpy() == found.obs["scNym"].astype(str).to_numpy()).all()
    np.testing.assert_allclose(probability.max(axis=1), found.obs["scNym_confidence"], rtol=1e-6)
    assert np.isfinite(found.obsm["X_scnym"]).all()
    report = json.loads((files / "cells-annotated.json").read_text())
    assert sum(row["cells"] for row in report["types"]) == report["cells"] == blood.n_obs
    assert set(report["validation"][0]) >= {"accuracy"}
    assert report["run"]["stage"] == "annotate"
    assert "<html" in (files / "cells-annotated.html").read_text()
    # done, then refused for other settings
    assert annotate(files, annotate=settings | {"key_added": "scNym"}, census={"uri": demo_census}) == 0
    assert "annotate is done for these settings" in capsys.readouterr().err
    assert annotate(files, "annotate.method=fast", annotate=settings, census={"uri": demo_census}) == 2
    assert "was made with other settings: annotate.key_added" in capsys.readouterr().err


def test_a_labelled_file_annotates_a_table_of_log_values(files: Path, blood: ad.AnnData) -> None:
    """Formats differ, and the batches are not known: the labels are the same."""
    logged = blood.to_df()
    logged = np.log1p(logged.div(logged.sum(axis=1), axis=0) * 1e6)
    logged.to_csv(files / "logged.csv")
    query = {"file": str(files / "logged.csv"), "values": "log_normalized", "batch_key": None}
    assert annotate(files, query=query) == 0
    found = ad.read_h5ad(files / "logged-annotated.h5ad")
    assert accuracy(found.obs["cell_type_best"], blood.obs["cell_type"]) > 0.9
    np.testing.assert_allclose(found.X.toarray(), logged.to_numpy(), rtol=1e-6)
    assert "cell_type_harmony" not in found.obs  # it needs the batches


def test_the_labelled_cells_of_a_file_annotate_its_other_cells(files: Path, blood: ad.AnnData) -> None:
    mixed = blood.copy()
    unknown = np.arange(mixed.n_obs) % 2 == 0
    mixed.obs["type"] = np.where(unknown, "Unlabeled", mixed.obs["cell_type"])
    mixed.obs.loc[mixed.obs_names[:4], "type"] = [np.nan, "unknown", "", "NA"]
    unknown[:4] = True
    mixed.write_h5ad(files / "cells.h5ad")
    assert annotate(files, annotate={"reference": {"file": str(files / "cells.h5ad"), "labels": "type"}}) == 0
    found = ad.read_h5ad(files / "cells-annotated.h5ad")
    assert (found.obs["cell_type_best"].isna().to_numpy() == ~unknown).all()
    assert accuracy(found.obs["cell_type_best"][unknown], blood.obs["cell_type"][unknown]) > 0.9
    assert np.isnan(found.obsm["X_annotation"][~unknown]).all()


@pytest.mark.slow
def test_a_classifier_is_trained_used_and_explained(
    files: Path, blood: ad.AnnData, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"method": "scnym", "preset": "supervised", "overrides": TRAINING}
    settings["reference"] = {"file": str(files / "labelled.h5ad")}
    assert annotate(files, "train", annotate=settings) == 0
    folder = files / "cells-annotated-model"
    assert {"classifier.safetensors", "classifier.json", "genes.json", "training_cells.safetensors", "train.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert annotate(files, "train", annotate=settings) == 0
    assert "annotate is done for these settings" in capsys.readouterr().err
    assert annotate(files, annotate=settings) == 0
    found = ad.read_h5ad(files / "cells-annotated.h5ad")
    assert accuracy(found.obs["cell_type_best"], blood.obs["cell_type"]) > 0.6
    report = json.loads((files / "cells-annotated.json").read_text())
    assert report["measured"]["known_kept"] > 0.9
    assert report["measured"]["validation_cells"] > 50
    assert set(report["measured"]["batches"]) == set(blood.obs["donor_id"])
    assert report["validation"][0]["accuracy"] == found.uns["annotation"]["cell_type"]["held_out_accuracy"]["scnym"]
    assert report["unknown"] == found.obs["cell_type_unknown"].sum()
    assert any("thresholds of the classifier are measured on" in warning for warning in report["warnings"])
    assert len(report["groups"]) == found.obs["cell_type_group"].nunique() > 1
    assert annotate(files, "interpret", "annotate.target=B cell", annotate=settings) == 0
    table = pd.read_csv(files / "cells-annotated-genes-b_cell.csv")
    assert table["saliency"].is_monotonic_decreasing
    assert set(table["symbol"]) == set(blood.var_names)
    assert (files / "cells-annotated-genes-b_cell.png").stat().st_size > 5000
    for target, message in {
        "B cel": "'B cel' is not a class of the classifier; did you mean B cell?",
        "null": "annotate.target is not set; give the label to explain",
    }.items():
        assert annotate(files, "interpret", f"annotate.target={target}", annotate=settings) == 2
        assert message in capsys.readouterr().err
    description = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(description | {"format": 99}))
    assert annotate(files, "--force", annotate=settings) == 2
    assert "classifier.json has format 99, this version of census-scvi reads 1; train the" in capsys.readouterr().err


# --- mistakes


def relabelled(change: Callable[[pd.Series], Any]) -> Callable[[Path], None]:
    """The labelled file with other labels."""

    def apply(folder: Path) -> None:
        cells = ad.read_h5ad(folder / "labelled.h5ad")
        cells.obs["cell_type"] = change(cells.obs["cell_type"].astype(str))
        cells.write_h5ad(folder / "labelled.h5ad")

    return apply


def of_a_mouse(folder: Path) -> None:
    cells = ad.read_h5ad(folder / "cells.h5ad")
    cells.var_names = cells.var_names.str.capitalize()
    cells.write_h5ad(folder / "cells.h5ad")


def mouse_ids(folder: Path) -> None:
    for name, prefix in (("cells", "ENSMUSG"), ("labelled", "ENSG")):
        cells = ad.read_h5ad(folder / f"{name}.h5ad")
        cells.var_names = [f"{prefix}{number:011d}" for number in range(cells.n_vars)]
        cells.write_h5ad(folder / f"{name}.h5ad")


def same_cells(folder: Path) -> None:
    (folder / "cells.h5ad").write_bytes((folder / "labelled.h5ad").read_bytes())


def normalised(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        cells = ad.read_h5ad(folder / f"{name}.h5ad")
        dense = cells.X.toarray()
        cells.X = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
        cells.write_h5ad(folder / f"{name}.h5ad")

    return apply


def without_counts(folder: Path) -> None:
    cells = ad.read_h5ad(folder / "cells.h5ad")
    cells.X = cells.X * 0
    cells.write_h5ad(folder / "cells.h5ad")


def nothing(_: Path) -> None:
    """The files as they are."""


LABELLED = "labelled.h5ad"
MISTAKES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "one label": (relabelled(lambda _: "T cell"), {}, "obs['cell_type'] has 1 label, 1 of them with more than one"
    " cell"),
    "labels of one cell": (
        relabelled(lambda types: [f"type {number}" for number in range(len(types))]), {}, "0 of them with more than one"
    ),
    "no labels": (relabelled(lambda types: np.full(len(types), np.nan)), {}, "has a label in obs['cell_type'];"
    " nothing"),
    "all unlabelled": (relabelled(lambda _: "Unlabeled"), {}, "cells has a label in obs['cell_type']; nothing can be"),
    "measured numbers": (
        relabelled(lambda types: np.linspace(0, 1, len(types))), {}, "different numbers such as 0.00107643; expected"
    ),
    "no such labels": (nothing, {"query": {"labels": ["celltype"]}}, "no obs column 'celltype'"
    " (annotate.reference.labels)"
                       "; did you mean cell_type?"),
    "no column": (nothing, {"query": {"labels": []}}, "query.labels is []; name the columns of labels to predict"),
    "two columns for a classifier": (
        nothing, {"query": {"labels": ["cell_type", "mine"]}, "annotate": {"action": "train", "method": "scnym"}},
        "query.labels names 2 columns (cell_type, mine), and a saved classifier predicts one; name one",
    ),
    "fewer columns in the reference": (
        nothing,
        {"query": {"labels": ["cell_type", "mine"]}, "annotate": {"reference": {"labels": ["cell_type"]}}},
        "annotate.reference.labels names 1 column (cell_type), query.labels 2 (cell_type, mine); give as many",
    ),
    "one label in the second column": (
        relabelled(lambda types: types), {"query": {"labels": ["cell_type", "dataset_id"]}, "annotate": {"reference":
        {"obs_filter": "dataset_id == 'demo-human-lung'"}}}, "obs['dataset_id'] has 1 label, 1 of them with more than"
    ),
    "no such batch": (nothing, {"query": {"batch_key": ["donor"]}}, "no obs column 'donor' (query.batch_key); did you"),
    "the query is the reference": (same_cells, {}, "cells.h5ad is the reference: 930 of 930 reference cells have the"),
    "all cells have a label": (
        same_cells, {"annotate": {"reference": {"file": "cells.h5ad"}}}, "for all 930 cells, so there is nothing to"
    ),
    "symbols of a mouse": (of_a_mouse, {}, "differ from the reference's only in capitals"),
    "ids of a mouse": (mouse_ids, {}, "another organism (ENSMUSG..., mus_musculus), the reference is of homo_sapiens"),
    "normalised query": (normalised("cells"), {}, "X holds log1p of normalised counts: to use these, set"
    " query.values="),
    "normalised reference": (normalised("labelled"), {}, "X holds log1p of normalised counts: to use these, set"),
    "counts as log values": (nothing, {"query": {"values": "log_normalized"}}, "which are raw counts; set"
    " query.values="),
    "no counts": (without_counts, {}, "has counts in the 600 genes that are used"),
    "a filter without cells": (
        nothing, {"annotate": {"reference": {"obs_filter": "donor_id == 'nobody'"}}}, "matches no cell of"
    ),
    "a filter of no column": (
        nothing, {"annotate": {"reference": {"obs_filter": "tissue == 'blood'"}}}, "no obs column 'tissue' (annotate."
    ),
    "no such reference": (nothing, {"annotate": {"reference": {"file": "none.h5ad"}}}, "none.h5ad: no such file"),
    "no such method": (nothing, {"annotate": {"method": "consensu"}}, "annotate.method"),
    "no such override": (
        nothing, {"annotate": {"method": "joint", "overrides": {"step": 3}}}, "step is not an argument of joint; did"
    ),
    "no such hyper-parameter": (
        nothing, {"annotate": {"method": "scnym", "overrides": {"n_epoch": 3}}}, "n_epoch is not a hyper-parameter"
    ),
    "output is the input": (nothing, {"query": {"output": LABELLED}}, "query.output is annotate.reference.file"),
    "output is a report": (nothing, {"query": {"output": "a.json"}}, "query.output ends in .json, like the report"),
    "a method without a model": (nothing, {"annotate": {"action": "train"}}, "has no model to train beforehand"),
    "an embedding without a model": (nothing, {"annotate": {"method": "neighbors"}}, "neighbors needs the embedding"
    " of a"),
    "a classifier that is not there": (
        nothing, {"annotate": {"action": "interpret", "target": "B cell"}}, "classifier.json does not exist; train a cl"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    change, sections, message = MISTAKES[case]
    change(files)
    monkeypatch.chdir(files)
    of_annotate = sections.get("annotate", {})
    reference = {"file": str(files / LABELLED)} | of_annotate.get("reference", {})
    before = sorted(path.name for path in files.iterdir())
    assert annotate(files, **sections | {"annotate": of_annotate | {"reference": reference}}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(path.name for path in files.iterdir()) == sorted({*before, "config.yaml"})


def test_what_is_not_used_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ad.read_h5ad(files / "labelled.h5ad")
    kinds = cells.obs["cell_type"].astype(str)
    kinds.iloc[0] = "lonely"
    kinds.iloc[1:6] = np.nan
    one_study = (cells.obs["dataset_id"] == cells.obs["dataset_id"].iloc[-1]) & (kinds == kinds.iloc[-1])
    kinds[one_study] = "only here"
    cells.obs["cell_type"] = kinds
    copies = ad.read_h5ad(files / "cells.h5ad")[:20].copy()
    copies.obs["cell_type"], copies.obs["dataset_id"] = "B cell", "copied"
    ad.concat([cells, copies], join="outer", index_unique="-").write_h5ad(files / "labelled.h5ad")
    assert annotate(files, query={"batch_key": None}) == 0
    messages = capsys.readouterr().err
    assert "labels have one cell and are not used: lonely" in messages
    assert "5 of 950 cells have no label in obs['cell_type']" in messages
    assert (
        "occur in one dataset_id of the reference only, so their accuracy in another one is not known: only here"
        in (messages)
    )
    assert "20 of 944 reference cells have the counts of cells of the query: they are not used" in messages
    assert "query.batch_key is not set: all cells are treated as one batch" in messages
    assert "obs has donor_id: query.batch_key=[donor_id]" in messages


def test_the_genes_and_the_studies_of_the_reference(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ad.read_h5ad(files / "labelled.h5ad")
    others.obs = others.obs.rename(columns={"dataset_id": "study"}).drop(columns="donor_id")
    others.write_h5ad(files / "labelled.h5ad")

    def run(**reference: Any) -> tuple[str, ad.AnnData]:
        place = {"file": str(files / "labelled.h5ad")} | reference
        assert annotate(files, query={"output": str(files / "out.h5ad")}, annotate={"reference": place}) == 0
        found = ad.read_h5ad(files / "out.h5ad")
        for each in files.glob("out*"):
            each.unlink()
        return capsys.readouterr().err, found

    few, without = run(n_top_genes=200)
    assert "the 200 most variable genes of the reference are used" in few
    assert "obs has study: annotate.reference.batch_key=[study]" in few
    assert without.uns["annotation"]["cell_type"]["held_out_by"] == "cells"
    every, known = run(n_top_genes=None, batch_key=["study"])
    assert "most variable" not in every
    assert "annotate.reference.batch_key=" not in every
    assert "of the same study" not in every
    assert known.uns["annotation"]["cell_type"]["held_out_by"] == "study"
    for found in (without, known):
        assert found.obs["cell_type_unknown"].mean() < 0.3  # all types are known, and the study is another one


def test_several_columns_are_as_each_alone(files: Path, blood: ad.AnnData) -> None:
    """Labels, numbers and report of the second column are those of a run with it alone; its name differs there."""

    def coarse(types: pd.Series) -> pd.Series:
        return types.astype(str).str.contains("T cell").map({True: "T", False: "other"})

    labelled = ad.read_h5ad(files / "labelled.h5ad")
    labelled.obs["kind"] = coarse(labelled.obs["cell_type"])
    labelled.write_h5ad(files / "labelled.h5ad")
    reference = {"file": str(files / "labelled.h5ad")}

    def run(name: str, labels: list[str], theirs: list[str], **settings: Any) -> tuple[ad.AnnData, dict[str, Any]]:
        query = {"labels": labels, "output": str(files / f"{name}.h5ad")}
        assert annotate(files, query=query, annotate={"reference": reference | {"labels": theirs}, **settings}) == 0
        return ad.read_h5ad(files / f"{name}.h5ad"), json.loads((files / f"{name}.json").read_text())

    one, numbers = run("one", ["coarse"], ["kind"])
    both, report = run("both", ["cell_type", "coarse"], ["cell_type", "kind"], key_added="scNym")
    columns = [column for column in one.obs if column.startswith("coarse_")]
    assert "coarse_harmony" in columns
    pd.testing.assert_frame_equal(both.obs[columns], one.obs[columns])
    assert report["labels"] == list(report["columns"]) == ["cell_type", "coarse"]
    for entry in ("types", "validation", "groups", "threshold", "agreement"):
        assert report["columns"]["coarse"][entry] == numbers[entry]
    assert accuracy(both.obs["coarse_best"], coarse(blood.obs["cell_type"])) > 0.9
    page = (files / "both.html").read_text()
    for name in ("cell_type", "coarse"):
        assert (both.obs[f"scNym_{name}"] == both.obs[f"{name}_best"]).all()
        assert set(both.obs[f"{name}_best"]) <= set(both.uns["annotation"][name]["classes"])
        assert f'<h1 id="{name}">' in page
        assert f'<h2 id="{name}-types">' in page
    assert page.count('id="input"') == 1


def test_several_values_in_a_cell(files: Path) -> None:
    relabelled(lambda types: types.where(np.arange(len(types)) % 3 > 0, types + " || rash"))(files)
    assert annotate(files, query={"split_labels": True}, annotate={"method": "pca"}) == 0
    found = ad.read_h5ad(files / "cells-annotated.h5ad")
    assert "rash" in found.uns["annotation"]["cell_type"]["classes"]
    assert not any("||" in name for name in found.uns["annotation"]["cell_type"]["classes"])


def test_numbers_of_clusters_are_names(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relabelled(lambda types: pd.factorize(types, sort=True)[0].astype(float))(files)
    assert annotate(files) == 0
    assert "holds numbers (0, 1, 2, 3, 4 and 3 more): they are used as names" in capsys.readouterr().err
    found = ad.read_h5ad(files / "cells-annotated.h5ad").obs
    assert set(found["cell_type_best"].cat.categories) <= {str(number) for number in range(8)}
    assert "cell_type_ontology" not in found


# --- choice of cells, cost


def test_a_slice_has_as_many_cells_of_every_label(demo_census: str, blood: ad.AnnData) -> None:
    def sources(seed: int, **settings: Any) -> tuple[pd.Series, np.ndarray]:
        section = ReferenceSection(obs_filter=OTHERS, **settings)
        with (
            QueryCells(blood) as query,
            open_sources(query, "X", ["cell_type"], section, CensusSection(uri=demo_census), seed=seed) as found,
        ):
            cells = found.reference
            return pd.Series(cells.labels["cell_type"]).value_counts(), cells.counts(np.arange(3)).toarray()

    sizes, counts = sources(0, cells_per_type=30)
    assert (sizes.sort_index() == np.minimum(30, sources(0)[0].sort_index())).all()
    assert np.array_equal(counts, sources(0, cells_per_type=30)[1])
    assert not np.array_equal(counts, sources(1, cells_per_type=30)[1])
    few, _ = sources(0, max_cells=100)
    assert 90 <= few.sum() <= 110
    assert set(few.index) == set(sizes.index)


def test_the_dry_run_states_the_cost(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in files.iterdir())
    assert annotate(files, "--dry-run", annotate={"method": "consensus"}) == 0
    said = capsys.readouterr().out
    assert "method consensus: about" in said
    assert "reference: 930 cells with 8 labels" in said
    assert sorted(path.name for path in files.iterdir()) == sorted([*before, "config.yaml"])


def test_the_budget_limits_training() -> None:
    def of(method: str, **budget: int) -> Any:
        section = AnnotateSection(method=method, budget=BudgetSection(**budget))  # type: ignore[arg-type]
        return effort(section, 8000, 6000)

    assert of("consensus").arguments["steps"] == 1000
    assert of("consensus", epochs=5).arguments["steps"] == 5 * (8000 // 128)
    assert of("consensus", cpu_seconds=30).arguments["steps"] < 1000
    assert of("consensus", cpu_seconds=30).cpu_seconds <= 30
    little = of("consensus", cpu_seconds=5)
    assert (little.method, "steps" in little.arguments) == ("fast", False)
    assert "which is enough for" in little.note
    assert of("scnym", epochs=3).arguments == {"n_epochs": 3}
    assert of("scnym", cpu_seconds=60).arguments["n_epochs"] < 100
    assert of("scnym").cpu_seconds > of("consensus").cpu_seconds > of("fast").cpu_seconds


def test_a_classifier_is_compared_with_neighbors_as_many_as_wanted() -> None:
    section = AnnotateSection(method="scnym", preset="default", overrides={"n_neighbors": 20, "n_epochs": 3})
    expected = {"scnym": {"n_epochs": 3, "preset": "no_new_identity"}, "n_neighbors": 20}
    assert effort(section, 8000, 6000).of_method == expected


def test_the_settings_have_every_method() -> None:
    assert set(get_args(Method)) == {*METHODS, MODEL}


def test_the_demo_configuration_is_valid() -> None:
    config = load_config(ROOT / "configs/annotate-demo.yaml")
    assert config.annotate.reference.cells_per_type
    assert config.query.batch_key


# --- functions


@pytest.mark.slow
def test_functions_in_scanpys_style(blood: ad.AnnData, others: ad.AnnData, tmp_path: Path) -> None:
    query = blood.copy()
    del query.obs["cell_type"]
    result = annotation.predict(query, "cell_type", reference=others, method="fast", batch_key="donor_id")
    assert accuracy(query.obs["annotation"], blood.obs["cell_type"]) > 0.9
    np.testing.assert_allclose(query.uns["annotation_probabilities"].max(axis=1), query.obs["annotation_confidence"])
    assert query.obsm["X_annotation"].shape[0] == query.n_obs
    assert result.classes == query.uns["annotation_probabilities"].columns.tolist()
    trained = annotation.train(
        query,
        "cell_type",
        tmp_path / "model",
        reference=others,
        preset="supervised",
        overrides=TRAINING,
    )
    annotation.predict(query, trained_model=tmp_path / "model", key_added="scNym")
    assert accuracy(query.obs["scNym"], blood.obs["cell_type"]) > 0.6
    assert query.obsm["X_scnym"].shape == (query.n_obs, 256)
    why = annotation.interpret(query, "scNym", "B cell", trained_model=trained, n_cells=20)
    assert why.saliency.index.isin(query.var_names).all()
    query.write_h5ad(tmp_path / "all.h5ad")  # all of it can be stored


@pytest.mark.slow
def test_all_labelled_cells_train_a_classifier(others: ad.AnnData, blood: ad.AnnData) -> None:
    trained = annotation.train(others, preset="supervised", overrides=TRAINING)
    query = blood.copy()
    annotation.predict(query, trained_model=trained)
    assert accuracy(query.obs["annotation"], blood.obs["cell_type"]) > 0.6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "consensu"}, "method"),
        ({"groupby": ["cell_type", "tissue"]}, "expected one column of labels"),
        ({"reference": "none.h5ad"}, "none.h5ad: no such file"),
        ({"reference": "x.h5ad", "census": "stable"}, "reference and census are both given"),
        ({}, "has a label for all 450 cells, so there is nothing to annotate"),
        ({"trained_model": "none"}, "classifier.json does not exist; train a classifier first"),
        ({"values": "logs"}, "values is 'logs'; expected counts or log_normalized"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, blood: ad.AnnData) -> None:
    with pytest.raises(UserError, match=message) as error:
        annotation.predict(blood.copy(), **arguments)
    assert "\n" not in str(error.value)
