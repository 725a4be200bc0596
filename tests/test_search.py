"""Search of settings: what may be searched, the trials on one prepared file, the choice, and resuming after a kill."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pipeline import ROOT, Run, forked, run_script
from search_trials import EPOCHS, FAILING, learn

from census_scvi.cli import main
from census_scvi.cluster.process import failure
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.errors import UserError
from census_scvi.search.choose import Finalist, choose, tried_of
from census_scvi.search.process import Job
from census_scvi.search.settings import Range
from census_scvi.search.space import Tried, n_combinations, suggest
from census_scvi.search.study import Study, all_failed
from census_scvi.search.table import table_of
from census_scvi.search.trials import FINAL, SEARCHED, Trial, new_trial, trials_of
from census_scvi.search.tune import ray_here
from census_scvi.settings import Config, load_config
from census_scvi.settings.search_space import require_searchable, trial_config

DONORS = "donor_id in ['A']"
LATENT: dict[str, Any] = {"model.n_latent": [4, 8]}


def config_with(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections or {"seed": 0}))
    return load_config(path)


# --- what may be searched


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "search.space is empty: give settings with values"),
        ({"search": {"space": LATENT}, "fine_tune": {"model": "run"}}, "fine_tune.model is set, and the trials of"),
        ({"search": {"space": {"model.n_latent": [10]}}}, "search.space.model.n_latent has one value, 10: give two or"),
        ({"search": {"space": {"model.n_latent": []}}}, "search.space.model.n_latent has no value: give two or more"),
        ({"search": {"space": {"model.n_latent": [4, 8, 4]}}}, "search.space.model.n_latent has 4 twice"),
        (
            {"search": {"space": {"model.n_latnt": [4, 8]}}},
            "search.space has model.n_latnt, which is not a setting; did you mean model.n_latent?",
        ),
        ({"search": {"space": {"model.n_latent": [4, 0]}}}, "search.space: model.n_latent is 0: "),
        ({"search": {"space": {"model.n_latent": [4, "many"]}}}, "model.n_latent is 'many', expected a whole number"),
        ({"search": {"space": {"training_plan.lrr": [1e-3, 1e-2]}}}, "training_plan.lrr"),
        ({"search": {"space": {"model.dropout_rate": {"low": 0.1, "high": 1.5}}}}, "model.dropout_rate is 1.5"),
        ({"search": {"space": {"train.train_size": [0.8, 0.9]}}}, "train.train_size, which would change the cells"),
        ({"search": {"space": {"census.organism": ["a", "b"]}}}, "census.organism, which cannot be searched; settings"),
        ({"search": {"space": {"train.devices": [1, 2]}}}, "train.devices, which cannot be searched"),
        (
            {"search": {"space": {"hvg.top_n_hvg": [100, 200]}}},
            "search.space has hvg.top_n_hvg, and search.metric has the ELBO, which can be compared only for the same",
        ),
        ({"search": {"space": {"model.kind": ["SCVI", "SCANVI"]}}}, "model.kind is SCANVI, which learns labels"),
        ({"search": {"space": LATENT, "metric": "bio"}}, "search.metric is bio, which is measured on held-out donors"),
        (
            {"search": {"space": LATENT, "metric": "bio", "scheduler": "asha"}, "train": {"held_out": DONORS}},
            "search.scheduler asha compares the validation ELBO of each epoch, and search.metric is bio",
        ),
        ({"search": {"space": LATENT, "metric": {"bio": -1.0}}}, "expected weights above 0"),
        (
            {
                "search": {"space": {"anndata.batch_key": [["assay"], ["dataset_id"]]}, "metric": "batch"},
                "train": {"held_out": DONORS},
                "evaluate": {"batches": ["batch"]},
            },
            "evaluate.batches begins with batch, which differs between the trials",
        ),
        (
            {
                "search": {"space": {"hvg.top_n_hvg": {"low": 100, "high": 200}}, "metric": "bio"},
                "train": {"held_out": DONORS},
            },
            "search.space.hvg.top_n_hvg is a range: list its values, because prepare runs for each of them",
        ),
        ({"search": {"space": LATENT}, "train": {"train_size": 1.0}}, "a search needs validation cells"),
        (
            {"search": {"space": {"train.max_epochs": [3, 6]}, "max_epochs": 3}},
            "search.max_epochs is the budget of every trial, and search.space has train.max_epochs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_space_that_cannot_be_searched_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        require_searchable(config_with(tmp_path, **sections))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.n_latent": 10}, "yaml: search.space.model.n_latent is 10, expected a list of values such as [10, 50]"),
        ({"training_plan.lr": {"low": 1, "high": "x"}}, "search.space.training_plan.lr: high is 'x', expected"),
        (
            {"training_plan.lr": {"low": 1, "high": 1}},
            "search.space.training_plan.lr: low is 1 and high is 1: low must",
        ),
        ({"training_plan.lr": {"low": 0, "high": 1, "log": True}}, "low is 0, and log: true needs numbers above 0"),
    ],
)
def test_a_space_of_another_form_is_refused(space: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_with(tmp_path, search={"space": space})


def test_a_trial_differs_from_the_config_in_settings_seed_and_budget_only(tmp_path: Path) -> None:
    space = {"model": {"n_latent": [4, 8]}, "training_plan.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    config = config_with(tmp_path, search={"space": space, "max_epochs": 7, "max_cells": 500}, seed=3)
    assert list(config.search.space) == ["model.n_latent", "training_plan.lr"]
    require_searchable(config)
    same = trial_config(config, {}, 3, tmp_path).of_stage("train")
    assert same == config.of_stage("train") | {"train.max_epochs": 7, "train.max_cells": 500}
    other = trial_config(config, {"model.n_latent": 8, "training_plan.lr": 2e-3}, 4, tmp_path).of_stage("train")
    changed = {"model.n_latent": 8, "training_plan.lr": 2e-3, "seed": 4, "train.split_seed": 3}
    assert other == {key: value for key, value in same.items() if key != "training_plan"} | changed


VALUES = st.lists(st.integers(1, 9), min_size=2, max_size=4, unique=True)
RANGES = st.builds(lambda low, width, log: Range(low=low, high=low + width, log=log), st.integers(1, 5),
                   st.integers(1, 50), st.booleans())  # fmt: skip


@given(
    space=st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(VALUES, RANGES), min_size=1),
    searcher=st.sampled_from(["random", "tpe"]),
    seed=st.integers(0, 5),
)
def test_suggestions_are_in_the_space_differ_and_repeat(space: Any, searcher: str, seed: int) -> None:
    tried: list[Tried] = []
    while len(tried) < 9 and (settings := suggest(space, tried, searcher, seed)) is not None:
        assert settings not in [each.settings for each in tried]
        assert settings == suggest(space, tried, searcher, seed)
        for name, values in space.items():
            value = settings[name]
            assert value in values if isinstance(values, list) else values.low <= value <= values.high
        tried.append(Tried(settings, float(sum(settings.values())) if len(tried) % 3 else None))
    if (every := n_combinations(space)) is not None:
        assert len(tried) == min(every, 9)


# --- the choice


def finalist(value: int, scores: tuple[float, ...], parameters: int = 100, epochs: int = 5) -> Finalist:
    return Finalist({"n": value}, scores, parameters, epochs, changed=1)


@pytest.mark.parametrize(
    ("found", "winner", "said"),
    [
        (
            [finalist(1, (-10.0, -11.0), 10), finalist(2, (-8.0, -9.0), 90)],
            2,
            "worst seed is better than the best",
        ),
        (
            [finalist(1, (-10.0, -12.0), 10), finalist(2, (-9.0, -11.0), 90)],
            1,
            "the simplest of 2 that the seeds",
        ),
        ([finalist(1, (-10.0, -12.0), 90), finalist(2, (-9.0, -11.0), 10)], 2, "which is not simpler: 90 parameters"),
        ([finalist(1, (-9.5, -10.5), epochs=9), finalist(2, (-9.0, -11.0))], 2, "the simplest of 2|is not simpler"),
        ([finalist(1, (-9.0, -9.5), 90), finalist(2, (-9.4, -10.0)), finalist(3, (-20.0, -30.0), 1)], 1, "not simpler"),
        ([finalist(1, (-9.0, -9.5))], 1, "No other settings"),
    ],
    ids=["beyond the spread", "within: simpler", "within: best is simpler", "fewer epochs", "three", "one"],
)
def test_the_winner_beats_the_spread_of_the_seeds_or_is_the_simplest(
    found: list[Finalist], winner: int, said: str
) -> None:
    for order in (found, found[::-1]):
        choice = choose(order, {"elbo": 1.0})
        assert choice.winner.settings == {"n": winner}
        assert choice.sentence.startswith(f"Chosen: n {winner}")
        assert re.search(said, choice.sentence)
    assert "-" not in re.sub(r"\w-\w", "", choice.sentence), "an ELBO is shown as scvi-tools reports it"


# --- validation cells and budget


def test_held_out_donors_and_a_number_of_training_cells(finished_run: Run) -> None:
    path = finished_run.path("anndata_model.h5ad")
    with h5py.File(path) as file:
        names = file["obs/donor_id/categories"].asstr()[:]
        donors = names[file["obs/donor_id/codes"][:]]

    def data(**arguments: Any) -> PreparedDataModule:
        return PreparedDataModule(path, batch_size=128, train_size=0.9, workers=0, **arguments)

    chosen = names[:2]
    held_out = f"donor_id in ['{chosen[0]}', '{chosen[1]}']"
    of_donors = [data(seed=seed, held_out=held_out, split_seed=0, max_cells=300) for seed in (0, 1)]
    for each in of_donors:
        np.testing.assert_array_equal(each.validation, np.isin(donors, chosen))
        assert each.n_train == 300
        assert not (each.training & each.validation).any()
        np.testing.assert_array_equal(each.training, of_donors[0].training)
    np.testing.assert_array_equal(data(seed=5, split_seed=0).validation, data(seed=0).validation)
    assert (data(seed=5).validation != data(seed=0).validation).any()
    with pytest.raises(UserError, match=r"train\.held_out names donr_id, which is not an obs column .* did you mean"):
        data(seed=0, held_out="donr_id == 'x'")
    with pytest.raises(UserError, match=r"train\.held_out \"donor_id == 'x'\" matches no cell"):
        data(seed=0, held_out="donor_id == 'x'")


@pytest.fixture(scope="module")
def prepared(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory with prepared cells; its config holds out the cells of two donors."""
    run = Run(tmp_path_factory.mktemp("prepared"), demo_census)
    assert run("prepare") == 0
    return run


def search_that_writes_its_id(config: str, path: Path) -> None:
    path.write_text(str(os.getpid()))
    run_script(str(ROOT / "scvi-search.py"), "--config", config)


@pytest.mark.slow
def test_a_killed_search_resumes_and_its_winner_trains_the_reported_model(
    prepared: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the settings needs more memory than any machine has; the search is killed after a finished trial."""
    values = yaml.safe_load(prepared.config.read_text())
    values["search"] = {"space": {"model.n_latent": [4, 8, 10**13]}, "trials": 5, "final_seeds": 2}
    values["evaluate"] |= {"labels": [], "batches": []}
    prepared.config.write_text(yaml.safe_dump(values))
    folder = prepared.path("search")

    def finished() -> list[Any]:
        return [trial for trial in trials_of(folder) if trial.status == "finished"]

    pid = prepared.path("pid")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(forked, search_that_writes_its_id, str(prepared.config), pid)
        while not finished() and not first.done():
            time.sleep(0.2)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        assert first.result().returncode == -signal.SIGKILL
    before = {trial.number: trial.record for trial in finished()}
    assert before

    done = forked(run_script, str(ROOT / "scvi-search.py"), "--config", str(prepared.config))
    assert done.returncode == 0, done.stderr
    trials = {trial.number: trial for trial in trials_of(folder)}
    assert {number: trials[number].record for number in before} == before, "nothing is trained twice"
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(trials)
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["model.n_latent"] == str(10**13)
    assert "memory" in failed["error"].lower()
    assert not failed["elbo"]
    seeds: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "finished":
            seeds.setdefault(row["model.n_latent"], []).append(row["seed"])
            assert row["epochs"] == "3"
            assert float(row["elbo"]) == pytest.approx(float(row["reconstruction"]) + float(row["kl"]), rel=1e-5)
            assert float(row["score"]) == -float(row["elbo"])
            assert 0 < float(row["active_units"]) <= float(row["model.n_latent"])
            assert float(row["cpu_seconds"]) > 0
            assert float(row["memory_bytes"]) > 1e8
    assert {value: sorted(found) for value, found in seeds.items()} == {"4": ["0", "1", "2"], "8": ["0", "1", "2"]}
    links = {trial.folder.joinpath("anndata_model.h5ad").resolve() for trial in trials.values()}
    assert links == {prepared.path("anndata_model.h5ad").resolve()}, "one prepared file"

    manifest = json.loads((folder / "manifest.json").read_text())["stages"]["search"]
    page = (folder / "report.html").read_text()
    assert manifest["sentence"].replace("'", "&#39;") in page
    assert page.count("data:image/png") >= 3
    winner = load_config(folder / "winner.yaml")
    assert {"model.n_latent": winner.model.n_latent} == manifest["winner"]
    text = (folder / "winner.yaml").read_text()
    assert "extends: ../../config.yaml" in text
    assert set(yaml.safe_load(text)) - {"extends"} <= {"model"}, "only what differs from the config"
    assert main("train", ["--config", str(folder / "winner.yaml")]) == 0
    (reported,) = [row for row in rows if row["seed"] == "0" and row["model.n_latent"] == str(winner.model.n_latent)]
    assert prepared.record("train")["learning_curves"]["elbo_validation"][-1] == float(reported["elbo"])

    capfd.readouterr()
    assert prepared("search") == 0
    assert "search is done for these settings" in capfd.readouterr().err
    assert prepared("search", "search.trials=7") == 2
    assert "finished search for other settings: search.trials was 5 and is 7" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "log", "why"),
    [
        (2, "10:00 epoch 1/3\nerror: the loss is nan in epoch 2\n", "the loss is nan in epoch 2"),
        (
            1,
            "Traceback:\n  File x\ntorch.OutOfMemoryError: no memory\nrun directory: x\n",
            "torch.OutOfMemoryError: no",
        ),
        (-9, "epoch 1/3\n", "killed by signal 9, probably because the memory of the machine was full"),
        (3, "", "ended with exit code 3"),
    ],
)
def test_a_failed_trial_says_why(code: int, log: str, why: str, tmp_path: Path) -> None:
    trials = []
    for value in (4, 8):
        trial = new_trial(tmp_path, {"model.n_latent": value}, 0, SEARCHED)
        trial.folder.mkdir(parents=True)
        (trial.folder / "trial.json").write_text(json.dumps({"settings": trial.settings, "seed": 0, "part": SEARCHED}))
        (trial.folder / "log.txt").write_text(log)
        trial.end("failed", failure(code, trial.folder / "log.txt"))
        trials.append(trial)
    assert trials_of(tmp_path) == trials
    assert trials[0].error.startswith(why)
    assert all_failed(trials).startswith(f"all 2 trials failed, trial 1 with: {why}")
    table = table_of(trials, ["model.n_latent"], {"elbo": 1.0})
    assert list(table["model.n_latent"]) == [4, 8]
    assert list(table["status"]) == ["failed", "failed"]
    assert table["score"].isna().all()


@pytest.mark.slow
def test_asha_stops_trials_that_are_worse_and_a_search_of_failures_says_why(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))  # for Ray's processes
    job = Job(learn, (learn.__module__,), str(tmp_path), os.cpu_count() or 1, 0.0)

    def study(name: str, values: list[int]) -> Study:
        search = {"space": {"model.n_latent": values}, "scheduler": "asha", "grace_epochs": 1, "trials": len(values)}
        settings = config_with(tmp_path, search={**search, "final_seeds": 2}).search
        return Study(
            tmp_path / name,
            settings,
            0,
            EPOCHS,
            {"model.n_latent": 1},
            partial(Trial.prepare, prepared=prepared.directory, config={}),
            job,
            1,
        )

    some, failing = study("some", list(range(1, 6))), study("failing", [FAILING, FAILING + 1])
    with ray_here(0):
        some.run()
        trials = some.trials
        some.run()
        assert some.trials == trials, "those that were stopped are not trained again"
        failing.run()
    final = [trial for trial in trials if trial.part == FINAL]
    finalists = {trial.settings["model.n_latent"] for trial in final}
    assert len(finalists) == 2
    assert 1 in finalists
    assert all(len(trial.curves["elbo_validation"]) == EPOCHS for trial in final), "only the search stops trials"
    trials = [trial for trial in trials if trial.part == SEARCHED]
    assert len(trials) == 5
    best = math.inf
    for trial in trials:
        epochs, latent = len(trial.curves["elbo_validation"]), trial.settings["model.n_latent"]
        if latent < best:
            assert (trial.status, epochs) == ("finished", EPOCHS), "none is stopped that is better than all before"
        elif trial.status == "stopped":
            assert epochs < EPOCHS
        best = min(best, latent)
    stopped = [trial.settings for trial in trials if trial.status == "stopped"]
    assert stopped
    assert {"model.n_latent": 1} not in stopped
    tried = {json.dumps(each.settings): each for each in tried_of(trials, some.settings.weights)}
    for settings in stopped:
        assert tried[json.dumps(settings)].score is None
        assert tried[json.dumps(settings)].intermediate
    assert some.finalists()[0] == {"model.n_latent": 1}
    assert all_failed(failing.trials) == "all 2 trials failed, trial 1 with: no memory"


@pytest.mark.slow
def test_a_trial_with_other_genes_is_prepared_and_measured_on_the_same_held_out_donors(
    demo_census: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from census_scvi.stages import search as stage

    donors = "dataset_id in ['demo-human-blood', 'demo-human-lung']"
    run = Run(
        tmp_path,
        demo_census,
        train={"held_out": donors, "max_epochs": 1, "batch_size": 256, "num_workers": 1, "accelerator": "cpu"},
        search={"space": {"hvg.top_n_hvg": [100, 200]}, "metric": {"bio": 0.6, "batch": 0.4}},
    )
    assert run("prepare") == 0
    config = load_config(run.config)
    folder = run.path("search")
    assert stage._prepared(config, folder, {"hvg.top_n_hvg": 200}) == run.directory
    measured = []
    for number in (100, 200):
        trial = new_trial(folder, {"hvg.top_n_hvg": number}, 0, SEARCHED)
        stage._prepare_trial(config, folder, trial)
        assert stage.train_and_measure(trial) == 0
        assert trial.record is not None
        assert trial.record["counts"]["genes"] == number
        measured.append(trial.measured)
        assert trial.measured["cells"] == min(trial.record["counts"]["validation_cells"], 300)
    for each in measured:
        assert 0 < each["bio"] < 1
        assert 0 < each["batch"] < 1
        assert {score["cells"] for score in each["scores"]} == {score["cells"] for score in measured[0]["scores"]}

    capfd.readouterr()
    assert run("search", "search.gpus_per_trial=64") == 2
    assert "search.gpus_per_trial is 64, and torch finds" in capfd.readouterr().err
    assert run("search", "search.cpus_per_trial=1000") == 2
    assert "search.cpus_per_trial is 1000, and this machine has" in capfd.readouterr().err
    assert run("search", "--dry-run") == 0
    shown = capfd.readouterr().out
    assert "2 different settings of 2, 1 seed(s) each; then the best two and the default with 3 further seeds" in shown
    assert "prepare runs for 2 data sets" in shown
