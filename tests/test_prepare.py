"""What prepare writes is what `to_anndata` gives, and what the config asked for."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import cellxgene_census
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import tiledbsoma
import tiledbsoma.io
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census.cells import batch_label, select_cells
from census_scvi.census.genes import read_genes
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection


def expected(census: str, value_filter: str, genes: list[str]) -> ad.AnnData:
    """The cells as the library itself gives them."""
    with cellxgene_census.open_soma(uri=census) as root:
        experiment = root["census_data"]["homo_sapiens"]
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
        joinids = var.loc[var["feature_id"].isin(genes), "soma_joinid"].tolist()
        with experiment.axis_query(
            "RNA",
            obs_query=tiledbsoma.AxisQuery(value_filter=value_filter),
            var_query=tiledbsoma.AxisQuery(coords=(joinids,)),
        ) as query:
            cells = query.to_anndata("raw")
    cells.var = cells.var.set_index("feature_id")
    cells.obs_names = cells.obs_names.astype(str)
    return cells


def test_the_file_is_what_to_anndata_gives(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    written = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    reference = expected(demo_census, "(is_primary_data == True and nnz >= 50)", written.var_names.tolist())
    reference.write_h5ad(tmp_path / "reference.h5ad")
    reference = ad.read_h5ad(tmp_path / "reference.h5ad")
    assert written.obs_names.tolist() != reference.obs_names.tolist()  # the file is shuffled
    written = written[reference.obs_names].copy()
    pd.testing.assert_frame_equal(written.obs.drop(columns="batch"), reference.obs)
    pd.testing.assert_frame_equal(written.var, reference.var)
    for part in ("data", "indices", "indptr"):
        ours, theirs = getattr(written.X, part), getattr(reference.X, part)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert written.X.dtype == np.float32
    assert written.X.indices.dtype == np.int32


@pytest.mark.parametrize("part_pools", [1, 100])
def test_the_size_of_runs_pools_and_parts_changes_the_order_alone(
    part_pools: int, finished_run: Run, demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("census_scvi.census.stream.X_TILE", 97)
    monkeypatch.setattr("census_scvi.counts.file_order.POOL_RUNS", 3)
    monkeypatch.setattr("census_scvi.counts.prepared_store.PART_POOLS", part_pools)
    run = Run(tmp_path, demo_census)
    assert run("prepare") == 0
    ours, theirs = (ad.read_h5ad(r.path("anndata_model.h5ad")) for r in (run, finished_run))
    ours = ours[theirs.obs_names]
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    assert (ours.X != theirs.X).nnz == 0
    assert not list(run.directory.glob("**/part-*"))


def test_obs_columns_and_compression_take_effect(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, anndata={"obs_columns": ["cell_type", "nnz"], "compression": "none"})
    assert run("prepare") == 0
    ours, theirs = (ad.read_h5ad(r.path("anndata_model.h5ad")) for r in (run, finished_run))
    assert ours.obs.columns.tolist() == ["soma_joinid", "cell_type", "nnz", "batch"]
    pd.testing.assert_frame_equal(ours.obs, theirs.obs[ours.obs.columns])
    assert (ours.X != theirs.X).nnz == 0
    with h5py.File(run.path("anndata_model.h5ad")) as file:
        assert file["X/data"].compression is None
    assert run("train") == 0


def test_backed_reading_gives_the_same(finished_run: Run) -> None:
    path = finished_run.path("anndata_model.h5ad")
    backed = ad.read_h5ad(path, backed="r")
    assert (backed.X[5:50] != ad.read_h5ad(path).X[5:50]).nnz == 0
    backed.file.close()


def test_scanpy_works_on_the_file(finished_run: Run) -> None:
    cells = sc.read_h5ad(finished_run.path("anndata_model.h5ad"))
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    assert np.isfinite(cells.X.data).all()


def test_the_genes_are_those_of_the_file_in_census_order(finished_run: Run, demo_census: str) -> None:
    with cellxgene_census.open_soma(uri=demo_census) as root:
        var = root["census_data"]["homo_sapiens"].ms["RNA"].var.read().concat().to_pandas()["feature_id"].tolist()
    genes = read_genes(finished_run.path("hv_genes.pkl"))
    assert genes == sorted(genes, key=var.index)
    assert genes == ad.read_h5ad(finished_run.path("anndata_model.h5ad")).var_names.tolist()


def test_the_genes_file_is_a_pickled_numpy_array_of_str(finished_run: Run) -> None:
    array = pd.read_pickle(finished_run.path("hv_genes.pkl"))
    assert isinstance(array, np.ndarray)
    assert array.dtype.kind == "U"


def test_batch_is_the_combination_of_its_columns(finished_run: Run) -> None:
    obs = ad.read_h5ad(finished_run.path("anndata_model.h5ad")).obs
    keys = ["dataset_id", "assay", "suspension_type", "donor_id"]
    combinations = obs[keys].astype(str).agg("|".join, axis=1)
    assert (obs["batch"].astype(str) == combinations).all()
    assert set(obs["batch"].cat.categories) == set(combinations)  # no category without cells: no untrained weights


@given(*[st.tuples(st.text("ab|\\", max_size=4), st.text("ab|\\", max_size=4))] * 2)
def test_different_combinations_never_share_a_label(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (batch_label(one) == batch_label(other)) == (one == other)


def test_the_counts_of_the_manifest(finished_run: Run) -> None:
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    counts = finished_run.record("prepare")["counts"]
    assert counts["cells"] == cells.n_obs
    assert counts["nonzeros"] == cells.X.nnz
    assert counts["batches"] == cells.obs["batch"].nunique()
    assert counts["cells_without_counts"] == int((cells.X.getnnz(axis=1) == 0).sum())


def test_an_or_in_a_query_does_not_leak(demo_census: str, tmp_path: Path) -> None:
    query = "tissue == 'blood' or tissue == 'lung'"
    run = Run(tmp_path, demo_census, census={"obs_query": query})
    assert run("prepare") == 0
    obs = ad.read_h5ad(run.path("anndata_model.h5ad")).obs
    assert obs["is_primary_data"].all()
    assert set(obs["tissue"].unique()) == {"blood", "lung"}


def test_min_genes_leaves_cells_out_of_training_but_not_of_embedding(demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, census={"obs_query_model": None}, hvg={"min_genes": 120}, train={"max_epochs": 1})
    run.all()
    assert ad.read_h5ad(run.path("anndata_model.h5ad")).obs["nnz"].min() >= 120
    with open_census(CensusSection(uri=demo_census)) as census:
        everything = len(select_cells(census, None, ["dataset_id"]))
        kept = len(select_cells(census, "nnz >= 120", ["dataset_id"]))
    assert run.record("prepare")["counts"]["cells"] == kept < everything
    assert np.load(run.path("latent.npy")).shape[0] == everything


def test_top_n_hvg_and_batch_key_and_filename_take_effect(demo_census: str, tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        demo_census,
        hvg={"top_n_hvg": 57, "hvg_batch": []},
        anndata={"batch_key": ["donor_id"], "model_filename": "cells.h5ad"},
    )
    assert run("prepare") == 0
    cells = ad.read_h5ad(run.path("cells.h5ad"))
    assert cells.n_vars == 57
    assert (cells.obs["batch"].astype(str) == cells.obs["donor_id"].astype(str)).all()


def test_more_genes_than_there_are_takes_all_and_says_so(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census, hvg={"top_n_hvg": 100_000})
    assert run("prepare") == 0
    assert "hvg.top_n_hvg is 100000, but the Census has 600 genes: all are used" in capsys.readouterr().err
    assert run.record("prepare")["counts"]["genes"] == 600


def test_a_batch_of_one_cell_is_kept_and_named(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census, anndata={"batch_key": ["observation_joinid"]}, hvg={"top_n_hvg": 20})
    assert run("prepare", "census.obs_query='soma_joinid < 60'") == 0
    assert "batches have one cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["census.obs_query=\"tissue == 'moon'\""], "no cell of"),
        (["census.obs_query='colour == 1'"], "colour is not an obs column of the Census"),
        (["census.obs_query='tissue =='"], "census.obs_query is 'tissue ==': invalid syntax"),
        (["census.obs_query='tissue == blood'"], "text needs quotes, tissue == 'blood'"),
        (
            ["anndata.batch_key=[dataset_id, assey]"],
            "contains 'assey', which is not an obs column of the Census; did you mean assay?",
        ),
        (["hvg.hvg_batch=[assey]"], "hvg.hvg_batch contains 'assey'"),
        (["anndata.obs_columns=[cell_tipe]"], "anndata.obs_columns contains 'cell_tipe'"),
        (["hvg.hvg_batch=[soma_joinid]"], "hvg.hvg_batch contains 'soma_joinid'"),
        (["census.organism=danio_rerio"], "has no organism 'danio_rerio'; it has homo_sapiens, mus_musculus"),
        (["census.uri=/nowhere/census"], "Census /nowhere/census: it cannot be opened"),
    ],
    ids=["empty", "column", "syntax", "quotes", "batch_key", "hvg_batch", "obs_columns", "joinid", "organism", "uri"],
)
def test_what_the_census_lacks_is_one_clear_line(
    settings: list[str], message: str, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census)
    assert run("prepare", *settings) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert message in error[0]
    assert not run.path("anndata_model.h5ad").exists()


def test_a_collection_that_is_no_census(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "collection")
    tiledbsoma.Collection.create(uri).close()
    assert Run(tmp_path, uri)("prepare") == 2
    assert "is not a Census" in capsys.readouterr().err


def test_gene_selection_is_repeatable_where_the_fit_needs_jitter(demo_census: str, tmp_path: Path) -> None:
    chosen = []
    for name in ("a", "b"):
        run = Run(tmp_path / name, demo_census, hvg={"hvg_batch": ["donor_id", "cell_type"]})
        assert run("prepare") == 0
        chosen.append(read_genes(run.path("hv_genes.pkl")))
    assert chosen[0] == chosen[1]


def test_a_fit_that_fails_in_small_batches_is_explained(
    demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise ValueError(b"Extrapolation not allowed with blending")

    monkeypatch.setattr("census_scvi.census.hvg.seurat_v3.loess", fails)
    assert Run(tmp_path, demo_census)("prepare") == 2
    assert "use fewer columns in hvg.hvg_batch" in capsys.readouterr().err


def test_dry_run_says_what_would_happen_and_writes_nothing(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census)
    assert run("prepare", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "top_n_hvg: 200" in out
    assert "anndata_model.h5ad" in out
    assert "cells x 200 genes" in out
    assert not run.directory.exists()


def test_the_census_is_recorded(finished_run: Run, demo_census: str) -> None:
    census = finished_run.record("prepare")["census"]
    assert census["uri"].removeprefix("file://") == demo_census
    assert census["created_on"]
    assert census["cells"] > 1000
    assert json.dumps(finished_run.manifest())


def test_another_census_under_the_same_name_is_refused(demo_census: str, tmp_path: Path) -> None:
    mine = tmp_path / "census"
    shutil.copytree(demo_census.removeprefix("file://"), mine)
    run = Run(tmp_path, str(mine))
    assert run("prepare") == 0
    with tiledbsoma.open(str(mine), "w") as root:
        root.metadata["created_on"] = "2001-01-01"
    assert run("prepare") == 2


@pytest.fixture
def releases(demo_census: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A list of releases as the Census publishes it, on this machine: 2025-11-08, also called stable."""
    soma = {"uri": demo_census, "s3_region": "us-west-2"}
    release = {"release_build": "2025-11-08", "soma": soma, "h5ads": soma, "flags": {"lts": True}}
    mirror = {"provider": "S3", "base_uri": "s3://nowhere/", "region": "us-west-2"}
    answers = {
        "/release.json": {"stable": "2025-11-08", "2025-11-08": release},
        "/mirrors.json": {"default": "here", "here": mirror},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode())

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        module = "cellxgene_census._release_directory"
        monkeypatch.setattr(f"{module}.CELL_CENSUS_RELEASE_DIRECTORY_URL", f"{url}/release.json")
        monkeypatch.setattr(f"{module}.CELL_CENSUS_MIRRORS_DIRECTORY_URL", f"{url}/mirrors.json")
        yield
        server.shutdown()


@pytest.mark.usefixtures("releases")
@pytest.mark.parametrize("version", ["stable", "2025-11-08"])
def test_a_release_is_opened_by_its_version(demo_census: str, version: str) -> None:
    with open_census(CensusSection(version=version)) as census:
        assert census.identity["uri"].removeprefix("file://") == demo_census
        assert census.identity["version"] == version


@pytest.mark.usefixtures("releases")
def test_a_release_that_does_not_exist(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, demo_census)
    assert run("prepare", "census.uri=null", "census.version=1999-01-01") == 2
    assert "Census release 1999-01-01 cannot be found" in capsys.readouterr().err


@pytest.mark.usefixtures("releases")
def test_uri_wins_over_version(demo_census: str) -> None:
    with open_census(CensusSection(uri=demo_census, version="1999-01-01")) as census:
        assert census.identity["version"] is None


def test_an_obs_column_of_the_census_that_is_replaced_is_named(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    place = f"{tmp_path}/census/census_data/homo_sapiens"
    with tiledbsoma.open(place) as experiment:
        obs = experiment.obs.read().concat().to_pandas().set_index("observation_joinid")
    with tiledbsoma.open(place, "w") as experiment:
        tiledbsoma.io.update_obs(experiment, obs.assign(batch="plate 1"), default_index_name="observation_joinid")
    run = Run(tmp_path, str(tmp_path / "census"), anndata={"batch_key": ["donor_id"]})
    said = "obs column 'batch', which anndata_model.h5ad does not keep"
    assert run("prepare") == 0
    assert said in capsys.readouterr().err
    donors = ad.read_h5ad(run.path("anndata_model.h5ad"), backed="r").obs
    assert (donors["batch"].astype(str) == donors["donor_id"].astype(str)).all()
    for unconcerned in ("anndata.batch_key=[batch]", "anndata.obs_columns=[donor_id]"):
        assert run("prepare", unconcerned, "--dry-run") == 0
        assert said not in capsys.readouterr().err
