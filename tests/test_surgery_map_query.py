"""scvi-map-query.py with query.surgery: from a file to a file and an adapted model, also after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from pipeline import STAGES, Run
from test_train import trained_for

from census_scvi import Atlas
from census_scvi.model.build import quiet
from census_scvi.model.safe import load_safe

QUICK = (
    "query.surgery_training.max_epochs=4",
    "query.surgery_training.lr=0.01",
    "query.umap_cells=0",
    "query.baseline_cells=0",
    "annotate.method=neighbors",
)


@pytest.fixture(scope="module")
def run(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory with a model that can be extended."""
    model = {"encode_covariates": True, "arguments": {"use_layer_norm": "both", "use_batch_norm": "none"}}
    run = Run(tmp_path_factory.mktemp("run"), demo_census, model=model)
    for stage in STAGES:
        assert run(stage) == 0
    return run


@pytest.fixture
def query(demo_census: str, tmp_path: Path) -> Path:
    """A user's file: two samples, the second measured with less of some genes."""
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "homo_sapiens", obs_value_filter="soma_joinid < 200")
    cells.var = pd.DataFrame(index=cells.var["feature_id"].astype(str).to_numpy())
    sample = np.array(["here", "there"], dtype=object)[np.arange(200) % 2]
    cells.obs = pd.DataFrame({"sample": sample}, index=[f"cell-{number}" for number in range(200)])
    counts = cells.X.toarray()
    counts[sample == "there", ::3] //= 2
    cells.X = sp.csr_matrix(counts)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def settings(query: Path, name: str, mode: str = "joint") -> list[str]:
    output = query.with_name(f"{name}.h5ad")
    return [
        f"query.file={query}",
        f"query.output={output}",
        "query.batch_key=[sample]",
        f"query.surgery={mode}",
        *QUICK,
    ]


def test_from_file_to_file_with_an_adapted_model(run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("map-query", *settings(query, "out")) == 0
    assert "joint: 2 batches, 200 cells, 4 epochs, 8 steps; the latent of" in capsys.readouterr().err
    names = {"cells.h5ad", "out.h5ad", "out.json", "out-model", "out-cell_type.html", "out-cell_type.json"}
    assert {path.name for path in query.parent.iterdir()} == names
    report = json.loads(query.with_name("out.json").read_text())
    assert report["surgery"]["mode"] == "joint"
    assert report["surgery"]["batches"] == ["here", "there"]
    moved = report["surgery"]["trainings"][0]["moved"]
    assert (moved["weights"], moved["source"]) == (0, "reference")
    assert moved["latent"] <= 1e-6  # rounding: matrix products of another width
    assert "200 cells, 4 epochs" in query.with_name("out-cell_type.html").read_text()
    folder = query.with_name("out-model")
    _, description = load_safe(folder)
    _, before = load_safe(run.path("scvi.model"))
    assert description.batches == [*before.batches, "here", "there"]
    assert description.lineage[0]["query"]["name"] == "cells.h5ad"
    mapped = ad.read_h5ad(query.with_name("out.h5ad"))
    assert mapped.obs["cell_type_predicted"].notna().all()
    cells = ad.read_h5ad(query)[:, description.genes].copy()
    cells.obs["batch"] = cells.obs["sample"].astype(str)
    with quiet("scvi"):
        plain = scvi.model.SCVI.load(str(folder), adata=cells, accelerator="cpu")
    np.testing.assert_allclose(mapped.obsm["X_scvi"], plain.get_latent_representation(), atol=1e-6)
    with Atlas.open(folder) as atlas:
        np.testing.assert_allclose(atlas.embed(query).obsm["X_scvi"], mapped.obsm["X_scvi"], atol=1e-6)
    assert run("map-query", *settings(query, "out")) == 0
    assert "map-query is done for these settings" in capsys.readouterr().err
    assert run("map-query", *settings(query, "out", "sequential")) == 2
    assert 'query.surgery was "joint" and is "sequential"; set another query.output' in capsys.readouterr().err
    assert run("map-query", *settings(query, "out", "per_batch"), "--force") == 0
    assert {path.name for path in folder.iterdir()} == {"batch-000", "batch-001", "surgery.json"}
    with_both = [f"query.file={query}", f"query.model={folder}", f"query.output={query.with_name('again.h5ad')}"]
    census = [f"census.uri={run.manifest()['stages']['prepare']['census']['uri']}", f"query.embedding={run.directory}"]
    assert run("map-query", *with_both, *census, "query.batch_key=[sample]", *QUICK) == 0
    again, mapped = (ad.read_h5ad(query.with_name(f"{name}.h5ad")).obsm["X_scvi"] for name in ("again", "out"))
    np.testing.assert_allclose(again, mapped, atol=1e-6)
    (folder / "batch-000" / "model.json").write_text("{}")
    assert run("map-query", *settings(query, "out", "per_batch")) == 2
    assert "out-model/batch-000/model.json has 2 bytes, expected" in capsys.readouterr().err


def test_mappings_are_compared_with_the_labels_of_the_census(run: Run, query: Path) -> None:
    with Atlas.open(run.directory) as atlas:
        found = atlas.compare_mappings(
            query, "sample", labels="cell_type", training={"max_epochs": 2, "lr": 0.01}, max_cells=500
        )
    assert (found.table["moved"] <= 1e-6).all()
    assert found.table.loc["joint", "agreement_mlp"] == 1
    assert found.table["mixing"].between(0, 1.5).all()
    assert "accuracy_mlp" not in found.table  # the labels of these cells are not known


def test_dry_run_and_mistakes(run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("map-query", *settings(query, "out"), "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"{query.with_name('out-model')}" in out
    assert "surgery joint: 2 batches (200 cells), 1 training for up to 4 epochs; a killed" in out
    taken = ad.read_h5ad(query)
    _, description = load_safe(run.path("scvi.model"))
    for column, value in zip(description.batch_key, description.batches[0].split("|"), strict=True):
        taken.obs[column] = np.where(taken.obs["sample"] == "here", value, "another")
    taken.write_h5ad(query)
    columns = f"query.batch_key=[{', '.join(description.batch_key)}]"
    for arguments in ([], ["--dry-run"]):
        assert run("map-query", *settings(query, "out"), columns, *arguments) == 2
        assert "is a batch of the query and of the reference: training would move" in capsys.readouterr().err
    assert [path.name for path in query.parent.iterdir()] == ["cells.h5ad"]
    folder = query.with_name("out-model")
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    for arguments in (["--force"], ["--dry-run"]):
        assert run("map-query", *settings(query, "out"), *arguments) == 2
        assert f"{folder} exists and is not a model that surgery wrote, and the adapted" in capsys.readouterr().err
    (folder / "surgery.json").write_text("{}")
    assert run("map-query", *settings(query, "out"), f"query.model={folder}", "--force") == 2
    assert f"query.model is {folder}, which the adapted model would replace" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "kept"


KILL = """
import os, signal
from census_scvi.training import checkpoint
from census_scvi.training.checkpoint import Checkpoint
checkpoint._SHARE = 1e9  # one after each epoch, also of short ones
write, written = Checkpoint._write, []
def kill(self, trainer):
    write(self, trainer)
    written.append(1)
    if len(written) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint._write = kill
"""


def test_a_killed_surgery_continues(run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the second of two trainings: the first is not repeated, and the result is that of a whole one."""
    assert run("map-query", *settings(query, "whole", "sequential"), "query.labels=[]") == 0
    capsys.readouterr()
    out = [*settings(query, "out", "sequential"), "query.labels=[]"]
    killed = run.subprocess("map-query", *out, before=f"exec({KILL!r})")
    assert killed.returncode == -signal.SIGKILL
    work = query.with_name("out-model.training")
    assert (work / "training-000" / "model").is_dir()
    assert not (work / "training-001" / "model").exists()
    trained_for(work / "training-001" / "checkpoint.ckpt", 1000.0, 500.0)
    assert run("map-query", *out) == 0
    log = capsys.readouterr().err
    assert f"continuing the surgery in {work}" in log
    assert (log.count("epoch 1/4"), log.count("epoch 4/4")) == (0, 1)  # the second training goes on
    assert not work.exists()
    whole, resumed = (query.with_name(f"{name}-model") / "weights.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    _, description = load_safe(resumed.parent)
    first, second = (training["seconds"] for training in description.lineage[-2:])
    assert 0 < first < 100
    assert 1000 < second < 1100


def test_a_comparison_is_reported_and_the_cells_are_mapped_jointly(
    run: Run, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ad.read_h5ad(query)
    cells.obs["cell_type"] = ["B cell", "no such type"] * 100
    cells.write_h5ad(query)
    assert run("map-query", *settings(query, "joint")) == 0
    assert run("map-query", *settings(query, "compared", "compare"), "--dry-run") == 0
    assert (
        "surgery compare: 2 batches (200 cells), 11 trainings for up to 4 epochs or as many steps"
        in capsys.readouterr().out
    )
    assert run("map-query", *settings(query, "compared", "compare")) == 0
    log = capsys.readouterr().err
    assert "comparison of the ways to map: " in log
    assert log.count("epoch 4/4") == 3 + 2 + 2 * 2  # the joint training of the comparison is not repeated
    jointly, compared = (ad.read_h5ad(query.with_name(f"{name}.h5ad")) for name in ("joint", "compared"))
    np.testing.assert_array_equal(jointly.obsm["X_scvi"], compared.obsm["X_scvi"])
    assert not query.with_name("compared-model.training").exists()
    record = json.loads(query.with_name("compared-surgery.json").read_text())
    ways = ["joint", "joint, seed 1", "joint, seed 2", "per batch, equal epochs", "per batch, equal steps"]
    assert list(record["ways"]) == [*ways, "sequential", "sequential, reverse order", "no surgery"]
    assert record["ways"]["joint"]["distance_mean"] == 0
    assert 0 <= record["ways"]["joint"]["accuracy_neighbors"] <= 1  # of the B cells: the reference lacks the other type
    assert record["facts"]["batches"] == "sample: here (100 cells), there (100 cells)"
    page = query.with_name("compared-surgery.html").read_text()
    assert record["recommendation"] in page
    assert page.count("<img src=") == 2 * 8
