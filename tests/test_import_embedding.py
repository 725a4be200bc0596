"""The embedding of any model becomes a run directory: in the order of the Census, exact, and nothing wrong gets in."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma
import yaml
from pipeline import Run
from sklearn.decomposition import TruncatedSVD
from test_faults import KILL

from census_scvi.atlas import Atlas
from census_scvi.census.embedding import published_uri
from census_scvi.counts.row_hash import row_hashes
from census_scvi.errors import UserError
from census_scvi.model.published import seal_of
from census_scvi.publication.chain import verify
from census_scvi.publication.gates import NOT_APPLICABLE, WITHOUT_MODEL

ORGANISM = "homo_sapiens"
Vectors = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def pca(demo_census: str) -> Vectors:
    """A PCA of log-normalised counts and its soma_joinids, in another order than the Census."""
    with cellxgene_census.open_soma(uri=demo_census) as census:
        cells = cellxgene_census.get_anndata(census, ORGANISM)
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    logarithms = sp.diags(1e4 / np.asarray(counts.sum(axis=1)).ravel()) @ counts
    logarithms.data = np.log1p(logarithms.data)
    vectors = TruncatedSVD(10, random_state=0).fit_transform(logarithms).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(vectors))
    return vectors[order], cells.obs["soma_joinid"].to_numpy()[order]


@pytest.fixture
def given(pca: Vectors, demo_census: str, tmp_path: Path) -> Callable[..., Run]:
    """A run whose config imports the PCA, or other vectors and soma_joinids."""

    def make(vectors: np.ndarray = pca[0], joinids: np.ndarray = pca[1], **sections: dict) -> Run:
        np.save(tmp_path / "vectors.npy", vectors)
        np.save(tmp_path / "joinids.npy", joinids)
        run = Run(tmp_path, demo_census)
        places = {name: str(tmp_path / f"{name}.npy") for name in ("vectors", "joinids")}
        values = {
            "census": {"uri": demo_census},
            "import_embedding": {**places, "method": "SVD"},
            "evaluate": {"measured_cells": 300, "batches": ["dataset_id"], "labels": ["cell_type"]},
            "output": {"directory": str(run.directory)},
            **sections,
        }
        run.config.write_text(yaml.safe_dump(values))
        return run

    return make


def test_what_is_imported(given: Callable[..., Run], pca: Vectors, demo_census: str) -> None:
    run = given()
    assert run("import-embedding") == 0
    latent, joinids, hashes = (np.load(run.path(f"latent{name}.npy")) for name in ("", "-idx", "-hash"))
    order = np.argsort(pca[1])
    assert np.array_equal(latent, pca[0][order]) and latent.dtype == np.float32
    assert np.array_equal(joinids, pca[1][order])
    with cellxgene_census.open_soma(uri=demo_census) as census:
        counts = sp.csr_matrix(cellxgene_census.get_anndata(census, ORGANISM).X, dtype=np.float32)
    counts.sort_indices()
    assert np.array_equal(hashes, row_hashes(counts))
    record = run.record("create-latent-update")
    assert record["imported"]["method"] == "SVD"
    assert record["counts"] == {"cells": len(latent), "n_latent": 10}


def test_it_is_evaluated_indexed_and_read(given: Callable[..., Run], pca: Vectors, demo_census: str) -> None:
    run = given()
    for stage in ("import-embedding", "index", "evaluate"):
        assert run(stage) == 0
    scores = json.loads(run.path("evaluation/metrics.json").read_text())["scores"]
    assert set(scores) == {"SVD", "PCA"}
    with Atlas.open(census=demo_census, embedding=run.directory) as atlas:
        cells = atlas.embeddings("tissue_general == 'blood'")
        assert "the extra" not in repr(atlas)
    rows = np.searchsorted(np.sort(pca[1]), cells.obs["soma_joinid"].to_numpy())
    assert np.array_equal(cells.obsm["scvi"], pca[0][np.argsort(pca[1])][rows])


@pytest.mark.slow
def test_random_vectors_score_at_chance(given: Callable[..., Run], pca: Vectors) -> None:
    run = given(np.random.default_rng(1).normal(size=pca[0].shape))
    for stage in ("import-embedding", "evaluate"):
        assert run(stage) == 0
    scores = json.loads(run.path("evaluation/metrics.json").read_text())["scores"]
    forest = {
        name: next(score["value"] for score in some if score["metric"] == "classifier_forest")
        for name, some in scores.items()
    }
    assert forest["SVD"] < 0.35 < forest["PCA"]


@pytest.fixture
def census(demo_census: str, tmp_path: Path) -> str:
    """A copy of the demo Census, to publish into."""
    shutil.copytree(demo_census, tmp_path / "census")
    return str(tmp_path / "census")


def test_it_is_published_verified_searched_and_annotates(
    given: Callable[..., Run], pca: Vectors, census: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given(census={"uri": census})
    for stage in ("import-embedding", "index"):
        assert run(stage) == 0
    assert run("publish", "--dry-run") == 0
    assert run("publish", "publish.name=svd") == 0
    assert "not applicable: no model given" in capsys.readouterr().err
    qa = json.loads(run.path("qa.json").read_text())
    assert [gate["name"] for gate in qa["gates"]] == list(WITHOUT_MODEL) and qa["sound"]
    assert set(qa["not_applicable"]) == set(NOT_APPLICABLE)
    record = json.loads(run.path("published/provenance.json").read_text())
    assert record["model"] is None and record["gates"] == qa
    card = run.path("published/README.md").read_text()
    assert "| re_embedding | | | not applicable: no model given |" in card and "by SVD" in card
    folder = str(run.path("published"))
    links = verify(folder, census)
    assert all(link.valid for link in links), links
    assert [link.name for link in links] == ["provenance", "files", "gates", "census", "publication", "embedding"]
    with pytest.raises(UserError, match=r"without its model; open its Census to read it: Atlas.open\(census=..., "):
        Atlas.open(folder)
    with Atlas.open(census=census, embedding="svd") as atlas:
        theirs = atlas.embeddings("dataset_id == 'demo-human-blood'")
        mine = ad.AnnData(obs=theirs.obs[["cell_type"]], obsm={"X_scvi": theirs.obsm["scvi"]})
        true = mine.obs.pop("cell_type").astype(str).to_numpy()
        named = atlas.predict(mine, obs_filter="dataset_id != 'demo-human-blood'", method="neighbors")
        assert (named.obs["cell_type_best"].astype(str).to_numpy() == true).mean() > 0.8
        found = atlas.neighbors(mine, n_neighbors=1, max_cells=500)  # with the published index
        assert found.distances.max() < 1e-2
        mine.obsm["X_scvi"] = mine.obsm["X_scvi"][:, :3]
        for wrong, message in (
            (mine, r"is float32 \(\d+, 3\); expected finite floats with 10"),
            ("x.h5ad", "needs a model"),
        ):
            with pytest.raises(UserError, match=message):
                atlas.predict(wrong)


def test_a_file_with_vectors_is_annotated(
    given: Callable[..., Run], pca: Vectors, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given()
    assert run("import-embedding") == 0
    with cellxgene_census.open_soma(uri=demo_census) as census:
        mine = cellxgene_census.get_anndata(census, ORGANISM, obs_value_filter="dataset_id == 'demo-human-blood'")
    places = np.argsort(pca[1])[mine.obs["soma_joinid"]]
    mine.obsm["X_svd"], true = pca[0][places], mine.obs.pop("cell_type").astype(str).to_numpy()
    mine.obsm["X_short"] = mine.obsm["X_svd"][:, :3]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    query = [f"query.file={tmp_path}/mine.h5ad", "query.obs_filter=dataset_id != 'demo-human-blood'"]
    assert run("map-query", *query, "query.vectors=X_svd", "query.umap_cells=300", "--dry-run") == 0
    assert "10 dimensions from obsm['X_svd']" in capsys.readouterr().out
    assert run("map-query", *query, "query.vectors=X_svd", "query.umap_cells=300") == 0
    found = ad.read_h5ad(tmp_path / "mine-mapped.h5ad")
    assert (found.obs["cell_type_best"].astype(str).to_numpy() == true).mean() > 0.8
    assert np.array_equal(found.obsm["X_scvi"], mine.obsm["X_svd"])
    assert found.obsm["X_umap"].shape == (len(true), 2)
    assert "alignment" not in json.loads((tmp_path / "mine-mapped.json").read_text())
    for wrong, message in (
        ("query.vectors=X_svt", r"has no obsm\['X_svt'\]; did you mean X_svd\?; obsm has X_short, X_svd"),
        ("query.vectors=X_short", r"is float32 \(\d+, 3\); expected finite floats with 10 dimensions"),
    ):
        assert run("map-query", *query, wrong, f"query.output={tmp_path}/wrong.h5ad") == 2
        assert re.search(message, capsys.readouterr().err)
    assert run("map-query", *query, "query.vectors=X_svd", "query.model=somewhere") == 2
    assert "would make others; set one of them" in capsys.readouterr().err


def test_random_vectors_are_not_published(
    given: Callable[..., Run], pca: Vectors, census: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of a cell, the same counts, have different vectors."""
    run = given(np.random.default_rng(1).normal(size=pca[0].shape), census={"uri": census})
    assert run("import-embedding") == 0
    assert run("publish") == 2
    assert "1 gate(s) stop publishing: order: " in capsys.readouterr().err
    assert published_uri(f"{census}/census_data/{ORGANISM}", "scvi") is None


def test_cells_without_a_vector_stop_publishing(
    given: Callable[..., Run], pca: Vectors, census: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given(pca[0][:900], pca[1][:900], census={"uri": census})
    assert run("import-embedding") == 0
    assert run("publish") == 2
    assert "stop publishing: cells: 600 missing" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["gates", "embedding"])
def test_a_forged_publication_without_a_model_is_noticed(
    link: str, given: Callable[..., Run], pca: Vectors, census: str
) -> None:
    run = given(census={"uri": census})
    assert run("import-embedding") == 0
    assert run("publish") == 0
    path = run.path("published/provenance.json")
    record = json.loads(path.read_text())
    record.pop("seal")
    if link == "gates":
        record["gates"]["gates"] = [gate for gate in record["gates"]["gates"] if gate["name"] != "order"]
    else:
        record["embedding"]["sha256"] = "0" * 64
    path.write_text(json.dumps({**record, "seal": seal_of(record)}))
    assert link in {found.name for found in verify(str(run.path("published")), census) if not found.valid}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floats_are_converted(
    dtype: type, given: Callable[..., Run], pca: Vectors, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given(pca[0].astype(dtype))
    assert run("import-embedding") == 0
    assert f"is {np.dtype(dtype)}, and is converted to float32" in capsys.readouterr().err
    wanted = pca[0].astype(dtype).astype(np.float32)[np.argsort(pca[1])]
    assert np.array_equal(np.load(run.path("latent.npy")), wanted)


def with_value(value: float) -> Callable[[Vectors], Vectors]:
    def change(pca: Vectors) -> Vectors:
        vectors = pca[0].astype(np.float64)
        vectors[7, 3] = value
        return vectors, pca[1]

    return change


WRONG: dict[str, tuple[Callable[[Vectors], Vectors], str]] = {
    "NaN": (with_value(np.nan), r"the cell with soma_joinid \d+ has the value nan; an embedding has finite"),
    "too large for float32": (with_value(1e300), r"the cell with soma_joinid \d+ has the value 1e\+300"),
    "twice": (lambda p: (p[0], np.r_[p[1][1], p[1][1:]]), r"joinids.npy has soma_joinid \d+ more than once"),
    "out of range": (
        lambda p: (p[0], p[1] + 10_000),
        r"1,500 of 1,500 cells of .* are not among the 1,500 cells of .*valid in one release",
    ),
    "negative": (lambda p: (p[0], p[1] - 1), r"1 of 1,500 cells .* the first has soma_joinid -1"),
    "one dimension": (lambda p: (p[0][:, :1], p[1]), "has 1 dimension; an embedding has two or more"),
    "a vector": (lambda p: (p[0][:, 0], p[1]), r"has shape \(1500,\) and dtype float32; expected floats of shape"),
    "whole numbers": (lambda p: (p[0].astype(int), p[1]), "and dtype int64; expected floats"),
    "joinids of floats": (lambda p: (p[0], p[1].astype(float)), "and dtype float64; expected one whole number"),
    "other lengths": (lambda p: (p[0], p[1][1:]), r"has 1,500 cells, and .* has 1,499 soma_joinids"),
    "text": (lambda p: (p[0].astype(str), p[1]), "expected floats"),
    "objects": (lambda p: (p[0].astype(object), p[1]), "is not a .npy file of numbers, or is damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(
    case: str, given: Callable[..., Run], pca: Vectors, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[case]
    run = given(*change(pca))
    capsys.readouterr()
    assert run("import-embedding") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, line), line
    assert not run.path("latent.npy").exists()


def test_files_that_cannot_be_read(given: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = given()
    vectors = run.directory.parent / "vectors.npy"
    whole = vectors.read_bytes()
    for content in (whole[:200], whole[:-10], b"", b"no numpy file"):
        vectors.write_bytes(content)
        assert run("import-embedding") == 2
        assert "vectors.npy is not a .npy file of numbers, or is damaged" in capsys.readouterr().err
    for name in ("joinids", "vectors"):
        assert run("import-embedding", f"import_embedding.{name}=null") == 2
        assert f"import_embedding.{name} is not set" in capsys.readouterr().err
    vectors.unlink()
    assert run("import-embedding") == 2
    assert "vectors.npy does not exist" in capsys.readouterr().err
    vectors.write_bytes(whole)
    assert run("import-embedding") == 0


def test_some_cells_may_have_no_vector(
    given: Callable[..., Run], pca: Vectors, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given(pca[0][:900], pca[1][:900])
    assert run("import-embedding") == 0
    assert "600 of 1,500 cells have no vector" in capsys.readouterr().err
    assert run("import-embedding") == 0
    assert "is done for these settings" in capsys.readouterr().err
    np.save(run.directory.parent / "vectors.npy", pca[0][:900] + 1)
    assert run("import-embedding") == 2
    assert "the input import_embedding.vectors has changed" in capsys.readouterr().err
    assert run("import-embedding", "--dry-run") == 0
    assert "with   900 cells" in capsys.readouterr().out


def test_a_soma_array_and_its_release(
    given: Callable[..., Run], pca: Vectors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As CELLxGENE publishes embeddings."""
    uri = str(tmp_path / "array")
    vectors, joinids = pca
    with tiledbsoma.SparseNDArray.create(uri, type=pa.float32(), shape=(2_000, 10)) as array:
        rows, columns = np.repeat(joinids, 10), np.tile(np.arange(10), len(joinids))
        array.write(pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": vectors.ravel()}))
    run = given(import_embedding={"vectors": uri, "method": "theirs"})
    assert run("import-embedding", "--dry-run") == 0
    assert run("import-embedding") == 0
    assert np.array_equal(np.load(run.path("latent.npy")), vectors[np.argsort(joinids)])
    for info, said in (
        ({"census_version": "2023-12-15"}, "of the Census 2023-12-15, and this is homo_sapiens"),
        ({"experiment_name": "mus_musculus"}, "is an embedding of mus_musculus"),
    ):
        with tiledbsoma.SparseNDArray.open(uri, "w") as array:
            array.metadata["CxG_embedding_info"] = json.dumps(info)
        capsys.readouterr()
        assert run("import-embedding", "--force") == 2
        assert said in capsys.readouterr().err
    assert run("import-embedding", f"import_embedding.vectors={tmp_path / 'nothing'}", "--force") == 2
    assert "is not a SOMA array of an embedding" in capsys.readouterr().err


def test_a_killed_import_resumes(given: Callable[..., Run], pca: Vectors) -> None:
    run = given()
    kill = KILL.format(module="census_scvi.stages.import_embedding", name="count_hashes", nth=1, signal="SIGKILL")
    assert run.subprocess("import-embedding", before=kill).returncode == -signal.SIGKILL
    assert not run.path("latent.npy").exists()
    assert run("import-embedding") == 0
    assert run.record("create-latent-update")["resumed"]
    assert np.array_equal(np.load(run.path("latent.npy")), pca[0][np.argsort(pca[1])])
    assert len(np.load(run.path("latent-hash.npy"))) == len(pca[1])
