"""Publishing: the gates stop what is wrong and name it; what is published is read by the Census API and verified."""

import errno
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import fsspec
import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
import scvi
import tiledbsoma
import torch
import yaml
from cellxgene_census.experimental import get_embedding_metadata
from pipeline import ROOT, Run, forked, run_script
from safetensors.torch import load_file, save_file
from scvi.hub import HubModel
from test_faults import KILL

import census_scvi
from census_scvi.census.embedding import published_uri
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.files.lock import directory_lock
from census_scvi.model.encode import Encoder, batch_labels, reference_latent
from census_scvi.model.published import fetch
from census_scvi.model.safe import load_safe
from census_scvi.publication import folder as publication_folder
from census_scvi.publication.chain import Link, verify
from census_scvi.publication.folder import copy_to
from census_scvi.publication.summary import read_summary
from census_scvi.settings import load_config
from census_scvi.stages import publish
from census_scvi.workspace.identity import identities

ORGANISM = "homo_sapiens"
Latent = np.ndarray


@pytest.fixture
def run(finished_run: Run, demo_census: str, tmp_path: Path) -> Run:
    """A copy of a finished run on a copy of its Census, to publish into."""
    shutil.copytree(demo_census, tmp_path / "census")
    return copy_of(finished_run, tmp_path)


@pytest.fixture(scope="module")
def published(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Such a run that has published; tests only read it."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(demo_census, folder / "census")
    run = copy_of(finished_run, folder)
    assert run("publish") == 0
    return run


@pytest.fixture
def folder(published: Run, tmp_path: Path) -> Path:
    """A copy of the published folder, to damage."""
    return Path(shutil.copytree(published.path("published"), tmp_path / "published"))


def copy_of(finished: Run, folder: Path, **sections: dict[str, Any]) -> Run:
    """Another run directory with the same artifacts; records name the Census that they were made from."""
    run = Run(folder, str(folder / "census"), gates={"sample_size": 300}, **sections)
    shutil.copytree(finished.directory, run.directory)
    return run


def experiment_of(run: Run) -> str:
    census = load_config(run.config).census
    return f"{census.uri}/census_data/{census.organism}"


def census_of(run: Run) -> str:
    return str(load_config(run.config).census.uri)


def plant(run: Run, **arrays: np.ndarray) -> None:
    """Let the run have embedded other than it did: artifacts are replaced, and recorded as if written so."""
    manifest = run.manifest()
    for name, values in arrays.items():
        file = f"{name.replace('_', '-')}.npy"
        np.save(run.path(file), values)
        manifest["stages"]["create-latent-update"]["outputs"] |= identities(run.directory, [file])
    run.path("manifest.json").write_text(json.dumps(manifest))


def latent_of(run: Run) -> np.ndarray:
    return np.load(run.path("latent.npy"))


def embed(run: Run, change: Callable[[Any], Any]) -> np.ndarray:
    """The embedding of all cells by the run's model, of counts that were changed before."""
    model, description = load_safe(run.path("scvi.model"))
    with cellxgene_census.open_soma(uri=census_of(run)) as census:
        genes = f"feature_id in {description.genes}"
        cells = cellxgene_census.get_anndata(census, description.organism, var_value_filter=genes)
    cells.var_names = cells.var["feature_id"].astype(str)
    counts = change(cells[:, description.genes].X.tocsr().astype(np.float32))
    counts.sort_indices()
    return Encoder(model)(counts, np.zeros(counts.shape[0], int)).mean


def failed_gates(run: Run) -> set[str]:
    gates = json.loads(run.path("qa.json").read_text())["gates"]
    return {gate["name"] for gate in gates if not gate["passed"] and gate["stops"]}


def broken(links: list[Link]) -> set[str]:
    return {link.name for link in links if not link.valid}


# --- what is valid


def test_what_is_published_is_the_embedding_and_the_census_api_reads_it(published: Run) -> None:
    run = published
    assert not failed_gates(run)
    latent, joinids = latent_of(run), np.load(run.path("latent-idx.npy"))
    with cellxgene_census.open_soma(uri=census_of(run)) as census:
        cells = cellxgene_census.get_anndata(census, ORGANISM, var_coords=[0], obsm_layers=["scvi"])
    assert cells.obs["soma_joinid"].tolist() == joinids.tolist()
    assert np.array_equal(cells.obsm["scvi"], latent)
    summary = read_summary(experiment_of(run))
    assert len(summary) == 1
    row, record = summary.iloc[0], json.loads(summary["provenance"][0])
    assert (row["n_cells"], row["n_features"], row["embedding_name"]) == (*latent.shape, "scvi")
    assert row["census_cells"] == len(joinids)
    info = get_embedding_metadata(published_uri(experiment_of(run), "scvi"))
    assert info["id"] == row["publication"] == record["publication"]
    assert (info["n_embeddings"], info["n_features"], info["experiment_name"]) == (*latent.shape, ORGANISM)
    wanted = {
        "census", "cells_sha256", "genes_sha256", "model", "config", "stages", "gates", "code", "packages", "seed",
        "hardware", "published_by", "published_on",
    }  # fmt: skip
    assert wanted <= record.keys()
    assert record["stages"]["train"]["counts"]["epochs"] == 3
    assert record["model"]["genes"] == load_safe(run.path("scvi.model"))[1].genes


def test_all_links_are_sound(published: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = published
    folder = str(run.path("published"))
    assert broken(verify(folder)) == set()
    links = verify(folder, census_of(run), n_cells=200, seed=3)
    assert broken(links) == set()
    assert [link.name for link in links] == [
        "provenance", "files", "model", "sealed_counts", "sealed_embedding", "gates", "census", "publication",
        "embedding", "sealed_cells", "fresh_sample",
    ]  # fmt: skip
    assert main("verify", [folder, "--census", census_of(run), "--sample", "50"]) == 0
    out = capsys.readouterr().out
    assert f"{folder} is valid" in out
    assert "BROKEN" not in out
    assert run("verify", "--sample", "20") == 0, "the config says where the folder and the Census are"
    assert f"{folder} is valid" in capsys.readouterr().out
    assert run("verify", "--dry-run", "publish.model_uri=elsewhere") == 0
    assert "would check elsewhere and 500 cells of" in capsys.readouterr().out
    assert run("verify", folder) == 2
    assert f"expected the published folder {folder}, or a config that says where it is" in capsys.readouterr().err


def test_the_sealed_sample_is_random_cells_with_their_counts(published: Run) -> None:
    run = published
    sealed = ad.read_h5ad(run.path("published") / "sealed_sample.h5ad")
    joinids = sealed.obs["soma_joinid"].to_numpy()
    assert len(joinids) == 300
    assert np.array_equal(sealed.obsm["X_scvi"], latent_of(run)[joinids])
    assert np.array_equal(sealed.obs["count_hash"], np.load(run.path("latent-hash.npy"))[joinids])


def test_publishing_again_skips_and_another_model_needs_replace(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("publish") == 0
    first = run.record("publish")["publication"]
    assert run("publish") == 0
    assert "publish is done for these settings" in capsys.readouterr().err
    assert run("publish", "--force") == 2
    assert "has an obsm['scvi'] already; set publish.replace to true" in capsys.readouterr().err
    shutil.copytree(run.path("published"), tmp_path / "first")
    assert run("publish", "publish.replace=true", "--force") == 0
    assert len(read_summary(experiment_of(run))) == 2
    assert broken(verify(str(run.path("published")), census_of(run))) == set()
    links = {link.name: link for link in verify(str(tmp_path / "first"), census_of(run))}
    assert not links["publication"].valid
    assert f"this folder {first}" in links["publication"].finding


def test_a_publication_that_is_gone_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish") == 0
    with tiledbsoma.open(f"{experiment_of(run)}/ms/RNA/obsm", "d") as obsm:
        del obsm["scvi"]
    assert run("publish") == 2
    assert "has no embedding of that name now; --force publishes it again" in capsys.readouterr().err
    assert run("publish", "--force") == 0
    assert broken(verify(str(run.path("published")), census_of(run))) == set()


def test_another_name_lies_beside_the_first(run: Run) -> None:
    assert run("publish") == 0
    assert run("publish", "publish.name=scvi-2", "--force") == 0
    for name in ("scvi", "scvi-2"):
        assert published_uri(experiment_of(run), name)


def test_the_model_goes_where_the_config_says(run: Run, tmp_path: Path) -> None:
    assert run("publish", f"publish.model_uri={tmp_path}/models/v1") == 0
    assert broken(verify(f"{tmp_path}/models/v1", census_of(run))) == set()
    assert run("publish", "publish.model_uri=memory://models/v1", "publish.name=other", "--force") == 0
    assert broken(verify("memory://models/v1")) == set()
    with pytest.raises(UserError, match="is not a published folder"):
        verify("memory://models/none")


@pytest.mark.slow
def test_a_bucket_as_target(run: Run, bucket: str) -> None:
    """In processes of their own: TileDB looks for the server's address once, when it is first used."""
    experiment, model = f"{bucket}/experiment", f"{bucket}/model"
    fsspec.filesystem("s3").put(experiment_of(run), experiment, recursive=True)
    settings = [f"publish.experiment_uri={experiment}", f"publish.model_uri={model}"]

    def verified() -> str:
        done = forked(run_script, str(ROOT / "scvi-verify.py"), model, "--census", census_of(run))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run.subprocess("publish", *settings).returncode == 0
    first = verified()
    assert "is valid" in first
    assert "set publish.replace to true" in run.subprocess("publish", *settings, "--force").stderr
    done = run.subprocess("publish", *settings, "publish.replace=true", "--force")
    assert done.returncode == 0, done.stderr
    assert f"delete it when nobody reads it: {experiment}/ms/RNA/obsm/scvi-" in done.stderr
    assert verified().splitlines()[0] != first.splitlines()[0]  # another publication
    assert census_scvi.load_model(model, cache=run.directory / "cache").is_trained


def test_no_credentials_are_published(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(publish, "copy_to", lambda folder, uri, replace: written.append(uri))
    assert run("publish", "publish.model_uri=https://me:hunter2@host/model?signature=hunter2") == 0
    assert "hunter2" in written[0]  # it is used
    texts = [
        run.path("manifest.json"),
        *(path for path in run.path("published").iterdir() if path.suffix in (".json", ".md")),
    ]
    assert all("hunter2" not in path.read_text() for path in texts)
    assert "hunter2" not in read_summary(experiment_of(run)).to_json()
    assert run("publish", "publish.experiment_uri=https://me:hunter2@host/experiment", "--force") == 2
    captured = capsys.readouterr()
    assert "https://***@host/experiment is not a SOMA Experiment" in captured.err
    assert "hunter2" not in captured.err + captured.out


def test_storage_that_fails_half_way_leaves_what_was_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tiledbsoma.SparseNDArray.write

    def failing(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise tiledbsoma.SOMAError("IO Error: connection reset by peer\nat line 1")

    with monkeypatch.context() as planted:
        planted.setattr(tiledbsoma.SparseNDArray, "write", failing)
        assert run("publish") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written (IO Error: connection reset by peer); readers see the earlier state" in error
    assert published_uri(experiment_of(run), "scvi") is None
    assert run("publish") == 0
    assert broken(verify(str(run.path("published")), census_of(run))) == set()


def test_a_read_only_target_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = census_of(run)
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a folder read-only: run the test as root (CAP_SYS_ADMIN)")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        assert run("publish") == 2
    finally:
        subprocess.run(["umount", folder], check=True)
    assert "the file system is read-only" in capsys.readouterr().err.splitlines()[-1]
    assert run("publish") == 0


def test_two_publishers_at_once(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with directory_lock(Path(experiment_of(run)) / ".scvi-publish.lock", "scvi-publish.py"):
        assert run("publish") == 2
    assert f"{experiment_of(run)} is in use by scvi-publish.py (process {os.getpid()} on" in capsys.readouterr().err
    assert run("publish") == 0


def test_a_folder_that_is_not_empty_is_not_overwritten(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for replace in ("false", "true"):
        for place in ("mine", "mine/thesis.tex"):
            settings = (f"publish.model_uri={tmp_path}/{place}", f"publish.replace={replace}")
            assert run("publish", *settings, "--force") == 2
            assert "thesis.tex'; it was not changed: give an empty or a new folder" in capsys.readouterr().err
    for nowhere in ("/proc/model", "nosuchscheme://bucket/model"):
        assert run("publish", f"publish.model_uri={nowhere}", "--force") == 2
        assert f"publish.model_uri {nowhere} cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert published_uri(experiment_of(run), "scvi") is None
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_download_ends_where_more_comes_than_the_record_says(published: Run, tmp_path: Path) -> None:
    """From a server that does not say how long a file is."""
    files = {path.name: path.read_bytes() for path in published.path("published").iterdir()}
    endless = files["README.md"] + b"x" * 20_000_000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            self.send_response(200 if name in files else 404)
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(endless if name == "README.md" else files.get(name, b""))

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cache = tmp_path / "cache"
        with pytest.raises(UserError, match=r"README.md has more than the [\d,]+ bytes expected; it is not fetched"):
            fetch(f"http://127.0.0.1:{server.server_port}/published", cache)
        assert not list(cache.rglob("README.md*"))
        endless = files["README.md"]
        folder = fetch(f"http://127.0.0.1:{server.server_port}/published", cache)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        server.shutdown()


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize(("exchanged", "nth"), [(False, 1), (False, 2), (True, 1)])
def test_the_copy_elsewhere_is_the_old_or_the_new_after_a_kill_and_a_full_disk(
    exchanged: bool, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, target = tmp_path / "old", tmp_path / "new", tmp_path / "models" / "v1"
    for folder in (old, new):
        folder.mkdir()
        (folder / "provenance.json").write_text(folder.name)
    (tmp_path / "models" / "v1.old").mkdir(parents=True)  # somebody's own
    copy_to(old, str(target), replace=False)
    with suppress(UserError):
        copy_to(new, str(target), replace=False)
    assert (target / "provenance.json").read_text() == "old"
    if not exchanged:
        monkeypatch.setattr(publication_folder, "exchange", lambda *_: False)
    real, calls = publication_folder.exchange if exchanged else Path.rename, [0]

    def dying(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return real(*arguments)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as planted, suppress(Killed):
        planted.setattr(*((publication_folder, "exchange") if exchanged else (Path, "rename")), dying)
        copy_to(new, str(target), replace=True)
    with monkeypatch.context() as planted, pytest.raises(OSError, match="No space left"):
        planted.setattr(shutil, "copytree", full)
        copy_to(new, str(target), replace=True)
    assert (target / "provenance.json").read_text() == "old"
    copy_to(new, str(target), replace=True)
    assert (target / "provenance.json").read_text() == "new"
    assert sorted(path.name for path in target.parent.iterdir()) == ["v1", "v1.old"]


# --- what is not: caught by a gate


def swapped_copies(run: Run) -> np.ndarray:
    """The embedding with a cell that has a copy, and another one, in each other's place."""
    latent, hashes = latent_of(run), np.load(run.path("latent-hash.npy"))
    _, first, times = np.unique(hashes, return_index=True, return_counts=True)
    one = int(first[times > 1][0])
    other = int(np.abs(latent - latent[one]).sum(axis=1).argmax())
    latent[[one, other]] = latent[[other, one]]
    return latent


def other_model(run: Run) -> np.ndarray:
    model, _ = load_safe(run.path("scvi.model"))
    weight = model.module.z_encoder.mean_encoder.weight
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std())
    return latent_of(run) + 0.1 * weight.detach().numpy().sum(axis=1)


def without_genes(counts: Any) -> Any:
    counts = counts.tolil()
    counts[:, ::2] = 0
    return counts.tocsr()


def constant(run: Run) -> np.ndarray:
    latent = latent_of(run)
    latent[:, 2] = 0.25
    return latent


def repeated(run: Run) -> np.ndarray:
    latent = latent_of(run)
    latent[:, 3] = latent[:, 0]
    return latent


def not_a_number(run: Run) -> np.ndarray:
    latent = latent_of(run)
    latent[321, 1] = np.nan
    return latent


DEFECTS: dict[str, tuple[Callable[[Run], np.ndarray], str]] = {
    "shuffled genes": (lambda run: embed(run, lambda counts: counts[:, ::-1].tocsr()), "re_embedding"),
    "genes zero-padded": (lambda run: embed(run, without_genes), "re_embedding"),
    "collapsed dimension": (constant, "variance"),
    "repeated dimension": (repeated, "duplicate_dimensions"),
    "embedding of another model": (other_model, "re_embedding"),
    "not a number in one cell": (not_a_number, "finite"),
    "two cells swapped": (swapped_copies, "order"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught_and_named(defect: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    make, gate = DEFECTS[defect]
    plant(run, latent=make(run))
    assert run("publish") == 2
    assert gate in failed_gates(run)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "stop publishing" in error
    assert f"{gate}: " in error
    assert published_uri(experiment_of(run), "scvi") is None
    assert not len(read_summary(experiment_of(run)))


def test_a_dataset_that_is_not_embedded_is_caught(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with cellxgene_census.open_soma(uri=census_of(run)) as census:
        obs = cellxgene_census.get_obs(census, ORGANISM, column_names=["dataset_id"])
    kept = (obs["dataset_id"] != obs["dataset_id"].iloc[-1]).to_numpy()
    arrays = {
        name: np.load(run.path(f"{name.replace('_', '-')}.npy")) for name in ("latent", "latent_idx", "latent_hash")
    }
    plant(run, **{name: values[kept] for name, values in arrays.items()})
    assert run("publish") == 2
    assert f"cells: {(~kept).sum():,} missing" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_other_widths_is_caught(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", "model.n_hidden=32") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "architecture: n_hidden is [16], expected [32]; parameters is" in error


def test_a_gate_is_waived_with_a_reason_that_is_published(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the second dimension is the first one's twin, and nobody minds"
    plant(run, latent=repeated(run))
    waived = ["gates.waived.duplicate_dimensions=" + reason, "gates.waived.re_embedding=planted"]
    assert run("publish", *waived, "gates.waived.order=planted") == 0
    gates = {
        gate["name"]: gate for gate in json.loads(run.path("published/provenance.json").read_text())["gates"]["gates"]
    }
    assert gates["duplicate_dimensions"]["waived"] == reason
    links = {link.name: link for link in verify(str(run.path("published")))}
    assert reason in links["gates"].finding
    assert not links["sealed_embedding"].valid  # a waived gate publishes, and hides nothing


def test_an_unknown_gate_is_not_waived(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", "gates.waived.ordr=typo") == 2
    assert "ordr" in capsys.readouterr().err


# --- what is not: caught by verify


def flip_bit(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "links"),
    [
        ("weights.safetensors", {"files"}),
        ("sealed_sample.h5ad", {"files"}),
        ("provenance.json", {"provenance"}),
    ],
)
def test_one_bit_of_the_folder_is_caught(file: str, links: set[str], folder: Path) -> None:
    assert broken(verify(str(folder))) == set()
    flip_bit(folder / file, 0.7)
    assert links <= broken(verify(str(folder)))


def test_another_model_in_the_folder_is_caught(folder: Path) -> None:
    path = folder / "weights.safetensors"
    weights = load_file(path)
    weights["z_encoder.mean_encoder.bias"][1] += 0.01
    save_file(weights, path)
    assert broken(verify(str(folder))) == {"files", "sealed_embedding"}


def test_one_bit_of_the_embedding_is_caught(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish") == 0
    uri = Path(str(published_uri(experiment_of(run), "scvi")).removeprefix("file://"))
    (values,) = uri.glob("__fragments/*/a0.tdb")
    flip_bit(values)
    assert main("verify", [str(run.path("published")), "--census", census_of(run)]) == 2
    captured = capsys.readouterr()
    assert "embedding         BROKEN" in captured.out
    assert "is not valid: embedding" in captured.err


def test_two_rows_that_change_places_in_the_census_are_caught(run: Run) -> None:
    assert run("publish") == 0
    latent = latent_of(run)
    uri = str(published_uri(experiment_of(run), "scvi"))
    rows, columns = np.repeat([7, 900], latent.shape[1]), np.tile(np.arange(latent.shape[1]), 2)
    with tiledbsoma.open(uri, "w") as array:
        array.write(pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": latent[[900, 7]].ravel()}))
    links = {link.name: link for link in verify(str(run.path("published")), census_of(run), n_cells=2000)}
    assert not links["embedding"].valid
    assert "2 of 1,500 cells read again differ" in links["fresh_sample"].finding


def test_another_census_is_caught(published: Run, tmp_path: Path) -> None:
    from census_scvi.local_census.demo.cells import write_demo_census

    write_demo_census(str(tmp_path / "other"), seed=5, scale=0.1, n_genes=200)
    links = verify(str(published.path("published")), str(tmp_path / "other"))
    assert links[-1].name == "census"
    assert not links[-1].valid


def test_a_record_that_names_files_outside_its_folder_is_refused(folder: Path) -> None:
    path = folder / "provenance.json"
    record = json.loads(path.read_text())
    record["files"]["../../../etc/passwd"] = record["files"].pop("model.json")
    path.write_text(json.dumps(record))
    (link,) = verify(str(folder))
    assert "which is outside its folder" in link.finding


def test_a_folder_that_was_not_published_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("verify", [str(run.directory)]) == 2
    assert "has no provenance.json; give the folder `published`" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": 2, "seal": "", "files": {}}'])
def test_a_record_that_is_none_is_said(damage: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(damage)
    (link,) = verify(str(tmp_path))
    assert not link.valid


# --- targets


def another_build(demo_census: str, folder: Path) -> str:
    """An Experiment of the same cells, numbered the other way round."""
    shutil.copytree(demo_census, folder / "build")
    experiment = f"{folder}/build/census_data/{ORGANISM}"
    with tiledbsoma.open(f"{experiment}/obs") as obs:
        names = obs.schema.names
        cells = obs.read().concat().to_pandas()
    cells["soma_joinid"] = cells["soma_joinid"].to_numpy()[::-1]
    cells = cells.sort_values("soma_joinid")
    with tiledbsoma.open(f"{experiment}/obs", "w") as obs:
        obs.write(pa.Table.from_pandas(cells, preserve_index=False).select(names))
    return experiment


def test_an_experiment_of_another_census_is_refused(
    run: Run, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from census_scvi.local_census.demo.cells import write_demo_census

    write_demo_census(str(tmp_path / "other"), seed=5, scale=0.1, n_genes=200)
    target = f"publish.experiment_uri={tmp_path}/other/census_data/{ORGANISM}"
    assert run("publish", target) == 2
    assert "soma_joinids are valid within one Census only" in capsys.readouterr().err
    assert run("publish", "publish.experiment_uri=/nowhere") == 2
    assert run("publish", f"publish.experiment_uri={another_build(demo_census, tmp_path)}") == 2
    error = capsys.readouterr().err
    assert "belongs to another build of the Census: " in error
    assert "/nowhere is not a SOMA Experiment" in error


def test_a_label_that_is_no_column_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("publish", "gates.label=cell_tipe") == 2
    assert "gates.label contains 'cell_tipe', which is not an obs column of the Census; did you mean cell_type?" in (
        capsys.readouterr().err
    )


def test_one_dimension_and_an_encoder_that_sees_the_batch(demo_census: str, tmp_path: Path) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    model = {"encode_covariates": True, "n_latent": 1, "gene_likelihood": "zinb"}
    run = Run(tmp_path, str(tmp_path / "census"), model=model, latent={"minified": "none"}).all()
    assert run("publish") == 0
    assert broken(verify(str(run.path("published")), census_of(run))) == set()


def test_publish_before_the_embedding(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(tmp_path, demo_census)("publish") == 2
    assert "run scvi-prepare.py first" in capsys.readouterr().err


def test_dry_run_of_publish(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.directory.rglob("*"))
    assert run("publish", "--dry-run", "publish.model_uri=elsewhere") == 0
    said = capsys.readouterr().out
    assert f"obsm['scvi'] and scvi_summary in file://{experiment_of(run)}" in said
    assert "  write  elsewhere/" in said
    assert sorted(run.directory.rglob("*")) == before
    assert published_uri(experiment_of(run), "scvi") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [
        ("census_scvi.stages.publish", "write_published", 1),
        ("census_scvi.stages.publish", "append_summary", 1),
        ("census_scvi.stages.publish", "EmbeddingDraft.publish", 1),
        ("census_scvi.workspace.run", "Workspace.finish_commit", 1),
    ],
)
def test_kill_9_and_a_rerun_publish_once(module: str, name: str, nth: int, run: Run) -> None:
    killed = run.subprocess("publish", before=KILL.format(module=module, name=name, nth=nth, signal="SIGKILL"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run("publish") == 0
    assert len(read_summary(experiment_of(run))) == 1
    assert broken(verify(str(run.path("published")), census_of(run))) == set()


# --- the model


def test_the_hub_folder_loads_offline_with_trained_batches_only(published: Run) -> None:
    run, folder = published, str(published.path("published"))
    model, description = load_safe(run.path("scvi.model"))
    hub = HubModel(folder)
    loaded = hub.model
    sealed = ad.read_h5ad(run.path("published") / "sealed_sample.h5ad")
    trained = sealed.obs["batch"].isin(description.batches).to_numpy()
    assert 0 < trained.sum() < len(trained)
    assert batch_labels(loaded) == description.batches
    assert loaded.adata.obs_names.tolist() == sealed.obs_names[trained].tolist()
    np.testing.assert_allclose(loaded.get_latent_representation(), sealed.obsm["X_scvi"][trained], atol=1e-5)
    plain = scvi.model.SCVI.load(folder)
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in plain.module.state_dict().items())
    assert plain.get_normalized_expression(indices=[0], transform_batch=description.batches[0]).shape[0] == 1


def test_load_model_gives_the_published_latents(run: Run, tmp_path: Path) -> None:
    assert run("publish", "publish.model_uri=memory://hub/one") == 0
    sealed = ad.read_h5ad(run.path("published") / "sealed_sample.h5ad")
    for uri in (str(run.path("published")), "memory://hub/one", str(run.path("scvi.model"))):
        model = census_scvi.load_model(uri, cache=tmp_path / "cache")
        mean, _ = reference_latent(model, list(sealed.var_names), sealed.X, sealed.obs["batch"])
        np.testing.assert_allclose(mean, sealed.obsm["X_scvi"], atol=1e-5)


def test_a_fetched_model_is_kept_and_a_damaged_copy_fetched_again(run: Run, tmp_path: Path) -> None:
    assert run("publish", "publish.model_uri=memory://hub/two") == 0
    census_scvi.load_model("memory://hub/two", cache=tmp_path)
    (weights,) = tmp_path.glob("*/weights.safetensors")
    written = weights.stat().st_mtime_ns
    census_scvi.load_model("memory://hub/two", cache=tmp_path)
    assert weights.stat().st_mtime_ns == written
    flip_bit(weights)
    census_scvi.load_model("memory://hub/two", cache=tmp_path)
    assert weights.stat().st_mtime_ns != written
    system = fsspec.filesystem("memory")
    system.pipe_file("/hub/two/weights.safetensors", b"something else")
    weights.unlink()
    with pytest.raises(UserError, match=r"differs from what was published: weights\.safetensors has 14 bytes"):
        census_scvi.load_model("memory://hub/two", cache=tmp_path)


def test_a_pickle_is_loaded_only_where_it_is_trusted(finished_run: Run, tmp_path: Path) -> None:
    shutil.copy(finished_run.path("scvi.model") / "model.pt", tmp_path)
    with pytest.raises(UserError, match=r"executes any code that its author put into it; .* trust=True"):
        census_scvi.load_model(str(tmp_path))
    assert census_scvi.load_model(str(tmp_path), trust=True).module.n_latent == 4
    with pytest.raises(UserError, match=r"does not exist; give a run directory"):
        census_scvi.load_model(str(tmp_path / "nothing"))


def test_the_card_says_what_was_built_and_its_snippets_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("publish", "publish.license=CC-BY-4.0", "publish.contact.email=atlas@example.org") == 0
    card = (run.path("published") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["license"]) == ("scvi-tools", "cc-by-4.0")
    for words in (
        "17,386 parameters", "1 hidden layers of 16, 4 latent dimensions, dropout 0.1", "negative binomial",
        "| genes | 200, by Ensembl id |", "atlas@example.org", "| epochs | 3 of at most 3 |", "| re_embedding |",
        "within each combination of assay", "![Learning curve](training-curve.png)",
    ):  # fmt: skip
        assert words in card, words
    assert matplotlib.image.imread(run.path("published") / "training-curve.png").std() > 0.02
    monkeypatch.chdir(run.path("published"))
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(compile(snippet, "card", "exec"), {})
