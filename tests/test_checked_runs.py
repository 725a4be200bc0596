"""Who reads a run directory without changing it reads what was written, or says what is damaged."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import cellxgene_census
import pandas as pd
import pytest
from pipeline import Run

from census_scvi import Atlas, load_model
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.workspace import identity
from census_scvi.workspace.identity import damage, file_identity

LATENT = ("latent.npy", "latent-idx.npy")
MODEL = ("scvi.model/weights.safetensors", "scvi.model/model.json")


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Path:
    """A copy of a run directory, to be damaged."""
    return Path(shutil.copytree(finished_run.directory, tmp_path / "run"))


@pytest.fixture(scope="module")
def query(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("query") / "cells.h5ad"
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "homo_sapiens", obs_value_filter="soma_joinid < 40")
    cells.obs = pd.DataFrame(index=[str(number) for number in range(40)])
    cells.var = pd.DataFrame(index=cells.var["feature_id"].astype(str).to_numpy())
    cells.write_h5ad(path)
    return path


def flip(path: Path, where: float) -> None:
    """Another value of one bit."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("name", [*LATENT, *MODEL])
def test_the_atlas_refuses_a_damaged_run(name: str, where: float, copied: Path, demo_census: str) -> None:
    flip(copied / name, where)
    places = [copied, copied / "scvi.model"] if name in MODEL else [copied]
    for place in places:
        with pytest.raises(UserError, match=f"{name} has changed since it was written by scvi-"):
            with Atlas.open(place, census=demo_census) as atlas:
                atlas.predict(None)
        if name in MODEL:
            with pytest.raises(UserError, match=f"{name} has changed since it was written by scvi-train.py"):
                load_model(str(place))


@pytest.mark.parametrize("name", [*LATENT, *MODEL])
def test_map_query_refuses_a_damaged_run(
    name: str, copied: Path, finished_run: Run, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copied / name, 0.7)
    settings = (f"output.directory={copied}", f"query.file={query}")
    assert main("map-query", ["--config", str(finished_run.config), *settings]) == 2
    assert f"{name} has changed since it was written" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in query.parent.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize("name", [*LATENT, "hv_genes.pkl"])
def test_evaluate_refuses_a_damaged_run(
    name: str, copied: Path, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copied / name, 0.7)
    settings = (f"output.directory={copied}", "evaluate.max_cells=100")
    assert main("evaluate", ["--config", str(finished_run.config), *settings]) == 2
    assert f"{name} has changed since it was written" in capsys.readouterr().err.splitlines()[-1]
    assert not (copied / "evaluation" / "report.html").exists()


@pytest.mark.parametrize("stage", ["train", "create-latent-update"])
def test_the_earlier_result_of_a_stage_that_runs_again_is_said_to_be(
    stage: str, copied: Path, finished_run: Run, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    settings = ["--config", str(finished_run.config), f"output.directory={copied}"]
    mapping = [*settings, f"query.file={query}", f"query.output={tmp_path}/out.h5ad", "query.umap_cells=0", "--force"]
    # Labels need the embedding of the Census' cells.
    quick = ["query.labels=[]"] if stage == "train" else ["query.baseline_cells=0", "query.reference_cells=300"]
    commands = {"map-query": [*mapping, *quick]}
    if stage == "create-latent-update":  # evaluate reads no model
        commands["evaluate"] = [*settings, "evaluate.max_cells=300", "evaluate.baseline=false", "--force"]
    for command, arguments in commands.items():
        for redoing in ({}, {stage: "0" * 64}):
            (copied / "manifest.json").write_text(json.dumps(manifest | {"redoing": redoing}))
            assert main(command, arguments) == 0
            warning = f"run: scvi-{stage}.py --force has not finished; using its earlier result"
            assert (warning in capsys.readouterr().err) == bool(redoing), command


@pytest.mark.parametrize("name", [*LATENT, *MODEL])
def test_a_file_that_is_gone_or_cut(name: str, copied: Path, demo_census: str) -> None:
    with (copied / name).open("r+b") as file:
        file.truncate(50)
    with (
        pytest.raises(UserError, match=f"{name} has 50 bytes, expected"),
        Atlas.open(copied, census=demo_census) as atlas,
    ):
        atlas.embeddings()
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"), Atlas.open(copied, census=demo_census) as atlas:
        atlas.embeddings()


def test_a_run_that_cannot_be_written_to_is_read(
    copied: Path, demo_census: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And notes are nothing to fail for: here the cache is a file."""
    (copied.parent / "cache").write_text("")
    monkeypatch.setenv("CENSUS_SCVI_CACHE", str(copied.parent / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED_BYTES", 0)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    for path in [*copied.rglob("*"), copied]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with Atlas.open(copied, census=demo_census) as atlas:
        assert atlas.embeddings().n_obs > 1000
    for path in [copied, *(path for path in copied.rglob("*") if path.is_dir())]:
        path.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENSUS_SCVI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED_BYTES", 1000)
    hashed = []
    monkeypatch.setattr(identity, "file_identity", lambda path: hashed.append(path.name) or file_identity(path))
    large, small = tmp_path / "large", tmp_path / "small"
    for path, size in ((large, 1000), (small, 999)):
        path.write_bytes(bytes(size))
        os.utime(path, (time.time() - 60,) * 2)
    expected = {path: file_identity(path) for path in (large, small)}

    def look(path: Path, remember: bool = True) -> str | None:
        return damage(path, expected[path], remember=remember)

    for _ in range(3):
        assert look(large) is look(small) is None
    assert hashed == ["large", "small", "small", "small"]
    assert look(large, remember=False) is None  # the stages themselves look at the contents
    assert hashed.pop(-1) == "large"
    times = large.stat().st_atime_ns, large.stat().st_mtime_ns
    flip(large, 0.5)
    os.utime(large, ns=times)  # its time of writing is put back, but not the kernel's own
    assert look(large) == "has changed since it was written"
    flip(large, 0.5)
    assert look(large) is look(large) is None  # just written: not trusted to stay so
    assert hashed[4:] == ["large"] * 3
    expected[large] = expected[small]  # another manifest
    assert "bytes, expected" in str(look(large))
    for damaged in ("{", "[]", json.dumps({str(large): 3})):
        (tmp_path / "cache" / "checked-files.json").write_text(damaged)
        assert look(small) is None
