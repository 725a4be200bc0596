"""Fine-tuning: only unseen cells are trained on, new batches start from the mean, the result is a run like any."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import on_two_nodes
from pipeline import Run

from census_scvi import Atlas
from census_scvi.census import stream
from census_scvi.census.cells import Cells
from census_scvi.cli import main
from census_scvi.counts import file_order
from census_scvi.errors import UserError
from census_scvi.fine_tuning import start
from census_scvi.fine_tuning.new_cells import NewCells, seen_after, training_cells
from census_scvi.fine_tuning.settings import FineTuneSection
from census_scvi.local_census.demo.releases import NEW_DATASET, NEW_DONOR, write_demo_releases
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import load_safe, read_description, save_safe
from census_scvi.stages.fine_tune import NOTHING_NEW
from census_scvi.training.settings import TrainSection

FEW_EPOCHS: dict[str, Any] = {"max_epochs": 2}
SEES_BATCH = {"encode_covariates": True, "arguments": {"use_layer_norm": "both", "use_batch_norm": "none"}}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The demo Census in two releases."""
    folder = tmp_path_factory.mktemp("releases")
    write_demo_releases(folder / "first", folder / "second", scale=0.2, n_genes=300)
    return str(folder / "first"), str(folder / "second")


@pytest.fixture(scope="module")
def trained(releases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of the first release."""
    run = Run(tmp_path_factory.mktemp("trained"), releases[0])
    assert run("prepare") == run("train") == 0
    return run


@pytest.fixture(scope="module")
def tuned(releases: tuple[str, str], trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That model, fine-tuned on the second release, in a copy of which it is published."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(releases[1], folder / "census")
    settings = {"model": str(trained.directory), "replay_cells": 100, **FEW_EPOCHS}
    gates = {"sample_size": 300, "waived": {"effective_rank": "few epochs"}}
    run = Run(folder, str(folder / "census"), fine_tune=settings, gates=gates)
    assert run("fine-tune") == run("create-latent-update") == run("publish") == 0
    return run


@pytest.fixture(scope="module")
def other_models(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models that cannot be fine-tuned."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("bare", "other-genes"):
        shutil.copytree(trained.path("scvi.model"), folder / name)
    description = read_description(folder / "bare")
    scanvi = replace(description, model="SCANVI", labels=["a", "b"], labels_key="c", unlabeled_category="unknown")
    (folder / "scanvi").mkdir()
    save_safe(scanvi.build(), scanvi, folder / "scanvi")
    values = json.loads((folder / "other-genes/model.json").read_text())
    values["genes"] = [f"other-{gene}" for gene in values["genes"]]
    (folder / "other-genes/model.json").write_text(json.dumps(values))
    return folder


def next_run(folder: Path, uri: str, model: Path, **settings: Any) -> Run:
    sections = settings.pop("sections", {})
    return Run(folder, uri, fine_tune={"model": str(model), **FEW_EPOCHS, **settings}, **sections)


def unseen(uri: str) -> set[int]:
    """soma_joinids of the training cells of the second release that the first one does not have."""
    with cellxgene_census.open_soma(uri=uri) as root:
        obs = cellxgene_census.get_obs(root, "homo_sapiens", value_filter="is_primary_data == True and nnz >= 50")
    new = (obs["dataset_id"] == NEW_DATASET) | (obs["donor_id"] == NEW_DONOR)
    return set(obs.loc[new, "soma_joinid"])


def test_the_new_cells_and_the_replayed_ones_are_trained_on_with_the_genes_of_the_model(
    tuned: Run, trained: Run
) -> None:
    cells, before = (ad.read_h5ad(run.path("anndata_model.h5ad")) for run in (tuned, trained))
    expected = unseen(str(tuned.directory.parent / "census"))
    found = set(cells.obs["soma_joinid"])
    assert expected < found
    assert len(found) == cells.n_obs == len(expected) + 100
    assert list(cells.var_names) == list(before.var_names)
    known = list(before.obs["batch"].cat.categories)
    batches = list(cells.obs["batch"].cat.categories)
    assert batches[: len(known)] == known
    assert set(batches[len(known) :]) == set(cells.obs.loc[cells.obs["soma_joinid"].isin(expected), "batch"])
    counts = tuned.record("prepare")["counts"]
    assert (counts["new_cells"], counts["replayed_cells"], counts["cells_seen_before"]) == (
        len(expected),
        100,
        before.n_obs,
    )
    assert counts["cells_gone"] > 0  # the release lacks cells of the first one


def test_the_result_is_a_run_as_any_with_its_lineage(tuned: Run, trained: Run) -> None:
    assert tuned("fine-tune") == 0  # done: nothing happens
    published = tuned.path("published")
    assert main("verify", [str(published), "--census", str(tuned.directory.parent / "census")]) == 0
    (record,) = json.loads((published / "model.json").read_text())["lineage"]
    assert record["fine_tuned_from"] == str(trained.directory)
    assert (record["mode"], record["epochs"], record["replayed_cells"], record["lr"]) == ("continue", 2, 100, 1e-4)
    assert record["moved"]["source"] == "model"
    assert 0 < record["moved"]["mean"] <= record["moved"]["largest"]
    assert len(Atlas.open(str(tuned.directory)).embeddings("dataset_id == 'demo-human-heart'")) > 0
    model, description = load_safe(tuned.path("scvi.model"))
    assert model.module.n_batch == len(description.batches) > record["batches_before"]


@pytest.mark.parametrize("place", ["run", "run/scvi.model", "run/published"])
def test_nothing_is_new_to_the_fine_tuned_model(
    place: str, tuned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A published model knows its cells by the Censuses that its lineage names, a run directory by its files."""
    uri = str(tuned.directory.parent / "census")
    run = next_run(tmp_path, uri, tuned.directory.parent / place)
    with pytest.raises(SystemExit) as left:
        run("fine-tune", "--check")
    assert left.value.code == NOTHING_NEW
    assert ": 0 are new, in 0 new batches" in capsys.readouterr().out
    assert run("fine-tune") == 2
    assert "there is nothing to fine-tune; set census.uri or census.version" in capsys.readouterr().err
    assert not run.directory.joinpath("manifest.json").exists()


def test_check_and_dry_run_change_nothing(
    releases: tuple[str, str], trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next_run(tmp_path, releases[1], trained.directory)
    assert run("fine-tune", "--check") == run("fine-tune", "--dry-run") == 0
    shown = capsys.readouterr().out
    n_new = len(unseen(releases[1]))
    assert shown.count(f": {n_new:,} are new") == 2
    assert NEW_DATASET in shown
    assert f"mode continue: {n_new:,} cells, 0 of them seen before; up to 2 epochs, learning rate 0.0001" in shown
    found = re.search(
        r"take   about ([\d.]+) (MB|GB) of memory, ([\d.]+) kB of disk and (\d+) s on this machine", shown
    )
    assert found is not None
    memory = float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]
    assert 0.5e9 < memory < 2e9
    assert 4 <= int(found[4]) < 300
    assert run("fine-tune", "--decide", "--dry-run", "fine_tune.replay_cells=10") == 0
    planned = capsys.readouterr().out
    assert "fine-tune --decide would" in planned
    retrained = re.search(r"retrain: up to ([\d,]+) cells, 3 epochs", planned)
    assert retrained is not None
    assert f"  with   {retrained[1]} cells" in planned
    assert f"continue: up to {n_new + 10:,} cells, 2 epochs" in planned
    assert "mode new_batches trains nothing" in planned
    assert not run.directory.exists()
    assert run("fine-tune", "--dry-run", f"census.uri={releases[0]}") == 2
    assert "there is nothing to fine-tune" in capsys.readouterr().err


def test_the_labels_are_those_of_the_new_cells(releases: tuple[str, str], trained: Run, tmp_path: Path) -> None:
    labels = {"labels_key": "cell_type", "unlabeled_category": "macrophage"}
    run = next_run(tmp_path, releases[1], trained.directory, sections={"anndata": labels})
    assert run("prepare") == 0
    obs = ad.read_h5ad(run.path("anndata_model.h5ad")).obs
    assert list(obs["labels"].astype(str)) == list(obs["cell_type"].astype(str))


def test_the_cells_are_prepared_in_parts(
    releases: tuple[str, str], trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "X_TILE", 100)
    monkeypatch.setattr(file_order, "POOL_RUNS", 2)
    one, several = (next_run(tmp_path / name, releases[1], trained.directory) for name in ("one", "parts"))
    assert one("prepare") == 0
    for part in ("2/3", "3/3", "1/3"):
        assert several("prepare", "--part", part) == 0  # no round for the genes, which are those of the model
    assert len(list(several.path(".partial/prepare").glob("part-0000?-of-00003.done"))) == 3
    assert several("prepare") == 0
    for name in ("anndata_model.h5ad", "hv_genes.pkl", "seen-cells.npy"):
        assert one.path(name).read_bytes() == several.path(name).read_bytes(), name
    assert one.record("prepare")["counts"] == several.record("prepare")["counts"]


def test_a_model_whose_census_is_gone(
    releases: tuple[str, str], tuned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run directory has the cells that its model has seen; of a published model, the Census must still be there."""
    run = next_run(tmp_path, releases[1], tuned.path("published"))
    census = tuned.directory.parent / "census"
    census.rename(gone := census.with_name("gone"))
    try:
        assert run("fine-tune", "--check") == 2
        said = capsys.readouterr().err
        with pytest.raises(SystemExit) as left:
            run("fine-tune", "--check", f"fine_tune.model={tuned.directory}")
    finally:
        gone.rename(census)
    assert "was trained on are not known, because their Census cannot be read" in said
    assert "give fine_tune.model the run directory with its prepared cells" in said
    assert left.value.code == NOTHING_NEW


def test_several_nodes(
    releases: tuple[str, str], trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One node prepares; then all train, and the first one writes the model."""
    nodes = {"train": {"batch_size": 64, "num_nodes": 2}}
    run = next_run(tmp_path, releases[1], trained.directory, sections=nodes)
    assert run("fine-tune") == 2
    assert "the cells are not prepared yet; run scvi-prepare.py with this config on one node" in capsys.readouterr().err
    assert run("fine-tune", "--decide") == 2
    assert "--decide trains on one device; remove it" in capsys.readouterr().err
    assert not run.directory.exists()
    assert run("prepare") == 0
    first, follower = on_two_nodes(run, command="fine-tune")
    assert (first.returncode, follower.returncode) == (0, 0), first.stderr + follower.stderr
    assert run.record("train")["processes"] == 2
    (lineage,) = read_description(run.path("scvi.model")).lineage
    assert lineage["new_cells"] == len(unseen(releases[1]))
    assert lineage["epochs"] == 2
    assert lineage["moved"]["mean"] > 0


@pytest.mark.parametrize("decoder", [False, True])
def test_new_batches_with_a_blind_encoder(
    decoder: bool, releases: tuple[str, str], trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding is that of the model before; unless the decoder is wanted, nothing is trained, and this is said."""
    run = next_run(tmp_path, releases[1], trained.directory, mode="new_batches", decoder=decoder, lr=0.01)
    assert run("fine-tune") == 0
    assert ("trains nothing: the encoder does not use the batch" in capsys.readouterr().err) is not decoder
    (before, old), (after, new) = (load_safe(each.path("scvi.model")) for each in (trained, run))
    cells = ad.read_h5ad(run.path("anndata_model.h5ad"))
    codes = np.zeros(cells.n_obs, np.int64)
    latents = [Encoder(model)(cells.X, codes).mean for model in (before, after)]
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-5)
    assert run.record("train")["counts"]["epochs"] == (2 if decoder else 0)
    columns = after.module.decoder.px_decoder.fc_layers[0][0].weight.detach().numpy()[:, -len(new.batches) :]
    known, added = columns[:, : len(old.batches)], columns[:, len(old.batches) :]
    at_the_mean = np.allclose(added, known.mean(axis=1, keepdims=True), atol=1e-6)
    assert at_the_mean is not decoder
    reference = before.module.decoder.px_decoder.fc_layers[0][0].weight.detach().numpy()[:, -len(old.batches) :]
    np.testing.assert_array_equal(known, reference)


def test_new_batches_with_an_encoder_that_sees_them_leaves_the_old_cells_where_they_are(
    releases: tuple[str, str], tmp_path: Path
) -> None:
    base = Run(tmp_path / "base", releases[0], model=SEES_BATCH)
    assert base("prepare") == base("train") == 0
    sections = {"model": SEES_BATCH, "training_plan": {"weight_decay": 1e-3}}
    run = next_run(tmp_path / "next", releases[1], base.directory, mode="new_batches", lr=0.01, sections=sections)
    assert run("fine-tune") == 0
    (before, old), (after, new) = (load_safe(each.path("scvi.model")) for each in (base, run))
    cells = ad.read_h5ad(base.path("anndata_model.h5ad"))
    codes = cells.obs["batch"].cat.codes.to_numpy(np.int64)
    latents = [Encoder(model)(cells.X, codes).mean for model in (before, after)]
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-5)
    columns = after.module.z_encoder.encoder.fc_layers[0][0].weight.detach().numpy()[:, -len(new.batches) :]
    known, added = columns[:, : len(old.batches)], columns[:, len(old.batches) :]
    assert np.abs(added - known.mean(axis=1, keepdims=True)).max() > 1e-3  # trained
    prepared = ad.read_h5ad(run.path("anndata_model.h5ad"))
    assert not set(prepared.obs["batch"]) & set(old.batches)  # their cells would train the weights of the old batches
    assert run.record("train")["counts"]["epochs"] == 2


def test_training_starts_from_the_model_and_the_mean(trained: Run, tuned: Run) -> None:
    settings = FineTuneSection(model=str(trained.directory))
    before = load_safe(trained.path("scvi.model"))
    cells = start.PreparedCells(tuned.path("anndata_model.h5ad"))
    tuning = start.start_from(settings, before, cells, 0)
    cells.close()
    n_old, weights = len(before[1].batches), before[0].module.state_dict()
    for name, values in tuning.model.module.state_dict().items():
        if values.shape == weights[name].shape:
            np.testing.assert_array_equal(values, weights[name], err_msg=name)
        else:
            known, added = values[:, : weights[name].shape[1]], values[:, weights[name].shape[1] :]
            np.testing.assert_array_equal(known, weights[name], err_msg=name)
            mean = known[:, -n_old:].mean(dim=1, keepdim=True).expand_as(added)
            np.testing.assert_allclose(added, mean, rtol=1e-6, err_msg=name)


def test_settings_of_the_training() -> None:
    """A small learning rate, early stopping, the full KL weight at once, no weight decay if weights are frozen."""
    train = TrainSection(max_epochs=400, train_size=0.8)
    plan = {"lr": 2e-3, "n_epochs_kl_warmup": 100, "n_steps_kl_warmup": 10, "weight_decay": 1e-3}
    tuned, arguments = FineTuneSection(max_epochs=7, patience=3).training(train, plan)
    assert (tuned.max_epochs, tuned.early_stopping, tuned.trainer) == (7, True, {"early_stopping_patience": 3})
    assert arguments == {"lr": pytest.approx(2e-4), "n_epochs_kl_warmup": None, "weight_decay": 1e-3}
    tuned, arguments = FineTuneSection(mode="new_batches", lr=1e-5).training(TrainSection(train_size=1.0), plan)
    assert not tuned.early_stopping
    assert (arguments["lr"], arguments["weight_decay"]) == (1e-5, 0.0)


def test_a_stopped_fine_tuning_continues(releases: tuple[str, str], trained: Run, tmp_path: Path) -> None:
    """What is prepared is not prepared again, and the training goes on after its last epoch: as if never stopped."""
    runs = [next_run(tmp_path / name, releases[1], trained.directory, max_epochs=3) for name in ("whole", "stopped")]
    killed = (
        "import os; from census_scvi.training.callbacks import LearningCurves as C; f = C.on_train_epoch_end\n"
        "C.on_train_epoch_end = lambda s, t, m: (f(s, t, m), t.current_epoch == 2 and os._exit(9))"
    )
    assert runs[0]("fine-tune") == 0
    assert runs[1].subprocess("fine-tune", before=killed).returncode == 9
    prepared = runs[1].record("prepare")
    assert runs[1]("fine-tune") == 0
    assert runs[1].record("prepare") == prepared
    assert runs[1].record("train")["resumed"]
    curves = [run.record("train")["learning_curves"]["elbo_train"] for run in runs]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-6)


@given(data=st.data(), n_cells=st.integers(1, 30), n_trained=st.integers(1, 4), n_replayed=st.integers(0, 40))
def test_the_chosen_cells(data: st.DataObject, n_cells: int, n_trained: int, n_replayed: int) -> None:
    """All new cells, each in its batch, as many others as asked for; no batch is added that has no cell among them."""
    batches = [f"trained-{number}" for number in range(n_trained)] + ["new-1", "new-2", "new-3"]
    codes = np.array(data.draw(st.lists(st.integers(0, n_trained + 2), min_size=n_cells, max_size=n_cells)), np.int32)
    new = np.array(data.draw(st.lists(st.booleans(), min_size=n_cells, max_size=n_cells)))
    joinids, keys = np.arange(n_cells) * 3, np.arange(n_cells, dtype=np.uint64)
    found = NewCells(Cells(joinids, codes, batches), keys, new, n_trained, 100, 50)
    mode = data.draw(st.sampled_from(["continue", "new_batches"]))
    settings = FineTuneSection(model="before", mode=mode, replay_cells=0 if mode == "new_batches" else n_replayed)
    expected = new if mode == "continue" else new & (codes >= n_trained)
    if not expected.any():
        with pytest.raises(
            UserError, match="there is nothing to fine-tune" if not new.any() else "are of batches that"
        ):
            training_cells(found, settings, 0)
        return
    cells, counts = training_cells(found, settings, 0)
    assert set(joinids[expected]) <= set(cells.joinids)
    assert len(cells) - expected.sum() == counts["replayed_cells"] == min(settings.replay_cells, (~new).sum())
    labels = np.array(batches, dtype=object)[codes]
    chosen = np.isin(joinids, cells.joinids)
    assert [cells.batches[code] for code in cells.batch_codes] == list(labels[chosen])
    assert cells.batches == batches[:n_trained] + sorted(set(labels[chosen]) - set(batches[:n_trained]))
    np.testing.assert_array_equal(seen_after(found, cells, np.array([1000], np.uint64)), [*keys[chosen], 1000])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fine_tune.model=null"], "fine_tune.model is not set; give a run directory"),
        (["output.directory={model}"], "is the run directory of fine_tune.model; give a new folder"),
        (["census.organism=mus_musculus"], "was trained on homo_sapiens, and census.organism is mus_musculus"),
        (["anndata.batch_key=[donor_id]"], "and the config has ['donor_id']; set it to the same"),
        (["model.n_hidden=32"], "has n_hidden 16, and the section model of this config 32"),
        (["model.kind=SCANVI", "anndata.labels_key=cell_type"], "is an SCVI model, and model.kind is SCANVI"),
        (["fine_tune.mode=new_batches", "fine_tune.replay_cells=5"], "fine_tune.replay_cells is 5, and mode"),
        (["census.obs_query=dataset_id == 'demo-human-lung'"], "there is nothing to fine-tune"),
        (["fine_tune.model={folder}/scanvi"], "is a SCANVI model, and only SCVI can be fine-tuned"),
        (["fine_tune.model={folder}/bare"], "does not say which cells it was trained on; give its run directory"),
        (["fine_tune.model={folder}/other-genes"], "200 of the model's 200 genes are not in"),
    ],
)
def test_what_is_refused(
    settings: list[str],
    message: str,
    releases: tuple[str, str],
    trained: Run,
    other_models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = next_run(tmp_path, releases[1], trained.directory)
    places = {"model": trained.directory, "folder": other_models}
    assert run("fine-tune", *(text.format_map(places) if "{" in text else text for text in settings)) == 2
    assert message in capsys.readouterr().err
    assert not run.path("manifest.json").exists()
