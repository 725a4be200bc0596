"""An embedding as an array of its own: exact or rounded values, hidden until it is complete, verified and found."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
import torch
from cellxgene_census import _release_directory
from cellxgene_census.experimental import get_embedding, get_embedding_metadata
from hypothesis import given
from hypothesis import strategies as st
from pipeline import ROOT, Run, forked, run_script
from test_faults import KILL
from test_publish import ORGANISM, broken, census_of, copy_of, experiment_of

from census_scvi.atlas import Atlas
from census_scvi.census.embedding import published_uri, read_embedding
from census_scvi.census.precision import rounded
from census_scvi.errors import UserError
from census_scvi.publication.chain import verify
from census_scvi.publication.own_array import contribution_problems
from census_scvi.settings import load_config

CONTRIBUTED = [
    "publish.title=An embedding", "publish.description=Of cells.",
    "publish.contact={name: A, email: a@b.org, affiliation: C}",
]  # fmt: skip


@pytest.fixture
def run(finished_run: Run, demo_census: str, tmp_path: Path) -> Run:
    """A copy of a finished run on a copy of its Census, to publish into."""
    shutil.copytree(demo_census, tmp_path / "census")
    return copy_of(finished_run, tmp_path)


def values_in(uri: str) -> tuple[np.ndarray, np.ndarray]:
    joinids, values = zip(*read_embedding(uri), strict=True)
    return np.concatenate(joinids), np.concatenate(values)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_values_are_rounded_as_torch_rounds_them(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    wanted = torch.from_numpy(exact).to(torch.bfloat16).to(torch.float32).numpy()
    assert rounded(exact, "bfloat16").tobytes() == wanted.tobytes()
    assert rounded(exact, "float32").tobytes() == exact.tobytes()


@pytest.mark.parametrize(("form", "precision"), [("array", "float32"), ("array", "bfloat16"), ("both", "bfloat16")])
def test_an_array_of_its_own(
    form: str, precision: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "array")
    settings = [f"publish.form={form}", f"publish.array_uri={uri}", f"publish.precision={precision}", *CONTRIBUTED]
    assert run("publish", "--dry-run", *settings) == 0
    assert uri in capsys.readouterr().out
    assert run("publish", *settings) == 0
    assert "contribution tool" not in capsys.readouterr().err
    latent, joinids = np.load(run.path("latent.npy")), np.load(run.path("latent-idx.npy"))
    cells, values = values_in(uri)
    assert np.array_equal(cells, joinids)
    assert np.array_equal(values, rounded(latent, precision))
    info = get_embedding_metadata(uri)
    assert (info["n_embeddings"], info["n_features"], info["experiment_name"]) == (*latent.shape, ORGANISM)
    assert contribution_problems(info) == []
    with tiledbsoma.open(census_of(run)) as census, tiledbsoma.open(uri) as array:
        assert array.shape[0] == census["census_data"][ORGANISM].ms["RNA"].X["raw"].shape[0]
    obsm = published_uri(experiment_of(run), "scvi")
    assert (obsm is None) == (form == "array")
    links = verify(str(run.path("published")), census_of(run), n_cells=100, seed=0)
    assert broken(links) == set(), links
    named = {link.name for link in links}
    assert {"array", "publication", "fresh_sample"} <= named and ("embedding" in named) == (form == "both")
    with Atlas.open(run.path("published"), census=census_of(run)) as atlas:
        found = atlas.embeddings()
        wanted = latent if form == "both" else rounded(latent, precision)
        assert np.array_equal(found.obsm["scvi"], wanted)
    with Atlas.open(census=census_of(run), embedding=uri) as atlas:
        assert np.array_equal(atlas.embeddings().obsm["scvi"], rounded(latent, precision))
    assert run("publish", *settings) == 0
    assert "is done for these settings" in capsys.readouterr().err
    shutil.rmtree(uri)
    assert run("publish", *settings) == 2
    assert "which is no longer there; --force publishes it again" in capsys.readouterr().err


@contextmanager
def directory_of_releases(folder: Path, name: str, census: str) -> Iterator[None]:
    """A server of the directories from which the Census library learns where a release is."""
    folder.mkdir()
    mirror = {"provider": "unknown", "base_uri": "", "region": None}
    (folder / "MIRRORS").write_text(json.dumps({"default": "here", "here": mirror}))
    place = {"uri": census, "s3_region": None}
    release = {"release_date": None, "release_build": name, "soma": place, "h5ads": place}
    (folder / "RELEASE").write_text(json.dumps({name: release}))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for what in ("RELEASE", "MIRRORS"):
            url = f"http://127.0.0.1:{server.server_port}/{what}"
            patch.setattr(_release_directory, f"CELL_CENSUS_{what}_DIRECTORY_URL", url)
        yield
        server.shutdown()


def test_the_census_library_reads_the_array(run: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "array")
    assert run("publish", "publish.form=array", f"publish.array_uri={uri}", *CONTRIBUTED) == 0
    latent, joinids = np.load(run.path("latent.npy")), np.load(run.path("latent-idx.npy"))
    release = get_embedding_metadata(uri)["census_version"]
    with directory_of_releases(tmp_path / "directory", release, census_of(run)):
        found = get_embedding(release, uri, joinids[::-50].copy())  # it ignores strides
    assert np.array_equal(found, latent[::-50])


@pytest.mark.parametrize("nth", [1, 3])
def test_a_killed_publication_is_completed(nth: int, run: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "array")
    settings = ["publish.form=array", f"publish.array_uri={uri}"]
    small = "import census_scvi.stages.publish as stage; stage._BLOCK_CELLS = 300\n"
    kill = small + KILL.format(
        module="census_scvi.publication.own_array", name="write_cells", nth=nth, signal="SIGKILL"
    )
    assert run.subprocess("publish", *settings, before=kill).returncode == -signal.SIGKILL
    with tiledbsoma.open(uri) as array:
        assert "CxG_embedding_info" not in array.metadata
    with pytest.raises(UserError, match="has no CxG_embedding_info, and is not a complete embedding"):
        Atlas.open(census=census_of(run), embedding=uri)
    assert run("publish", *settings) == 0
    cells, values = values_in(uri)
    assert np.array_equal(cells, np.load(run.path("latent-idx.npy")))
    assert np.array_equal(values, np.load(run.path("latent.npy")))
    assert broken(verify(str(run.path("published")), census_of(run), n_cells=50)) == set()


def test_what_is_in_the_way(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = tmp_path / "array"
    settings = ["publish.form=array", f"publish.array_uri={uri}"]
    uri.mkdir()
    (uri / "notes.txt").write_text("mine")
    assert run("publish", *settings) == 2
    said = capsys.readouterr().err
    assert "has something else than an array of ours; give a new place" in said and "gates" not in said
    assert (uri / "notes.txt").read_text() == "mine"
    (uri / "notes.txt").unlink()
    assert run("publish", *settings) == 0  # an empty folder
    assert "contribution tool would refuse the array: publish.description has 0 characters" in capsys.readouterr().err
    assert run("publish", *settings, "--force") == 2
    assert "has another publication; set publish.replace to true" in capsys.readouterr().err
    first = json.loads(run.path("published/provenance.json").read_text())["publication"]
    assert run("publish", *settings, "publish.replace=true", "--force") == 0
    assert get_embedding_metadata(str(uri))["id"] != first


@pytest.mark.parametrize("left", ["folders", "array"])
def test_what_a_publisher_leaves_that_was_killed_at_once_is_replaced(left: str, run: Run, tmp_path: Path) -> None:
    uri = tmp_path / "array"
    if left == "folders":
        (uri / "__schema").mkdir(parents=True)
    else:
        tiledbsoma.SparseNDArray.create(str(uri), type=pa.float32(), shape=(3, 2)).close()
    assert run("publish", "publish.form=array", f"publish.array_uri={uri}") == 0
    assert np.array_equal(values_in(str(uri))[1], np.load(run.path("latent.npy")))


def test_a_forged_array_is_noticed(run: Run, tmp_path: Path) -> None:
    uri = str(tmp_path / "array")
    assert run("publish", "publish.form=array", f"publish.array_uri={uri}") == 0
    with tiledbsoma.SparseNDArray.open(uri, "w") as array:
        array.metadata["census_scvi_seal"] = "0" * 64
    assert broken(verify(str(run.path("published")), census_of(run), n_cells=20)) == {"publication"}
    with Atlas.open(census=census_of(run), embedding=uri) as atlas:
        assert atlas.embeddings().n_obs
    for damaged in ("{", "[1]", "3"):
        with tiledbsoma.SparseNDArray.open(uri) as array:
            info = array.metadata["CxG_embedding_info"]
        with tiledbsoma.SparseNDArray.open(uri, "w") as array:
            array.metadata["CxG_embedding_info"] = damaged
        with pytest.raises(UserError, match="its CxG_embedding_info is damaged"):
            Atlas.open(census=census_of(run), embedding=uri)
        with tiledbsoma.SparseNDArray.open(uri, "w") as array:
            array.metadata["CxG_embedding_info"] = info
    with tiledbsoma.SparseNDArray.open(uri, "w") as array:
        info = json.loads(array.metadata["CxG_embedding_info"]) | {"census_version": "2020-01-01"}
        array.metadata["CxG_embedding_info"] = json.dumps(info)
    with pytest.raises(UserError, match="soma_joinids are valid in one release"):
        Atlas.open(census=census_of(run), embedding=uri)


@pytest.mark.parametrize("settings", [["publish.form=array"], ["publish.array_uri=x"]])
def test_form_and_place_belong_together(settings: list[str]) -> None:
    with pytest.raises(UserError, match="an array of its own needs both form: array"):
        load_config(ROOT / "scvi-config.yaml", settings)


@pytest.mark.slow
def test_an_array_in_a_bucket_with_its_index(run: Run, bucket: str) -> None:
    """In processes of their own: TileDB looks for the server's address once, when it is first used."""
    settings = ["publish.form=array", f"publish.array_uri={bucket}/array", "publish.precision=bfloat16"]
    for stage, arguments in (("publish", settings), ("index", [])):
        done = run.subprocess(stage, *arguments)
        assert done.returncode == 0, done.stderr
    assert f"published the index: {bucket}/array-index" in done.stderr
    assert fsspec.filesystem("s3").exists(f"{bucket}/array-index/index.json")
    found = forked(run_script, str(ROOT / "scvi-verify.py"), str(run.path("published")), "--census", census_of(run))
    assert found.returncode == 0, found.stdout + found.stderr
