"""What earlier versions wrote is still read: finished runs, runs that were killed, published folders.

`data/ab837ae/make.py` made them, and says what they are.
"""

import tarfile
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from pipeline import ROOT
from safetensors.numpy import load_file

from census_scvi import Atlas
from census_scvi.cli import main
from census_scvi.files.json_file import read_json

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="the Census is found at /proc/self/cwd")

STAGES = ("prepare", "train", "create-latent-update", "publish")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ab837ae")
    with tarfile.open(ROOT / "tests" / "data" / "ab837ae" / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def in_their_folder(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is that of the runs: the Census that they were made of is the one that lies there."""
    monkeypatch.chdir(unpacked)


def stage(name: str, run: str, *settings: str) -> int:
    """Run a stage with the config file of the earlier version."""
    return main(name, ["--config", "config.yaml", f"output.directory={run}", *settings])


def contents(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_stage_is_done(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents("finished")
    assert stage(name, "finished") == 0
    assert f"{name} is done for these settings in finished" in capsys.readouterr().err
    assert contents("finished") == before


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("prepare", "hvg.min_genes=31", "hvg.min_genes was 30 and is 31"),
        ("train", "train.max_epochs=21", "train.max_epochs was 20 and is 21"),
        ("create-latent-update", "latent.block_size=65", "latent.block_size was 64 and is 65"),
        ("publish", "gates.waived={}", 'gates.waived.active_units was "a small model" and is null'),
        ("prepare", "census.uri=census", "the input census is another one than before"),
    ],
)
def test_a_finished_stage_is_not_done_for_other_settings(
    name: str, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(name, "finished", setting) == 2
    assert message in capsys.readouterr().err


def test_a_training_that_was_killed_in_an_epoch_continues_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage("train", "training-killed") == 0
    assert "resuming from the last checkpoint" in capsys.readouterr().err
    record, undisturbed = (
        read_json(Path(run) / "manifest.json")["stages"]["train"] for run in ("training-killed", "finished")
    )
    assert record["resumed"] and not undisturbed["resumed"]
    assert record["counts"] == undisturbed["counts"]
    # The epoch in which it was killed has the loss that it would have had: its first steps were not taken twice.
    for name, curve in undisturbed["learning_curves"].items():
        assert record["learning_curves"][name] == pytest.approx(curve, rel=1e-4), name
    weights, expected = (
        load_file(Path(run) / "scvi.model" / "weights.safetensors") for run in ("training-killed", "finished")
    )
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_prepare_that_was_killed_between_parts_keeps_those_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage("prepare", "prepare-killed") == 0
    lines = capsys.readouterr().err
    assert "resuming with 100 genes" in lines and "96 of 276 cells were written before" in lines
    cells, undisturbed = (ad.read_h5ad(Path(run) / "anndata_model.h5ad") for run in ("prepare-killed", "finished"))
    assert (cells.X != undisturbed.X).nnz == 0
    assert cells.obs.equals(undisturbed.obs) and cells.var.equals(undisturbed.var)
    assert (Path("prepare-killed") / "hv_genes.pkl").read_bytes() == (Path("finished") / "hv_genes.pkl").read_bytes()


@pytest.mark.parametrize("census", [[], ["--census", "/proc/self/cwd/census", "--sample", "100", "--seed", "0"]])
def test_a_published_folder_verifies(census: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("verify", ["finished/published", *census]) == 0
    assert ("is valid" if census else "is consistent") in capsys.readouterr().out


@pytest.mark.parametrize("model", ["finished", "finished/published"])
def test_an_atlas_opens_a_run_and_a_published_folder(model: str) -> None:
    latent, joinids = (np.load(f"finished/{name}.npy") for name in ("latent", "latent-idx"))
    trained_on = ad.read_h5ad("finished/anndata_model.h5ad")
    with Atlas.open(model) as atlas:
        cells, embedded = atlas.embeddings(), atlas.embed(trained_on)
    assert np.array_equal(cells.obs["soma_joinid"], joinids)
    assert np.array_equal(cells.obsm["scvi"], latent)
    expected = latent[np.searchsorted(joinids, trained_on.obs["soma_joinid"])]
    np.testing.assert_allclose(embedded.obsm["X_scvi"], expected, atol=1e-5)
