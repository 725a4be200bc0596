"""What earlier versions wrote is still read: finished runs, runs that were killed, published folders.

`data/ab837ae/make.py` made them, and says what they are.
"""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from pipeline import ROOT
from safetensors.numpy import load_file

from census_scvi import Atlas
from census_scvi.cli import main
from census_scvi.config import renamed
from census_scvi.config.messages import setting_names
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.model.published import seal_of
from census_scvi.settings import Config, load_config
from census_scvi.workspace.record import changes, fingerprint_of

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
        ("prepare", "census.uri=census", "the input census has changed"),
    ],
)
def test_a_finished_stage_is_not_done_for_other_settings(
    name: str, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(name, "finished", setting) == 2
    assert message in capsys.readouterr().err


def test_a_training_that_was_killed_in_an_epoch_continues_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree("training-killed", tmp_path / "run")
    assert stage("train", str(run)) == 0
    assert "resuming from the last checkpoint" in capsys.readouterr().err
    record, undisturbed = (read_json(Path(folder) / "manifest.json")["stages"]["train"] for folder in (run, "finished"))
    assert record["resumed"] and not undisturbed["resumed"]
    assert record["counts"] == undisturbed["counts"]
    # The epoch in which it was killed has the loss that it would have had: its first steps were not taken twice.
    for name, curve in undisturbed["learning_curves"].items():
        assert record["learning_curves"][name] == pytest.approx(curve, rel=1e-4), name
    weights, expected = (load_file(Path(folder) / "scvi.model" / "weights.safetensors") for folder in (run, "finished"))
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_prepare_that_was_killed_between_parts_keeps_those_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree("prepare-killed", tmp_path / "run")
    assert stage("prepare", str(run)) == 0
    lines = capsys.readouterr().err
    assert "100 genes were selected before" in lines and "96 of 276 cells were written before" in lines
    cells, undisturbed = (ad.read_h5ad(Path(folder) / "anndata_model.h5ad") for folder in (run, "finished"))
    assert (cells.X != undisturbed.X).nnz == 0
    assert cells.obs.equals(undisturbed.obs) and cells.var.equals(undisturbed.var)
    assert (run / "hv_genes.pkl").read_bytes() == (Path("finished") / "hv_genes.pkl").read_bytes()


def test_an_embedding_that_was_killed_between_blocks_keeps_those_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree("embedding-killed", tmp_path / "run")
    assert stage("create-latent-update", str(run)) == 0
    assert "192 of 300 cells were embedded before" in capsys.readouterr().err
    for name, rounding in (("latent", 1e-5), ("latent-idx", 0), ("latent-hash", 0)):
        found, undisturbed = (np.load(Path(folder) / f"{name}.npy") for folder in (run, "finished"))
        np.testing.assert_allclose(found, undisturbed, rtol=0, atol=rounding)
        assert np.array_equal(found[:192], undisturbed[:192])


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


# --- names of today for what earlier versions wrote


def written(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "settings.yaml"
    path.write_text(text)
    return load_config(path, overrides)


NOTICE = "{}: {} is now {}; the old {} works until release 0.3"
OLD_NAME = ("query.n_neighbours", "annotate.overrides.n_neighbors", "name")
NEXT_NAME = ("query.n_neighbors", "annotate.overrides.n_neighbors", "name")
METHOD = ("query.method", "annotate.method", "name")


@pytest.mark.parametrize(
    ("text", "overrides", "notices"),
    [
        (
            "query: {n_neighbours: 7, method: neighbours}",
            [],
            [
                ("{file}", *OLD_NAME),
                ("{file}", *METHOD),
                ("{file}", "annotate.method: neighbours", "annotate.method: neighbors", "value"),
            ],
        ),
        (
            "query: {n_neighbors: 3, method: pca}",
            ["query.n_neighbours=7", "query.method=neighbours"],
            [
                ("{file}", *NEXT_NAME),
                ("{file}", *METHOD),
                ("command line", *OLD_NAME),
                ("command line", *METHOD),
                ("command line", "annotate.method=neighbours", "annotate.method=neighbors", "value"),
            ],
        ),
        (
            "{query: {n_neighbours: 3}, annotate: {method: neighbors}}",
            ["query.n_neighbors=7"],
            [("{file}", *OLD_NAME), ("command line", *NEXT_NAME)],
        ),
        ("annotate: {overrides: {n_neighbors: 7}, method: neighbors}", [], []),
    ],
)
def test_the_earlier_name_of_a_setting_is_understood_and_noticed(
    text: str,
    overrides: list[str],
    notices: list[tuple[str, ...]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    annotate = written(tmp_path, text, *overrides).annotate
    assert (annotate.overrides, annotate.method) == ({"n_neighbors": 7}, "neighbors")
    file = str(tmp_path / "settings.yaml")
    assert caplog.messages == [NOTICE.format(*words).replace("{file}", file) for words in notices]


def test_the_earlier_name_in_a_file_that_is_extended(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("query: {n_neighbours: 7, method: neighbours, umap_cells: 5}")
    config = written(tmp_path, "{extends: base.yaml, query: {n_neighbors: 3}, annotate: {overrides: {steps: 9}}}")
    assert (config.annotate.overrides, config.annotate.method) == ({"n_neighbors": 3, "steps": 9}, "neighbors")
    assert config.query.umap_cells == 5


def test_what_is_wrong_with_it_is_said_by_its_name_of_today(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"command line: annotate\.overrides is .*: n_neighbors is 0; expected a whole"):
        written(tmp_path, "query: {}", "query.n_neighbours=0")
    with pytest.raises(UserError, match=r"query\.n_neighbors is an earlier name of .*\.n_neighbors, which is set, too"):
        written(tmp_path, "query: {n_neighbours: 3, n_neighbors: 4}")
    with pytest.raises(UserError, match=r"query\.method is an earlier name of annotate\.method, which is set, too;"):
        written(tmp_path, "{query: {method: pca}, annotate: {method: pca}}")


def test_a_setting_that_was_removed_is_noticed_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert written(tmp_path, "evaluate: {mode: sound}", "evaluate.mode=sound") == Config()
    told = [f"{place}: evaluate.mode was removed and is not needed; remove it" for place in ("{file}", "command line")]
    assert caplog.messages == [line.replace("{file}", str(tmp_path / "settings.yaml")) for line in told]
    for text, overrides in (("evaluate: {mode: legacy}", []), ("{}", ["evaluate.mode=legacy"])):
        with pytest.raises(UserError, match=r"evaluate\.mode is 'legacy' and was removed: .* remove the setting"):
            written(tmp_path, text, *overrides)


@pytest.mark.parametrize("method", ["random_forest", "logistic_regression"])
def test_a_method_that_was_removed_is_not_taken_for_the_one_of_its_name(method: str, tmp_path: Path) -> None:
    for text, overrides in ((f"query: {{method: {method}}}", []), ("{}", [f"query.method={method}"])):
        with pytest.raises(
            UserError, match=rf"query\.method: {method} was a classifier on the model's embedding.* use"
        ):
            written(tmp_path, text, *overrides)


def test_today_s_names_are_settings() -> None:
    names = set(setting_names(Config))
    assert {name.removesuffix(".n_neighbors") for name in renamed.SETTINGS.values()} <= names
    assert not set(renamed.SETTINGS) & names
    assert set(renamed.VALUES) <= names and not set(renamed.REMOVED) & names


@pytest.mark.parametrize(
    ("recorded", "overrides", "difference"),
    [
        ({"query.method": "consensus", "query.n_neighbours": 15}, [], ""),
        ({"query.method": "consensus", "query.n_neighbors": 15}, ["query.n_neighbors=15"], ""),
        (
            {"query.method": "neighbours", "query.n_neighbours": 7},
            ["query.n_neighbors=7", "query.method=neighbors"],
            "",
        ),
        ({"query.method": "consensus", "annotate.overrides": {}}, ["annotate.overrides={n_neighbors: 15}"], ""),
        (
            {"query.method": "neighbours", "query.n_neighbours": 15},
            ["query.n_neighbors=7", "query.method=neighbors"],
            "annotate.overrides.n_neighbors was null and is 7",
        ),
        (
            {"query.method": "random_forest", "query.n_neighbours": 15},
            ["annotate.method=random_forest"],
            'annotate.method was "consensus" and is "random_forest"',
        ),
    ],
)
def test_what_a_mapping_recorded_is_compared_by_the_names_of_today(
    recorded: dict[str, Any], overrides: list[str], difference: str, tmp_path: Path
) -> None:
    now = written(tmp_path, "query: {file: cells.h5ad}", *overrides).of_stage("map-query")
    earlier = {key: value for key, value in now.items() if not key.startswith("annotate.")}
    before = fingerprint_of(earlier | recorded, {})
    assert changes(before, fingerprint_of(now, {}), Config().of_stage("map-query")) == difference


def test_a_recorded_config_may_have_both_names() -> None:
    config = {"query": {"method": "consensus", "n_neighbors": 15}, "annotate": {"method": "fast", "overrides": {}}}
    translated = renamed.translate_recorded_config(config)
    assert translated["annotate"] == {"method": "fast", "overrides": {"n_neighbors": 15}}


@pytest.fixture
def more_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in which settings that change results had other names."""
    more = {"hvg.least_genes": "hvg.min_genes", "thresholds": "gates"}
    monkeypatch.setattr(renamed, "SETTINGS", renamed.SETTINGS | more)
    monkeypatch.setattr(renamed, "VALUES", renamed.VALUES | {"anndata.compression": {"deflate": "gzip"}})


def test_what_a_run_recorded_has_its_names_of_today(
    more_renamed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"finished": "manifest.json", "prepare-killed": ".partial/prepare/fingerprint.json"}
    for run, record in runs.items():
        copied = shutil.copytree(run, tmp_path / run) / record
        text = copied.read_text()
        for now, before in (("hvg.min_genes", "hvg.least_genes"), ("gates.", "thresholds."), ("gzip", "deflate")):
            text = text.replace(f'"{now}', f'"{before}')
        copied.write_text(text)
    for name, run in (("prepare", "finished"), ("publish", "finished"), ("prepare", "prepare-killed")):
        assert stage(name, str(tmp_path / run)) == 0
    lines = capsys.readouterr().err
    assert "prepare is done" in lines and "publish is done" in lines
    assert "96 of 276 cells were written before" in lines
    assert stage("prepare", str(tmp_path / "finished"), "hvg.min_genes=31") == 2
    assert "hvg.min_genes was 30 and is 31" in capsys.readouterr().err


def test_what_a_publication_recorded_has_its_names_of_today(more_renamed: None, tmp_path: Path) -> None:
    folder = shutil.copytree("finished/published", tmp_path / "published")
    record = read_json(folder / "provenance.json")
    record["config"]["thresholds"] = record["config"].pop("gates")
    del record["seal"]
    write_json(folder / "provenance.json", {**record, "seal": seal_of(record)})
    assert main("verify", [str(folder)]) == 0
