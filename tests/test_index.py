"""The index for nearest cells: what it finds is what exact search finds, also for the Census API, and after a kill."""

from __future__ import annotations

import http.server
import json
import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import cellxgene_census
import fsspec
import numpy as np
import pytest
import tiledbsoma
from cellxgene_census.experimental import find_nearest_obs, predict_obs_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run, forked, run_code
from test_faults import KILL
from test_publish import ORGANISM, census_of, copy_of, experiment_of

from census_scvi.atlas import Atlas
from census_scvi.census.embedding import open_experiment, published_uri
from census_scvi.errors import UserError
from census_scvi.files.tiledb_py import tiledb_py
from census_scvi.neighbors import ivf_flat
from census_scvi.neighbors.cell_index import CellIndex, nearest_matching, recall_at_ten
from census_scvi.neighbors.ivf_flat import IvfFlatBuilder
from census_scvi.neighbors.scaled import scaled
from census_scvi.query.nearest import index_of_array, index_of_run, index_place

if find_spec("tiledb") is None or find_spec("tiledb.vector_search") is None:
    pytest.skip("tiledb-vector-search is not installed", allow_module_level=True)
tiledb_py()  # before anything else imports it


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Messages of the project, also when a command that ran before directs them to stderr only."""
    project = logging.getLogger("census_scvi")
    level = project.level
    project.setLevel(logging.INFO)
    project.addHandler(caplog.handler)
    yield caplog
    project.removeHandler(caplog.handler)
    project.setLevel(level)


def cells_of(n_cells: int, n_dimensions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    joinids = np.sort(numbers.choice(5 * n_cells, n_cells, replace=False))
    return numbers.normal(size=(n_cells, n_dimensions)).astype(np.float32), joinids


def built(folder: Path, vectors: np.ndarray, joinids: np.ndarray, metric: str = "euclidean", n: int = 5) -> CellIndex:
    n = min(n, len(vectors))
    assert sum(IvfFlatBuilder(vectors, joinids, folder, metric, n, 0).build()) == 2 * len(vectors)
    return CellIndex(str(folder), metric, *vectors.shape, n, n)


def exact(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """Distances from each query to each vector, float64."""
    queries, vectors = scaled(queries, metric).astype(float), scaled(vectors, metric).astype(float)
    if metric == "cosine":
        return 1 - queries @ vectors.T
    return np.linalg.norm(queries[:, None] - vectors, axis=2)


@settings(deadline=None, max_examples=25)
@given(
    n_cells=st.integers(1, 300),
    n_dimensions=st.integers(1, 12),
    n_partitions=st.integers(1, 20),
    k=st.integers(1, 20),
    metric=st.sampled_from(["euclidean", "cosine"]),
)
def test_with_all_partitions_the_search_is_exact(
    n_cells: int, n_dimensions: int, n_partitions: int, k: int, metric: str
) -> None:
    vectors, joinids = cells_of(n_cells, n_dimensions)
    queries = cells_of(7, n_dimensions, seed=1)[0]
    with TemporaryDirectory() as folder:
        index = built(Path(folder) / "index", vectors, joinids, metric, n_partitions)
        distances, found = index.query(queries, k)
        assert [path.name for path in Path(folder).iterdir()] == ["index"]
    of_all = exact(queries, vectors, metric)
    assert distances.shape == found.shape == (7, min(k, n_cells))
    np.testing.assert_allclose(distances, np.sort(of_all, axis=1)[:, :k], atol=2e-3)
    there = np.take_along_axis(of_all, np.searchsorted(joinids, found), axis=1)
    np.testing.assert_allclose(distances, there, atol=2e-3)
    assert all(len(set(row)) == len(row) for row in found.tolist())


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("after", range(1, 9))
def test_a_killed_build_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is one step of either pass; the next build does not do the finished ones again."""
    monkeypatch.setattr(ivf_flat, "_BLOCK_CELLS", 100)
    monkeypatch.setattr(ivf_flat, "_TILE_BYTES", 4 * 8 * 50)
    vectors, joinids = cells_of(400, 8)
    undisturbed = built(tmp_path / "undisturbed", vectors, joinids, n=20)
    builder = IvfFlatBuilder(vectors, joinids, tmp_path / "index", "euclidean", 20, 0)
    steps = builder.build()
    done = [next(steps) for _ in range(after)]
    steps.close()
    again = list(IvfFlatBuilder(vectors, joinids, tmp_path / "index", "euclidean", 20, 0).build())
    assert sum(again) == 800
    # The last step before the kill may be done again.
    assert len(again) <= 8 - len(done) + (2 if after > 4 else 1) + 1
    index = CellIndex(str(tmp_path / "index"), "euclidean", 400, 8, 20, 3)
    for one, other in zip(index.query(vectors, 5), undisturbed.query(vectors, 5, 3), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
def test_a_filter_is_honoured(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("census_scvi.neighbors.cell_index._MOST_FOUND", 1_000)  # of some points at a time
    vectors, joinids = cells_of(2_000, 6)
    index = built(tmp_path / "index", vectors, joinids, n=30)
    index.nprobe = 10
    matching = joinids[np.random.default_rng(2).random(len(joinids)) < share]
    found = nearest_matching(index, vectors[:50], 5, matching)
    assert found is not None
    distances, neighbors = found
    assert np.isin(neighbors, matching).all()
    of_matching = np.sort(exact(vectors[:50], vectors[np.isin(joinids, matching)], "euclidean"), axis=1)[:, :5]
    assert (np.abs(distances - of_matching) < 2e-3).mean() > 0.95


def test_too_few_matching_cells_are_not_searched_with_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("census_scvi.neighbors.cell_index._MOST_NEIGHBORS", 100)
    vectors, joinids = cells_of(2_000, 6)
    assert nearest_matching(built(tmp_path / "index", vectors, joinids), vectors[:9], 5, joinids[:10]) is None


def test_the_recall_is_that_of_the_neighbors(tmp_path: Path) -> None:
    vectors, joinids = cells_of(1_000, 10)
    vectors[500:] = vectors[:500]  # copies are at distance 0
    index = built(tmp_path / "index", vectors, joinids, n=40)
    recall = recall_at_ten(index, vectors, joinids, 200, [1, 5, 40], 0)
    assert recall[1] < recall[5] < recall[40] == 1.0
    rows = np.searchsorted(joinids, index.query(vectors, 11, 5)[1])
    of_all = exact(vectors, vectors, "euclidean")
    tenth = np.sort(of_all, axis=1)[:, 10:11] + 1e-3
    near = (np.take_along_axis(of_all, rows, 1) <= tenth) & (rows != np.arange(1_000)[:, None])
    assert recall[5] == pytest.approx(np.minimum(near.sum(axis=1), 10).mean() / 10, abs=0.05)


def test_bad_vectors_are_refused(tmp_path: Path) -> None:
    vectors, joinids = cells_of(100, 4)
    index = built(tmp_path / "index", vectors, joinids)
    with pytest.raises(UserError, match=r"the cells have 5 dimensions, the index .* has 4: it is the index of another"):
        index.query(np.zeros((3, 5), np.float32), 2)
    for bad in (np.nan, np.inf):
        vectors[50, 2] = bad
        with pytest.raises(UserError, match="NaN or infinite values"):
            list(IvfFlatBuilder(vectors, joinids, tmp_path / "other", "euclidean", 5, 0).build())
    shutil.rmtree(tmp_path / "index" / "shuffled_vectors")
    with pytest.raises(UserError, match=r"the index .* cannot be read .*; build it again with scvi-index.py --force"):
        CellIndex(str(tmp_path / "index"), "euclidean", 100, 4, 5, 5).query(np.zeros((1, 4), np.float32), 2)


def test_errors_of_tiledb_stay_what_tiledbsoma_expects(tmp_path: Path) -> None:
    """In a process that has imported TileDB-Py for an index."""
    assert issubclass(tiledb_py().TileDBError, RuntimeError)
    (tmp_path / "empty").mkdir()
    with pytest.raises(tiledbsoma.SOMAError):
        tiledbsoma.open(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is not a SOMA Experiment"), open_experiment(str(tmp_path / "empty")):
        pass


# --- the command


@pytest.fixture(scope="module")
def published(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A published run with an index of both metrics; tests only read it."""
    folder = tmp_path_factory.mktemp("indexed")
    shutil.copytree(demo_census, folder / "census")
    run = copy_of(finished_run, folder)
    assert run("publish") == 0
    assert run("index", "index.metrics=[euclidean, cosine]") == 0
    return run


def array_of(run: Run) -> str:
    uri = published_uri(experiment_of(run), "scvi")
    assert uri is not None
    return uri


def test_what_is_published(published: Run) -> None:
    run, place = published, Path(index_place(array_of(published)).removeprefix("file://"))
    record = json.loads((place / "index.json").read_text())
    assert record["publication"] == run.record("publish")["publication"]
    assert record["embedding"] == run.record("create-latent-update")["outputs"]["latent.npy"]
    assert (record["n_cells"], record["n_dimensions"]) == np.load(run.path("latent.npy")).shape
    for found in record["indexes"].values():
        assert found["recall"][str(found["partitions"])] == 1.0
        assert found["recall"][str(found["nprobe"])] >= 0.99
    assert run.record("index")["indexes"] == record["indexes"]
    with tiledbsoma.open(array_of(run)) as array:
        info = json.loads(array.metadata["CxG_embedding_info"])
    assert [entry["type"] for entry in info["indexes"]] == ["IVFFlat", "IVFFlat"]
    assert (place.parent / info["indexes"][0]["relative_uri"]).is_dir()


@contextmanager
def mirror(base: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of the list of mirrors, which the Census API asks where embeddings are."""
    mirrors = {"default": "here", "here": {"provider": "disk", "embeddings_base_uri": base, "region": "nowhere"}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(mirrors).encode())

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/mirrors.json"
        monkeypatch.setattr("cellxgene_census._release_directory.CELL_CENSUS_MIRRORS_DIRECTORY_URL", address)
        yield
        server.shutdown()


@pytest.mark.parametrize("which", [0, 1])
def test_the_census_api_answers_from_the_index(which: int, published: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, joinids = np.load(published.path("latent.npy")), np.load(published.path("latent-idx.npy"))
    with tiledbsoma.open(array_of(published)) as array:
        info = json.loads(array.metadata["CxG_embedding_info"])
    info["indexes"] = [info["indexes"][which]]
    query = ad.AnnData(obsm={"scvi": latent[100:140]})
    with mirror(array_of(published).removeprefix("file://").rpartition("/")[0] + "/", monkeypatch):
        near = find_nearest_obs("scvi", ORGANISM, "none", query, k=5, embedding_metadata=info)
    metric = ("euclidean", "cosine")[which]
    power = 2 if metric == "euclidean" else 1  # the API returns squared distances
    wanted = np.sort(exact(latent[100:140], latent, metric), axis=1)[:, :5] ** power
    np.testing.assert_allclose(near.distances, wanted, atol=1e-3)
    with cellxgene_census.open_soma(uri=census_of(published)) as census:
        labels = predict_obs_metadata(ORGANISM, "none", near, ["cell_type"], experiment=census["census_data"][ORGANISM])
        obs = census["census_data"][ORGANISM].obs.read(column_names=["soma_joinid", "cell_type"]).concat().to_pandas()
    own = obs.set_index("soma_joinid")["cell_type"].astype(str).loc[joinids[100:140]].to_numpy()
    assert (labels["cell_type"].to_numpy() == own).mean() > 0.6  # of eight types


@pytest.mark.parametrize("opened", ["published", "run"])
def test_the_atlas_searches_all_cells(opened: str, published: Run, messages: pytest.LogCaptureFixture) -> None:
    place = published.path("published") if opened == "published" else published.directory
    with (
        Atlas.open(place, census=census_of(published)) as atlas,
        Atlas.open(place, census=census_of(published)) as all_,
    ):
        mine = atlas.embed(own_cells(published))
        for chosen in (None, "tissue_general == 'blood'", "is_primary_data == True"):
            found = atlas.neighbors(mine, obs_filter=chosen, obs_columns=["cell_type"], n_neighbors=7, max_cells=200)
            wanted = all_.neighbors(mine, obs_filter=chosen, obs_columns=["cell_type"], n_neighbors=7)
            np.testing.assert_allclose(found.distances, wanted.distances, atol=1e-3)
            assert list(found.obs.columns) == list(wanted.obs.columns)
            assert set(found.obs.index) == set(found.joinids.ravel().tolist())
            if chosen:
                obs = all_.embeddings(chosen).obs["soma_joinid"]
                assert np.isin(found.joinids, obs.to_numpy()).all()
        labelled = atlas.predict(mine, method="neighbors", max_cells=300, baseline_cells=0)
        by_all = all_.predict(mine, method="neighbors", baseline_cells=0)
        assert (labelled.obs["cell_type_best"] == by_all.obs["cell_type_best"]).mean() > 0.9
    assert "the nearest of all 1,500 cells are searched with the index" in messages.text


def own_cells(run: Run) -> ad.AnnData:
    with cellxgene_census.open_soma(uri=census_of(run)) as census:
        return cellxgene_census.get_anndata(census, ORGANISM, obs_coords=list(range(40, 60)))


def test_an_index_of_an_earlier_embedding_is_refused(
    published: Run,
    demo_census: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    run = copy_of(published, tmp_path)
    assert index_of_run(run.directory) is not None
    assert run("train", "train.max_epochs=1", "--force") == 0
    assert run("create-latent-update", "--force") == 0
    assert index_of_run(run.directory) is None
    assert "is of an earlier embedding; scvi-index.py --force builds it again" in capsys.readouterr().err
    assert run("index", "index.metrics=[euclidean, cosine]") == 2
    assert "the input latent.npy has changed" in capsys.readouterr().err
    assert run("index", "--force") == 0
    index = index_of_run(run.directory)
    assert index is not None
    latent, joinids = np.load(run.path("latent.npy")), np.load(run.path("latent-idx.npy"))
    assert np.isin(joinids[:50], index.query(latent[:50], 3)[1]).all()


def test_an_index_of_another_publication_is_not_used(published: Run, messages: pytest.LogCaptureFixture) -> None:
    own, place = published.path("index/index.json"), Path(index_place(array_of(published)).removeprefix("file://"))
    try:
        shutil.copy(own, place / "index.json")  # without the publication
        assert index_of_array(array_of(published)) is None
        assert "is of another publication, and is not used" in messages.text
    finally:
        record = json.loads(own.read_text()) | {"publication": published.record("publish")["publication"]}
        (place / "index.json").write_text(json.dumps(record))
    assert index_of_array(array_of(published)) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"indexes": {"euclidean": {}}}', b'{"indexes": 3}'])
def test_a_damaged_record_of_an_index_is_noticed(
    content: bytes, published: Run, messages: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = copy_of(published, tmp_path)
    run.path("index/index.json").write_bytes(content)
    assert index_of_run(run.directory) is None
    assert "index/index.json is damaged (" in messages.text and "build it again" in messages.text


@pytest.mark.parametrize("name", ["_copy", "_name_in_info"])
def test_a_kill_while_the_index_is_published(
    name: str, finished_run: Run, demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    run = copy_of(finished_run, tmp_path)
    assert run("publish") == 0
    kill = KILL.format(module="census_scvi.publication.index_copy", name=name, nth=1, signal="SIGKILL")
    assert run.subprocess("index", before=kill).returncode == -signal.SIGKILL
    assert run("index") == 0
    assert index_of_array(array_of(run)) is not None
    with tiledbsoma.open(array_of(run)) as array:
        assert "indexes" in json.loads(array.metadata["CxG_embedding_info"])


def test_the_index_is_published_in_either_order(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    run = copy_of(finished_run, tmp_path)
    assert run("index") == 0
    assert run("publish") == 0
    first = array_of(run)
    assert index_of_array(first) is not None
    shutil.rmtree(index_place(first).removeprefix("file://"))
    assert index_of_array(first) is None
    assert run("index") == 0  # it is done, and published again
    assert index_of_array(first) is not None
    assert run("publish", "publish.replace=true", "--force") == 0
    assert array_of(run) != first
    assert index_of_array(array_of(run)) is not None


def test_a_low_recall_is_refused(
    finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.given(tmp_path, {}, finished_run.directory)
    run.config.write_text(finished_run.config.read_text().replace(str(finished_run.directory), str(run.directory)))
    assert run("index", "index.nprobe=1", "index.min_recall=1.0") == 2
    said = capsys.readouterr().err
    assert (
        "with index.nprobe 1, and index.min_recall is 1; increase index.nprobe, or set fewer index.partitions" in said
    )
    assert not run.path("index").exists()
    assert run("index", "index.nprobe=30") == 0  # as the error says
    assert run("index", "index.metrics=[euclidean, euclidean]") == 2
    assert "index.metrics is ['euclidean', 'euclidean']: expected euclidean, cosine or both" in capsys.readouterr().err
    assert run("index", "--dry-run") == 0
    assert "38 partitions" in capsys.readouterr().out


def test_a_killed_command_resumes(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    run = copy_of(finished_run, tmp_path)
    kill = KILL.format(module="census_scvi.stages.index", name="recall_at_ten", nth=1, signal="SIGKILL")
    assert run.subprocess("index", "index.metrics=[cosine]", before=kill).returncode == -signal.SIGKILL
    assert not run.path("index").exists()
    assert run("index", "index.metrics=[cosine]") == 0
    assert run.record("index")["resumed"]
    index = index_of_run(run.directory, "cosine")
    assert index is not None and index_of_run(run.directory) is None
    latent = np.load(run.path("latent.npy"))
    np.testing.assert_allclose(
        index.query(latent[:9], 5, 99)[0], np.sort(exact(latent[:9], latent, "cosine"), axis=1)[:, :5], atol=1e-3
    )


SEARCH = """
import sys
import anndata as ad
import numpy as np
from census_scvi import Atlas
census, embedding, latent, result = sys.argv[1:]
mine = ad.AnnData(obsm={"X_scvi": np.load(latent)[:20]})
with Atlas.open(census=census, embedding=embedding) as atlas:
    np.save(result, atlas.neighbors(mine, n_neighbors=5, max_cells=100).distances)
"""


@pytest.mark.slow
def test_an_index_in_a_bucket(finished_run: Run, demo_census: str, bucket: str, tmp_path: Path) -> None:
    """In processes of their own: TileDB looks for the server's address once, when it is first used."""
    shutil.copytree(demo_census, tmp_path / "census")
    run = copy_of(finished_run, tmp_path)
    experiment = f"{bucket}/experiment"
    fsspec.filesystem("s3").put(experiment_of(run), experiment, recursive=True)
    settings = [f"publish.experiment_uri={experiment}"]
    done = run.subprocess("publish", *settings)
    assert done.returncode == 0, done.stderr
    done = run.subprocess("index")
    assert f"published the index: {experiment}/ms/RNA/obsm/scvi-" in done.stderr
    places = (experiment, str(run.path("latent.npy")), str(tmp_path / "distances.npy"))
    found = forked(run_code, SEARCH, str(tmp_path / "census"), *places)
    assert found.returncode == 0, found.stderr
    latent = np.load(run.path("latent.npy"))
    nearest = np.sort(exact(latent[:20], latent, "euclidean"), axis=1)[:, :5]  # of all cells, not of a sample of 100
    assert np.isclose(np.load(tmp_path / "distances.npy"), nearest, atol=1e-3).mean() > 0.95
