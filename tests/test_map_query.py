"""scvi-map-query.py: from a file to a file with embedding, map, labels, a picture and a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anndata as ad
import cellxgene_census
import h5py
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata.io import read_elem, write_elem
from pipeline import Run

from census_scvi.cli import main

ORGANISM = "homo_sapiens"


@pytest.fixture
def query(demo_census: str, tmp_path: Path) -> Path:
    """A user's file: symbols, a layer of counts, X normalised, a map and an obs column of its own."""
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, ORGANISM, obs_value_filter="soma_joinid < 250")
    cells.var = pd.DataFrame(index=cells.var["feature_name"].astype(str).to_numpy())
    cells.obs = pd.DataFrame({"mine": np.arange(250) % 3}, index=[f"cell-{number}" for number in range(250)])
    cells.layers["counts"] = cells.X.copy()
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    cells.obsm["X_umap"] = np.zeros((250, 2))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def map_query(run: Run, *settings: str) -> int:
    return main("map-query", ["--config", str(run.config), "query.umap_cells=300", "annotate.method=fast", *settings])


def test_from_file_to_file(finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, data = ad.read_h5ad(query), query.read_bytes()
    labels, overrides = "query.labels=[cell_type, tissue]", "annotate.overrides={n_neighbors: 9}"
    assert map_query(finished_run, f"query.file={query}", labels, overrides, "query.batch_key=[mine]") == 0
    assert query.read_bytes() == data
    target = query.with_name("cells-mapped.h5ad")
    mapped = sc.read_h5ad(target)
    assert np.array_equal(mapped.X.toarray(), before.X.toarray())  # all that was there is there
    assert (mapped.layers["counts"] != before.layers["counts"]).nnz == 0
    assert mapped.obs["mine"].tolist() == before.obs["mine"].tolist()
    assert np.array_equal(mapped.obsm["X_umap_before"], before.obsm["X_umap"])
    latent = np.load(finished_run.path("latent.npy"))[:250]
    np.testing.assert_allclose(mapped.obsm["X_scvi"], latent, atol=1e-5)
    assert mapped.obsm["X_umap"].shape == (250, 2)
    assert np.isfinite(mapped.obsm["X_umap"]).all()
    for labels in ("cell_type", "tissue"):
        assert isinstance(mapped.obs[f"{labels}_predicted"].dtype, pd.CategoricalDtype)
        assert mapped.obs[f"{labels}_probability"].between(0, 1).all()
        assert mapped.obs[f"{labels}_uncertainty"].between(0, 1).all()
    report = json.loads(target.with_suffix(".json").read_text())
    assert report["alignment"]["counts"] == "layers/counts"
    assert sum(report["predictions"]["cell_type"]["cells"].values()) == report["cells"] == 250
    assert report["predictions"]["cell_type"]["batches"]["batch"] == ["0", "1", "2"]
    assert report["predictions"]["tissue"]["n_neighbors"] == 9
    held_out = report["predictions"]["cell_type"]["held_out"]
    assert all(
        0 < held_out[name]["accuracy"] <= 1 for name in ("fast", "harmony", "neighbors", "pca", "logistic_regression")
    )
    assert (query.parent / "cells-mapped-cell_type.png").stat().st_size > 10_000
    picture = matplotlib.image.imread(target.with_suffix(".png"))
    assert picture.shape[1] > picture.shape[0] > 400
    assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 20
    assert "cell_type: " in capsys.readouterr().err


def test_terms_of_the_cell_ontology_and_a_report_of_each_label(
    finished_run: Run, demo_census: str, query: Path
) -> None:
    """The file's own term ids, as CELLxGENE's files have them, are kept; a tissue has no term of a cell type."""
    cells = ad.read_h5ad(query)
    cells.obs["cell_type_ontology_term_id"] = "CL:0000548"
    cells.write_h5ad(query)
    settings = (
        "query.labels=[cell_type, tissue]",
        "query.umap_cells=0",
        "query.baseline_cells=400",
        "annotate.method=fast",
    )
    assert map_query(finished_run, f"query.file={query}", *settings) == 0
    obs = ad.read_h5ad(query.with_name("cells-mapped.h5ad")).obs
    assert (obs["cell_type_ontology_term_id"] == "CL:0000548").all()
    known = obs[~obs["cell_type_unknown"]]
    with cellxgene_census.open_soma(uri=demo_census) as root:
        reference = cellxgene_census.get_obs(
            root, "homo_sapiens", column_names=["cell_type", "cell_type_ontology_term_id"]
        ).drop_duplicates()
    terms = dict(reference.astype(str).itertuples(index=False, name=None))
    flat = known["cell_type_predicted"].astype(str).map(terms)
    assert (known["cell_type_predicted_ontology_term_id"].astype(str) == flat).all()
    same = known["cell_type_ontology"].astype(str) == known["cell_type_predicted"].astype(str)
    assert (known["cell_type_ontology_id"].astype(str)[same] == flat[same]).all()
    assert known["cell_type_ontology_id"].str.startswith("CL:").all()
    assert (known["cell_type_ontology_probability"] >= 0.6).all()
    assert not [name for name in obs if name.startswith("tissue_ontology")]
    assert set(obs.loc[obs["cell_type_unknown"], "cell_type_ontology"].astype(str)) <= {"unknown"}
    report = json.loads(query.with_name("cells-mapped-cell_type.json").read_text())
    assert {row["label"]: row["cells"] for row in report["types"]} == {
        name: number for name, number in obs["cell_type_predicted"].value_counts().items() if number
    }
    assert sum(row["cells"] for row in report["names"]) == (~same).sum()
    assert {row["term"] for row in report["types"]} <= {*terms.values(), None}
    assert "hierarchical_f1" in report["validation"][0]
    assert any(row["markers"] for row in report["types"])
    page = query.with_name("cells-mapped-tissue.html").read_text()
    assert "labels have no term of the Cell Ontology" in page
    assert "Harmony" in page or "PCA" in page


def test_a_table_of_log_values_gives_what_the_counts_give(finished_run: Run, query: Path) -> None:
    cells = ad.read_h5ad(query)
    cells.to_df().to_csv(query.with_name("logged.csv"))  # X is normalised
    quick = ("query.umap_cells=0", "query.baseline_cells=0")
    assert map_query(finished_run, f"query.file={query}", *quick) == 0
    assert map_query(finished_run, f"query.file={query.parent}/logged.csv", "query.values=log_normalized", *quick) == 0
    counted, logged = (ad.read_h5ad(query.with_name(f"{name}-mapped.h5ad")) for name in ("cells", "logged"))
    np.testing.assert_allclose(logged.obsm["X_scvi"], counted.obsm["X_scvi"], atol=1e-4)
    np.testing.assert_allclose(logged.X.toarray(), cells.X.toarray(), rtol=1e-6)
    assert (logged.obs["cell_type_predicted"] == counted.obs["cell_type_predicted"]).all()


def test_run_again(finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("query.umap_cells=0", "query.baseline_cells=200")
    settings = (f"query.file={query}", f"query.output={query.parent}/out.h5ad", *quick)
    assert map_query(finished_run, *settings) == 0
    first = ad.read_h5ad(query.parent / "out.h5ad")
    assert not (query.parent / "out.png").exists()
    written = {path: path.stat().st_mtime_ns for path in query.parent.iterdir()}
    assert map_query(finished_run, *settings) == 0
    assert "map-query is done for these settings" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in query.parent.iterdir()} == written
    assert map_query(finished_run, *settings, "query.min_share=0.7") == 2
    assert (
        "out.h5ad exists and was made with other settings: query.min_share was 0.8 and is 0.7; set another"
        " query.output, or replace it with --force" in capsys.readouterr().err
    )
    (query.parent / "out.h5ad").write_bytes(b"cut")
    assert map_query(finished_run, *settings) == 2
    assert "out.h5ad has 3 bytes, expected" in capsys.readouterr().err
    report = json.loads((query.parent / "out.json").read_text())
    for damaged in ({}, {**report["run"], "outputs": []}, {**report["run"], "fingerprint": None}):
        (query.parent / "out.json").write_text(json.dumps(report | {"run": damaged}))
        assert map_query(finished_run, *settings) == 2
        assert "out.h5ad exists; set another query.output" in capsys.readouterr().err
    (query.parent / "out.json").unlink()
    assert map_query(finished_run, *settings) == 2
    assert "out.h5ad exists; set another query.output, or replace it with --force" in capsys.readouterr().err
    assert map_query(finished_run, *settings, "--force") == 0
    record = json.loads((query.parent / "out.json").read_text())["run"]
    assert record["stage"] == "map-query"
    assert record["fingerprint"]["config"]["query.min_share"] == 0.8
    assert set(record["outputs"]) == {"out.h5ad", *(f"out-cell_type.{kind}" for kind in ("png", "html", "json"))}
    pd.testing.assert_frame_equal(ad.read_h5ad(query.parent / "out.h5ad").obs, first.obs)
    # the output of one run is the input of another
    again = (f"query.file={query.parent}/out.h5ad", f"query.output={query.parent}/again.h5ad", *quick)
    assert map_query(finished_run, *again) == 0
    np.testing.assert_allclose(
        ad.read_h5ad(query.parent / "again.h5ad").obsm["X_scvi"], first.obsm["X_scvi"], atol=1e-6
    )


def test_dry_run_changes_nothing(finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert map_query(finished_run, f"query.file={query}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"read   {query}: raw counts from layers/counts" in out
    assert "with   250 cells x" in out
    assert main("map-query", ["--config", str(finished_run.config), f"query.file={query}", "--dry-run"]) == 0
    trained = capsys.readouterr().out  # by consensus
    fast, slow = (re.search(r"and (.+) on this machine", text) for text in (out, trained))
    assert fast and slow and fast[0] != slow[0]
    assert list(query.parent.glob("*mapped*")) == []


def test_mistakes(finished_run: Run, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, message in {
        (): "query.file is not set; give the file with your cells",
        (f"query.file={query}", f"query.output={query}"): "query.output is query.file",
        (f"query.file={query}", f"query.output={tmp_path}/no/such/folder.h5ad"): "does not exist; create the folder",
        ("query.file=none.h5ad",): "none.h5ad: no such file",
        (f"query.file={query}", "query.labels=[cell_tipe]"): "did you mean cell_type?",
        (
            f"query.file={query}",
            "query.obs_filter=tissue == 'Blut'",
        ): "query.obs_filter \"tissue == 'Blut'\" matches",
        (f"query.file={query}", "query.obs_filter=nnz == 'few'"): "query.obs_filter \"nnz == 'few'\" cannot be used",
        (f"query.file={query}", "query.counts=X"): "does not contain raw counts",
        (f"query.file={query}", f"query.model={tmp_path}"): "has no provenance.json",
        (
            f"query.file={query}",
            "annotate.overrides={n_neighbour: 5}",
        ): "not an argument of fast; did you mean n_neighbors?",
        (f"query.file={query}", "annotate.method=scnym", "annotate.overrides={n_epoch: 5}"): "is not a hyper-parameter",
        (f"query.file={query}", "query.n_neighbors=0"): "n_neighbors is 0; expected a whole number of 1",
    }.items():
        assert map_query(finished_run, *settings) == 2, settings
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(query.parent.glob("*mapped*")) == []


def test_a_full_disk_leaves_nothing_half_written(
    finished_run: Run, query: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("census_scvi.counts.formats.copy_cells.write_elem", full)
    assert map_query(finished_run, f"query.file={query}", "query.umap_cells=0", "query.baseline_cells=0") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in query.parent.iterdir()] == ["cells.h5ad"]


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_killed_run_is_repeated_without_force(finished_run: Run, query: Path, renamed: int) -> None:
    """Killed before each file is put into its place: quality picture, report, cells."""
    settings = (f"query.file={query}", "query.umap_cells=0", "query.baseline_cells=100", "annotate.method=fast")
    before = (
        "import os, pathlib; renames = iter(range(%d)); replace = pathlib.Path.replace; pathlib.Path.replace ="
        " lambda *a: replace(*a) if next(renames, None) is not None else os._exit(9)"
    )
    done = finished_run.subprocess("map-query", *settings, before=before % renamed)
    assert done.returncode == 9
    assert not query.with_name("cells-mapped.h5ad").exists()
    assert map_query(finished_run, *settings) == 0
    names = {"cells.h5ad", "cells-mapped.h5ad", "cells-mapped.json"}
    names |= {f"cells-mapped-cell_type.{kind}" for kind in ("png", "html", "json")}
    assert {path.name for path in query.parent.iterdir()} == names
    report = json.loads(query.with_name("cells-mapped.json").read_text())
    assert report["cells"] == ad.read_h5ad(query.with_name("cells-mapped.h5ad")).n_obs


def test_a_run_directory_that_is_not_there(
    finished_run: Run, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is taken for its model or embedding, but what the config names."""
    (tmp_path / "empty").mkdir()
    for name, found in (("none", "does not exist"), ("empty", "has no manifest.json, so no stage ran in it")):
        for arguments in ((), ("--dry-run",)):
            assert (
                map_query(finished_run, f"query.file={query}", f"output.directory={tmp_path / name}", *arguments) == 2
            )
            message = capsys.readouterr().err
            assert f"run directory {tmp_path / name} {found}; give it in output.directory, or a published" in message
    named = (f"query.model={finished_run.directory}", f"output.directory={tmp_path}/none")
    assert map_query(finished_run, f"query.file={query}", "query.umap_cells=0", "query.baseline_cells=0", *named) == 0
    assert f"embedding of the Census' cells: {finished_run.directory}" in capsys.readouterr().err
    for place, message in {
        f"{tmp_path}/none": "none does not exist; give a run directory, an Experiment, or a name in obsm",
        "none": "has no obsm['none']",
    }.items():
        assert map_query(finished_run, f"query.file={query}", f"query.embedding={place}", "--force") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("n_cells", [1, 2, 3])
def test_a_map_of_few_cells(finished_run: Run, query: Path, n_cells: int) -> None:
    settings = (f"query.file={query}", "query.labels=[]", f"query.umap_cells={n_cells}")
    assert main("map-query", ["--config", str(finished_run.config), *settings]) == 0
    positions = ad.read_h5ad(query.with_name("cells-mapped.h5ad")).obsm["X_umap"]
    assert len(np.unique(positions, axis=0)) == 1  # each in the middle of all of the reference
    assert matplotlib.image.imread(query.with_name("cells-mapped.png")).std() > 0.01


def test_a_query_that_is_far_is_said_so(finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the genes take most of the counts, as in no cell of the reference; and cells without counts."""
    cells = ad.read_h5ad(query)
    counts = cells.layers["counts"].toarray()
    counts[:, ::10] = counts[:, ::10] * 60 + 40
    counts[:3] = 0
    cells.layers["counts"] = counts
    cells.write_h5ad(query)
    assert map_query(finished_run, f"query.file={query}", "query.umap_cells=0") == 0
    messages = capsys.readouterr().err
    found = json.loads(query.with_name("cells-mapped.json").read_text())["predictions"]["cell_type"]
    assert found["far"]
    assert found["batches"]["beyond"] > [0.5] or found["batches"]["agreed"] < [0.5]
    assert "3 cells without counts among them" in messages
    assert "check their labels with marker genes" in messages
    mapped = ad.read_h5ad(query.with_name("cells-mapped.h5ad")).obs
    for column in ("cell_type_predicted", "cell_type_pca", "cell_type_logistic_regression"):
        assert mapped[column].iloc[:3].tolist() == ["unknown"] * 3


def test_the_threshold_of_the_config_holds_and_is_named(
    finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ad.read_h5ad(query)[:, ::2].copy()
    cells.write_h5ad(query)
    for settings, needed in {
        (): "80% are needed (query.min_share), or 90% of the counts",
        ("query.min_share=0.9",): "90% are needed (query.min_share)",
        ("genes.min_share=0.9",): "90% are needed (genes.min_share)",
        ("genes.min_share=0.3", "query.min_share=0.7"): "70% are needed (query.min_share)",
    }.items():
        assert map_query(finished_run, f"query.file={query}", *settings) == 2
        assert needed in capsys.readouterr().err
    for setting in ("genes.min_share=0.3", "query.min_share=0.3"):
        quick = ("query.umap_cells=0", "query.labels=[]")
        assert map_query(finished_run, f"query.file={query}", setting, *quick, "--force") == 0


def nullable_text(table: pd.DataFrame) -> pd.DataFrame:
    """Text as pandas 3 has it, in the index, in columns with and without missing values, and in categories."""
    table = table.copy()
    table.index = table.index.astype("string")
    table["text"] = pd.array(["a"] * len(table), dtype="string")
    table["gaps"] = pd.array([None, *["b"] * (len(table) - 1)], dtype="string")
    table["kinds"] = pd.Categorical(pd.array(["x", "y"] * (len(table) // 2), dtype="string"))
    table["numbers"] = pd.array([None, *range(len(table) - 1)], dtype="Int64")
    return table


def test_obs_of_pandas_3_is_written_as_any_anndata_reads_it(finished_run: Run, query: Path) -> None:
    with h5py.File(query, "r+") as file, ad.settings.override(allow_write_nullable_strings=True):
        before = nullable_text(read_elem(file["obs"]))
        write_elem(file, "obs", before)
        assert file["obs/_index"].attrs["encoding-type"] == "nullable-string-array"
    assert map_query(finished_run, f"query.file={query}", "query.umap_cells=0", "query.baseline_cells=0") == 0
    target = query.with_name("cells-mapped.h5ad")
    assert sorted(path.name for path in query.parent.glob("cells*")) == [
        "cells-mapped-cell_type.html", "cells-mapped-cell_type.json", "cells-mapped.h5ad", "cells-mapped.json",
        "cells.h5ad",
    ]  # fmt: skip
    with h5py.File(target) as file:
        kinds: set[str] = set()
        file["obs"].visititems(lambda _, node: kinds.add(str(node.attrs.get("encoding-type"))))
    assert kinds <= {"string-array", "categorical", "array", "nullable-integer", "None"}
    obs = ad.read_h5ad(target).obs
    assert obs.index.tolist() == before.index.tolist()
    assert obs["text"].tolist() == ["a"] * 250
    assert obs["gaps"].isna().tolist() == before["gaps"].isna().tolist()
    assert obs["kinds"].tolist() == before["kinds"].tolist()
    assert obs["numbers"].equals(before["numbers"].set_axis(obs.index))


def test_nothing_half_written_is_left(finished_run: Run, query: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cannot be written")

    monkeypatch.setattr("census_scvi.counts.formats.copy_cells.write_elem", broken)
    arguments = (f"query.file={query}", "query.umap_cells=0", "query.baseline_cells=0")
    assert map_query(finished_run, *arguments) == 1
    assert [path.name for path in query.parent.glob("cells*")] == ["cells.h5ad"]
