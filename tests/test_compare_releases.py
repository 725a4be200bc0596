"""scvi-compare-releases.py: two releases, by run directory or published folder, to comparison.json and a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import yaml
from pipeline import Run
from sklearn.neighbors import NearestNeighbors

from census_scvi import Atlas
from census_scvi.census.genes import read_genes
from census_scvi.cli import main
from census_scvi.publication.drift import drift_gates
from census_scvi.publication.settings import GatesSection

GONE, SHORTENED, CHANGED = "demo-human-heart", "demo-human-blood", "demo-human-lung"
N_REMOVED, N_RELABELLED, N_ADDED = 40, 30, 90
NO_METRICS = ("evaluate.labels=[]", "evaluate.batches=[]")
IDENTITY = ["dataset_id", "raw_sum", "nnz", "raw_variance_nnz"]


def cells_of(uri: str) -> ad.AnnData:
    with cellxgene_census.open_soma(uri=uri) as root:
        return cellxgene_census.get_anndata(root, "Homo sapiens")


@pytest.fixture(scope="module")
def next_census(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's human cells a release later: a dataset is gone, one is new, cells are removed and annotated again.

    The datasets are in another order, and ids of cells are generated again from their position.
    """
    folder = tmp_path_factory.mktemp("next")
    cells = cells_of(demo_census)
    cells.var_names = cells.var["feature_id"].astype(str)
    obs = cells.obs.astype(object)
    new = cells[np.flatnonzero(obs["dataset_id"] == GONE)[:N_ADDED]].copy()
    new.obs["dataset_id"] = "demo-human-new"
    kept = obs["dataset_id"] != GONE
    kept[obs.index[obs["dataset_id"] == SHORTENED][:N_REMOVED]] = False
    changed = obs.index[(obs["dataset_id"] == CHANGED) & (obs["cell_type"] == "fibroblast")][:N_RELABELLED]
    cells.obs["cell_type"] = obs["cell_type"].where(~obs.index.isin(changed), "myofibroblast cell")
    both = ad.concat([new, cells[kept.to_numpy(bool)][::-1]], join="outer")
    both.obs = both.obs[[name for name in cells.obs if name not in ("soma_joinid", "observation_joinid", "organism")]]
    both.obs_names = [f"cell-{number}" for number in range(both.n_obs)]
    both.write_h5ad(folder / "cells.h5ad")
    dataset = {"file": "cells.h5ad", "organism": "homo_sapiens", "dataset_id": {"column": "dataset_id"}}
    build = {"uri": str(folder / "census"), "datasets": [dataset]}
    (folder / "build.yaml").write_text(yaml.safe_dump(build))
    assert main("build-census", [str(folder / "build.yaml")]) == 0
    return str(folder / "census")


@pytest.fixture(scope="module")
def next_run(next_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A release on that Census, with another model."""
    run = Run(tmp_path_factory.mktemp("next-run"), next_census, hvg={"top_n_hvg": 180}, model={"n_latent": 6})
    for stage in ("prepare", "train", "create-latent-update"):
        assert run(stage, "seed=7") == 0
    return run


def compare(run: Run, old: Path | str, folder: Path, *settings: str) -> int:
    return run("compare-releases", f"compare_releases.old={old}", f"compare_releases.folder={folder}", *settings)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def compared(next_run: Run, finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    assert compare(next_run, finished_run.directory, folder) == 0
    return folder


def test_cells_in_both_new_gone_and_annotated_again(
    compared: Path, demo_census: str, next_census: str, next_run: Run
) -> None:
    record = record_of(compared)
    old, new = (cells_of(uri).obs for uri in (demo_census, next_census))
    gone = int((old["dataset_id"] == GONE).sum())
    shared = len(old) - gone - N_REMOVED
    assert record["cells"] == {
        "old": len(old), "new": len(new), "shared": shared, "gone": gone + N_REMOVED, "added": N_ADDED,
        "old_ambiguous": 0, "new_ambiguous": 0, "recounted": 0, "compared": shared, "sampled": shared,
    }  # fmt: skip
    datasets = {row["dataset"]: (row["gone"], row["added"]) for row in record["datasets"]}
    others = set(old["dataset_id"]) - {GONE, SHORTENED}
    assert datasets == {GONE: (gone, 0), SHORTENED: (N_REMOVED, 0), "demo-human-new": (0, N_ADDED)} | dict.fromkeys(
        others, (0, 0)
    )
    # Cells of the atlas dataset that are copies of them are not annotated again.
    assert record["relabelled"] == {
        "cells": N_RELABELLED,
        "changes": [{"old": "fibroblast", "new": "myofibroblast cell", "cells": N_RELABELLED}],
    }
    by_type = {row["name"]: row for row in record["by"]["cell_type"]}
    assert by_type["myofibroblast cell"]["relabelled"] == 1
    assert sum(row["cells"] for row in by_type.values()) == shared


def test_neighbors_and_movement_are_those_of_the_same_cells(
    compared: Path, demo_census: str, next_census: str, finished_run: Run, next_run: Run
) -> None:
    """Cells are matched here by a join of obs, and neighbors found by scikit-learn."""
    frames = []
    for uri, run in ((demo_census, finished_run), (next_census, next_run)):
        obs = cells_of(uri).obs[[*IDENTITY, "soma_joinid", "cell_type"]].astype({"dataset_id": str})
        obs["row"] = np.searchsorted(np.load(run.path("latent-idx.npy")), obs["soma_joinid"])
        frames.append(obs.round({"raw_variance_nnz": 6}))
    pairs = frames[0].merge(frames[1], on=IDENTITY, suffixes=("_old", "_new")).sort_values("soma_joinid_new")
    latents = [
        np.load(run.path("latent.npy"))[pairs[f"row_{name}"]]
        for name, run in (("old", finished_run), ("new", next_run))
    ]
    near = [NearestNeighbors(algorithm="brute").fit(x).kneighbors(n_neighbors=15)[1] for x in latents]
    overlap = np.array([len(set(a) & set(b)) / 15 for a, b in zip(*near, strict=True)])
    record = record_of(compared)
    assert record["overall"]["neighbor_overlap"]["value"] == pytest.approx(overlap.mean(), abs=2e-3)
    for column in ("dataset_id", "cell_type_new"):
        means = pd.Series(overlap).groupby(pairs[column].astype(str).to_numpy()).mean()
        rows = record["by"][column.removesuffix("_new")]
        assert {row["name"]: row["neighbor_overlap"] for row in rows} == pytest.approx(means.to_dict(), abs=0.02)
        assert [row["neighbor_overlap"] for row in rows] == sorted(row["neighbor_overlap"] for row in rows)
    centred = [x - x.mean(axis=0) for x in latents]
    norms = [np.linalg.norm(x) for x in centred]
    r = np.linalg.svd(centred[0].T @ centred[1], compute_uv=False).sum() / (norms[0] * norms[1])
    movement = record["overall"]["movement"]["value"]
    assert 0.7 * np.sqrt(1 - r**2) < movement <= np.sqrt(1 - r**2)  # the mean is at most the root mean square
    assert record["scale"] == pytest.approx(r * norms[1] / norms[0], rel=1e-4)
    for found in record["overall"].values():
        assert found["low"] <= found["value"] <= found["high"]
        assert 0 < found["chance"] < 1


def test_metrics_settings_genes_and_batches(compared: Path, finished_run: Run, next_run: Run) -> None:
    record = record_of(compared)
    assert {name: len(scores) for name, scores in record["scores"].items()} == {"old": 20, "new": 20}
    assert all(score["cells"] for score in record["scores"]["old"])
    assert {row["name"]: (row["old"], row["new"]) for row in record["differences"]["settings"]} == {
        "hvg.top_n_hvg": (200, 180),
        "model.n_latent": (4, 6),
        "seed": (0, 7),
    }
    genes = [set(read_genes(run.path("hv_genes.pkl"))) for run in (finished_run, next_run)]
    found = record["differences"]["genes"]
    assert found["shared"] == len(genes[0] & genes[1])
    assert [len(found["only_old"]), len(found["only_new"])] == [len(genes[0] - genes[1]), len(genes[1] - genes[0])]
    assert any("demo-human-new" in batch for batch in record["differences"]["batches"]["only_new"])
    assert record["differences"]["packages"] == []
    assert (record["old"]["n_latent"], record["new"]["n_latent"]) == (4, 6)


def test_the_page_says_what_changed(compared: Path) -> None:
    page, record = (compared / "report.html").read_text(), record_of(compared)
    for sentence in record["findings"]:
        assert sentence.split("(")[0].replace("'", "&#39;") in page
    assert f"{record['cells']['shared']:,} cells are in both releases; {N_ADDED} of" in record["findings"][0]
    assert page.count("data:image/png") == 4
    assert "myofibroblast cell" in page
    assert "The ELBOs are of different genes" in page


def test_done_refused_and_planned(
    compared: Path, next_run: Run, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(next_run, finished_run.directory, compared) == 0
    assert "compare-releases is done for these settings" in capsys.readouterr().err
    assert compare(next_run, finished_run.directory, compared, "compare_releases.sampled_cells=150") == 2
    assert "compare_releases.sampled_cells was 20000 and is 150" in capsys.readouterr().err
    assert compare(next_run, finished_run.directory, compared, "evaluate.measured_cells=250") == 2
    assert "evaluate.measured_cells was 300 and is 250" in capsys.readouterr().err
    assert compare(next_run, finished_run.directory, compared / "other", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert f"{finished_run.directory}: 1,500 cells" in planned
    assert f"write  {compared}/other/comparison.json" in planned
    assert not (compared / "other").exists()


def test_a_published_folder_is_compared_like_its_run(
    finished_run: Run, demo_census: str, next_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    old = Run(tmp_path, str(tmp_path / "census"), gates={"sample_size": 100})
    shutil.copytree(finished_run.directory, old.directory)
    assert old("publish") == 0
    folders = [tmp_path / name for name in ("of-run", "of-published")]
    few = (*NO_METRICS, "compare_releases.sampled_cells=400")
    for place, folder in zip((old.directory, old.path("published")), folders, strict=True):
        assert compare(next_run, place, folder, *few) == 0
    first, second = map(record_of, folders)
    for key in ("cells", "datasets", "relabelled", "overall", "by", "scale"):
        assert first[key] == second[key], key
    assert first["differences"] == second["differences"]
    shutil.copytree(old.path("published"), tmp_path / "run" / "earlier")
    assert old("publish", "--force", "publish.replace=true") == 0
    capsys.readouterr()
    assert compare(next_run, tmp_path / "run" / "earlier", tmp_path / "again", *few) == 2
    assert "it was replaced; compare the run directory instead" in capsys.readouterr().err


def test_labels_of_a_file_by_both(finished_run: Run, next_run: Run, demo_census: str, tmp_path: Path) -> None:
    cells = cells_of(demo_census)[::7].copy()
    cells.var_names = cells.var["feature_id"].astype(str)
    own = ad.AnnData(cells.X, obs=cells.obs[["cell_type"]].astype(str), var=cells.var[[]])
    own.obs["cell_type"] = own.obs["cell_type"].replace("macrophage", "unknown")
    own.write_h5ad(tmp_path / "own.h5ad")
    settings = (f"query.file={tmp_path / 'own.h5ad'}", "query.baseline_cells=0", "annotate.method=neighbors")
    assert compare(next_run, finished_run.directory, tmp_path / "out", *NO_METRICS, *settings) == 0
    predicted = []
    for run in (finished_run, next_run):
        with Atlas.open(run.directory) as atlas:
            found = atlas.predict(tmp_path / "own.h5ad", method="neighbors", baseline_cells=0)
        predicted.append(found.obs["cell_type_predicted"].astype(str).to_numpy())
    found = record_of(tmp_path / "out")["predictions"]["labels"]["cell_type"]
    known = (own.obs["cell_type"] != "unknown").to_numpy()
    assert found["same"] == pytest.approx((predicted[0] == predicted[1]).mean())
    assert found["labelled"] == known.sum()
    for name, labels in zip(("old", "new"), predicted, strict=True):
        right = labels[known] == own.obs["cell_type"].to_numpy()[known]
        assert found[f"{name}_accuracy"] == pytest.approx(right.mean())
        assert found[f"{name}_unknown"] == pytest.approx((labels == "unknown").mean())
    assert found["gain"] == pytest.approx(found["new_accuracy"] - found["old_accuracy"])
    assert sum(row["cells"] for row in found["changes"]) == (predicted[0] != predicted[1]).sum()
    assert "Both releases predict the same cell_type" in record_of(tmp_path / "out")["findings"][-1]


# --- the gate


def test_drift_is_a_gate_of_publishing(
    compared: Path, next_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latent = next_run.record("create-latent-update")["outputs"]["latent.npy"]
    stability = record_of(compared)["overall"]["label_stability"]["value"]
    (gate,) = drift_gates(compared, latent, GatesSection(min_label_stability=stability))
    assert (gate.value, gate.passed, gate.stops) == (stability, True, False)
    (gate,) = drift_gates(compared, latent, GatesSection(min_label_stability=stability + 1e-6, drift_stops=True))
    assert (gate.passed, gate.stops) == (False, True)
    assert str(compared) not in gate.detail
    other = {**latent, "size": 1}  # the comparison is of another embedding
    assert drift_gates(compared, other, GatesSection()) == drift_gates(tmp_path, latent, GatesSection()) == []
    (compared / "damaged").mkdir(exist_ok=True)
    (compared / "damaged" / "comparison.json").write_text("{")
    for folder, identity in ((compared, other), (tmp_path, latent), (compared / "damaged", latent)):
        (gate,) = drift_gates(folder, identity, GatesSection(drift_stops=True))
        assert not gate.passed
        assert gate.detail.startswith("not measured: run scvi-compare-releases.py")
    run = Run(tmp_path, "", gates={"sample_size": 100})
    values = yaml.safe_load(next_run.config.read_text()) | {"seed": 7, "output": {"directory": str(run.directory)}}
    run.config.write_text(yaml.safe_dump(values))
    shutil.copytree(next_run.directory, run.directory)
    settings = (f"compare_releases.folder={compared}", "gates.min_label_stability=1", "gates.sample_size=100")
    assert run("publish", *settings, "gates.drift_stops=true") == 2
    assert "1 gate(s) stop publishing: drift: share of 1,1" in capsys.readouterr().err
    gates = {gate["name"]: gate for gate in json.loads(run.path("qa.json").read_text())["gates"]}
    assert gates["drift"]["value"] == stability


# --- bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "compare_releases.old is not set; give the earlier release, a run directory or a published folder"),
        (("compare_releases.old=/nowhere",), "compare_releases.old is /nowhere, which does not exist; give a run"),
        (("compare_releases.old={folder}",), "compare_releases.old is {folder}, which is not a release; give a run"),
        (("compare_releases.old={new}",), "compare_releases.old {new} and output.directory {new} are the same embed"),
        (
            ("compare_releases.old={old}/scvi.model",),
            "compare_releases.old is {old}/scvi.model, which is not a release",
        ),
        (("compare_releases.old={trained}",), "{trained} is not a finished release; run scvi-create-latent-update.py"),
        (
            ("compare_releases.old={old}", "compare_releases.by=[tisue]"),
            "compare_releases.by contains 'tisue', which is not an obs column of the Census; did you mean tissue?",
        ),
        (("compare_releases.old={old}", "compare_releases.old_census={census}"), "{old} embeds another Census than"),
        (
            ("compare_releases.old={mouse}",),
            "{mouse} is of mus_musculus and {new} of homo_sapiens; compare releases of",
        ),
        (("compare_releases.old={heart}",), "have no cell in common: none of the 1 and"),
    ],
)
def test_bad_input_is_one_line(
    settings: tuple[str, ...], said: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    next_run: Run,
) -> None:  # fmt: skip
    arguments = [setting.format(**places) for setting in settings]
    assert next_run("compare-releases", f"compare_releases.folder={tmp_path / 'out'}", *arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said.format(**places) in line
    assert not (tmp_path / "out" / "comparison.json").exists()


@pytest.fixture(scope="module")
def places(
    finished_run: Run, next_run: Run, next_census: str, demo_census: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Locations for settings: releases that cannot be compared among them."""
    folder = tmp_path_factory.mktemp("places")
    mouse = Run(folder / "mouse", demo_census, census={"organism": "mus_musculus"}, hvg={"top_n_hvg": 50}).all()
    query = f"dataset_id == '{GONE}'"
    heart = Run(folder / "heart", demo_census, census={"obs_query": query}, hvg={"top_n_hvg": 50, "hvg_batch": []})
    heart.all()
    trained = folder / "trained"
    shutil.copytree(finished_run.directory, trained)
    manifest = json.loads((trained / "manifest.json").read_text())
    del manifest["stages"]["create-latent-update"]
    (trained / "manifest.json").write_text(json.dumps(manifest))
    runs = {"old": finished_run, "new": next_run, "mouse": mouse, "heart": heart}
    found = {name: str(run.directory) for name, run in runs.items()}
    return found | {"folder": str(folder), "trained": str(trained), "census": next_census}
