"""Training: every setting takes effect, plain scvi-tools reads the model, a resumed run is the undisturbed one."""

import itertools
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scvi
import torch
import yaml
from pipeline import Run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waits import Waits

from census_scvi.cli import main
from census_scvi.config import memory
from census_scvi.config.library_arguments import MEASURED
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.kept_cells import bytes_in_memory
from census_scvi.counts.minibatch import DenseMinibatches, Minibatch
from census_scvi.counts.reader import PreparedCells, Rows
from census_scvi.errors import UserError
from census_scvi.model.build import build_model, init_arguments
from census_scvi.model.safe import ModelDescription, load_safe
from census_scvi.settings import Config, load_config
from census_scvi.stages import train
from census_scvi.terminal import progress
from census_scvi.training import cells_in_memory, checkpoint, finite_loss, fit
from census_scvi.training import progress as training_progress
from census_scvi.training.cells_in_memory import keeps_cells
from census_scvi.training.fast import negative_binomial, products
from census_scvi.training.fast import plan as fast_plan
from census_scvi.training.fast.measure import Precision
from census_scvi.training.fast.plan import FastTrainingPlan
from census_scvi.training.fast.products import Libraries
from census_scvi.training.schedule import warnings_before
from census_scvi.training.settings import TrainSection
from census_scvi.workspace.provenance import processor


@pytest.fixture(scope="module")
def prepared(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with prepare done; trained with other settings, each in a copy."""
    run = Run(tmp_path_factory.mktemp("prepared"), demo_census)
    assert run("prepare") == 0
    return run


def copy_of(prepared: Run, folder: Path, **sections: dict[str, Any]) -> Run:
    """Another run directory with the same prepared cells."""
    uri = load_config(prepared.config).census.uri
    run = Run(folder, str(uri), **sections)
    run.directory.mkdir()
    for name in ("manifest.json", "anndata_model.h5ad", "hv_genes.pkl"):
        run.path(name).write_bytes(prepared.path(name).read_bytes())
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_safe(run.path("scvi.model"))[0].module.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_plain_scvi_tools_loads_the_model(finished_run: Run) -> None:
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    model = scvi.model.SCVI.load(str(finished_run.path("scvi.model")), adata=cells)
    assert equal(model.module.state_dict(), weights(finished_run))
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_elbo())
    assert model.get_normalized_expression(indices=[0, 1], transform_batch=cells.obs["batch"].iloc[0]).shape == (2, 200)
    assert len(model.history["elbo_train"]) == 3
    assert model.summary_stats["n_cells"] == cells.n_obs


@pytest.mark.parametrize("folder", ["scvi.model", "final_scvi_optimized"])
def test_the_weights_alone_load_without_unpickling(finished_run: Run, tmp_path: Path, folder: str) -> None:
    """model.pt is scvi-tools' pickle; the weights in it, saved alone, and weights.safetensors run no code."""
    path = finished_run.path(folder) / "model.pt"
    content = torch.load(path, map_location="cpu", weights_only=False)  # as SCVI.load does
    assert content.keys() == {"model_state_dict", "var_names", "attr_dict"}
    assert list(content["var_names"]) == load_safe(finished_run.path("scvi.model"))[1].genes
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):  # history, registry: pandas, numpy
        torch.load(path, weights_only=True)
    state = {name: value for name, value in content["model_state_dict"].items() if name != "pyro_param_store"}
    torch.save(state, tmp_path / "weights.pt")
    alone = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = scvi.model.SCVI.load(str(finished_run.path(folder)), adata=None if folder != "scvi.model" else False)
    assert equal(model.module.state_dict(), alone)
    assert model.module.load_state_dict(alone)
    if folder == "scvi.model":
        assert equal(load_file(finished_run.path(folder) / "weights.safetensors"), alone)


def test_a_checkpoint_takes_no_copy_in_the_temporary_folder(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # nothing can be written there
    assert copy_of(prepared, tmp_path, train={"checkpoint_minutes": 0})("train") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_for_the_model_is_said(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path)
    real = train.save_for_scvi_tools

    def save(model: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.pt").symlink_to("/dev/full")
        real(model, folder)

    with monkeypatch.context() as planted:
        planted.setattr(train, "save_for_scvi_tools", save)
        assert run("train") == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert run("train") == 0


def test_what_a_kill_leaves_in_staging_is_not_committed(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(prepared, tmp_path)
    real = train.save_safe

    def killed(model: Any, description: Any, folder: Path) -> None:
        real(model, description, folder)
        (folder / ".tmpA1b2C3").write_bytes(b"half")  # safetensors writes beside its target and renames
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(train, "save_safe", killed)
        assert run("train") == 130
    assert run.path(".partial/train/scvi.model/.tmpA1b2C3").exists()
    assert run("train") == 0
    names = {"model.json", "model.pt", "weights.safetensors"}
    assert {path.name for path in run.path("scvi.model").iterdir()} == names
    assert run.record("train")["outputs"].keys() == {f"scvi.model/{name}" for name in names}


def test_the_registry_is_the_one_the_cells_give(finished_run: Run) -> None:
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    theirs = scvi.model.SCVI(cells).registry["field_registries"]
    ours = scvi.model.SCVI.load(str(finished_run.path("scvi.model")), adata=False).registry["field_registries"]
    assert ours["X"]["summary_stats"] == theirs["X"]["summary_stats"]
    assert ours["X"]["state_registry"]["n_obs"] == theirs["X"]["state_registry"]["n_obs"]
    assert list(ours["X"]["state_registry"]["column_names"]) == list(theirs["X"]["state_registry"]["column_names"])
    for field in ("batch", "labels"):
        mine, yours = (side[field]["state_registry"]["categorical_mapping"] for side in (ours, theirs))
        assert list(mine) == list(yours)


def test_the_safe_form_holds_no_pickle_and_gives_the_same_model(finished_run: Run) -> None:
    folder = finished_run.path("scvi.model")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.pt", "weights.safetensors"]
    model, description = load_safe(folder)
    plain = scvi.model.SCVI.load(str(folder), adata=ad.read_h5ad(finished_run.path("anndata_model.h5ad")))
    assert equal(model.module.state_dict(), plain.module.state_dict())
    assert description.organism == "homo_sapiens"
    assert description.genes == list(plain.adata.var_names)
    assert not model.module.training


@pytest.mark.parametrize("damage", ["truncate", "other genes", "no json", "newer"])
def test_a_damaged_safe_form_is_refused(finished_run: Run, tmp_path: Path, damage: str) -> None:
    for name in ("model.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((finished_run.path("scvi.model") / name).read_bytes())
    description = json.loads((tmp_path / "model.json").read_text())
    if damage == "truncate":
        weights_file = tmp_path / "weights.safetensors"
        weights_file.write_bytes(weights_file.read_bytes()[:-100])
    elif damage == "other genes":
        description["genes"] = description["genes"][:-1]
    elif damage == "newer":
        description["format"] = 99
    (tmp_path / "model.json").write_text("{" if damage == "no json" else json.dumps(description))
    with pytest.raises(UserError):
        load_safe(tmp_path)


# --- every setting takes effect


def linear_layers(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


def test_model_settings_take_effect(prepared: Run, tmp_path: Path) -> None:
    settings = {
        "n_hidden": 24, "n_latent": 7, "n_layers": 3, "dropout_rate": 0.35, "gene_likelihood": "zinb",
        "encode_covariates": True, "filename": "mine.model",
    }  # fmt: skip
    run = copy_of(prepared, tmp_path, model=settings, train={"max_epochs": 1})
    assert run("train") == 0
    module = load_safe(run.path("mine.model"))[0].module
    encoder = linear_layers(module.z_encoder.encoder)
    assert [layer.out_features for layer in encoder] == [24, 24, 24]
    assert module.z_encoder.mean_encoder.out_features == 7
    assert {layer.p for layer in module.z_encoder.modules() if isinstance(layer, torch.nn.Dropout)} == {0.35}
    assert module.gene_likelihood == "zinb"
    assert run.record("train")["engine"] == "fast"
    batches = run.record("prepare")["counts"]["batches"]
    assert encoder[0].in_features == 200 + batches  # the encoder sees the batch
    assert [layer.out_features for layer in linear_layers(module.decoder.px_decoder)] == [24, 24, 24]


def capture_fit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches scvi-tools: the Trainer's arguments, the plan, the number of steps an epoch."""
    seen: dict[str, Any] = {}
    real = fit.Trainer

    class Spy(real):  # type: ignore[misc, valid-type]
        def __init__(self, **arguments: Any) -> None:
            seen["arguments"] = arguments
            super().__init__(**arguments)

        def fit(self, plan: Any, data: PreparedDataModule, **arguments: Any) -> None:
            super().fit(plan, data, **arguments)
            seen.update(trainer=self, plan=plan, data=data, steps=self.num_training_batches)

    monkeypatch.setattr(fit, "Trainer", Spy)
    return seen


def test_train_and_plan_settings_take_effect(prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_fit(monkeypatch)
    run = copy_of(
        prepared,
        tmp_path,
        train={
            "max_epochs": 2, "batch_size": 100, "train_size": 0.8, "num_workers": 3, "accelerator": "cpu",
            "precision": "bf16", "trainer": {"gradient_clip_val": 0.5, "check_val_every_n_epoch": 2},
        },
        model={"n_layers": 2},  # in bf16 the second layer is given what is bf16 already
        training_plan={"lr": 3e-3, "n_epochs_kl_warmup": 4, "max_kl_weight": 0.7, "weight_decay": 1e-3, "eps": 0.02},
    )  # fmt: skip
    assert run("train") == 0
    n_cells = run.record("prepare")["counts"]["cells"]
    assert run.record("train")["counts"]["training_cells"] == int(np.ceil(0.8 * n_cells))
    assert run.record("train")["counts"]["epochs"] == 2
    assert seen["steps"] == int(np.ceil(np.ceil(0.8 * n_cells) / 100))
    assert seen["data"]._workers == 3
    assert seen["trainer"].gradient_clip_val == 0.5
    assert seen["arguments"]["check_val_every_n_epoch"] == 2
    assert seen["trainer"].precision == "bf16-mixed"
    optimiser = seen["trainer"].optimizers[0].param_groups[0]
    assert (optimiser["lr"], optimiser["weight_decay"], optimiser["eps"]) == (3e-3, 1e-3, 0.02)
    assert (seen["plan"].n_epochs_kl_warmup, seen["plan"].max_kl_weight) == (4, 0.7)
    assert seen["plan"].kl_weight == pytest.approx(0.7 * 2 / 4)


def test_the_seed_decides_the_weights(prepared: Run, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name] = copy_of(prepared, tmp_path / name, train={"max_epochs": 1})
        # prepare reads the seed as well: what it wrote is the same, and its record is not looked at here
        assert runs[name]("train", f"seed={seed}") == 0
    assert equal(weights(runs["a"]), weights(runs["b"]))
    assert not equal(weights(runs["a"]), weights(runs["c"]))


def test_both_engines_train_the_same_model(prepared: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(1)
    runs = [copy_of(prepared, tmp_path / engine, train={"engine": engine}) for engine in ("fast", "scvi-tools")]
    for run in runs:
        assert run("train") == 0
    assert [run.record("train")["engine"] for run in runs] == ["fast", "scvi-tools"]
    ours, theirs = (run.record("train")["learning_curves"] for run in runs)
    assert ours.keys() == theirs.keys()
    for name, curve in theirs.items():
        assert ours[name] == pytest.approx(curve, rel=1e-3, abs=1e-3), name
    assert all(torch.equal(one, other) for one, other in zip(*map(unused, runs), strict=True))
    found, expected = (as_scvi_tools_sees_it(run) for run in runs)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.allclose(ours, theirs, rtol=0.01, atol=0.01 * np.abs(theirs).max())


def as_scvi_tools_sees_it(run: Run) -> list[np.ndarray]:
    """Latent, expression and differential expression of the model, loaded by plain scvi-tools."""
    cells = ad.read_h5ad(run.path("anndata_model.h5ad"))
    model = scvi.model.SCVI.load(str(run.path("scvi.model")), adata=cells)
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    scvi.settings.seed = 0
    batches = cells.obs["batch"].cat.categories[:1].tolist()
    expression = model.get_normalized_expression(transform_batch=batches, return_numpy=True)
    half = cells.obs_names[: cells.n_obs // 2]
    difference = model.differential_expression(
        idx1=cells.obs_names.isin(half), idx2=~cells.obs_names.isin(half), mode="change", silent=True
    ).sort_index()
    return [model.get_latent_representation(), expression, difference["lfc_mean"].to_numpy()]


def unused(run: Run) -> list[torch.Tensor]:
    """What the loss does not depend on is in the model all the same, as it was initialised."""
    return [tensor for name, tensor in weights(run).items() if "l_encoder.encoder" in name or "dropout" in name]


def test_a_checkpoint_written_in_a_thread_is_of_the_step_at_which_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_on_gpu", lambda _: True)
    files, weights, curve = checkpoint.StagedIO(), torch.ones(3), [1.0]
    files.save_checkpoint({"weights": weights, "curve": curve}, tmp_path / "checkpoint.ckpt")
    weights.zero_()
    curve.append(2.0)
    files.finish()
    saved = torch.load(tmp_path / "checkpoint.ckpt")
    assert (saved["weights"].tolist(), saved["curve"]) == ([1, 1, 1], [1.0])
    files.save_checkpoint({"weights": weights}, tmp_path / "removed" / "checkpoint.ckpt")
    with pytest.raises(FileNotFoundError, match="removed"):
        files.teardown()


def test_the_plan_does_not_make_a_gpu_wait(prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    real = FastTrainingPlan.training_step

    def watched(self: FastTrainingPlan, minibatch: Any, batch_idx: int) -> torch.Tensor:
        with Waits() as waits:
            loss = real(self, minibatch, batch_idx)
        found.extend(waits.found)
        return loss

    monkeypatch.setattr(FastTrainingPlan, "training_step", watched)
    monkeypatch.setattr(negative_binomial, "compiled_kernel", lambda device: None)
    assert copy_of(prepared, tmp_path)("train") == 0
    assert found == []


def test_scvi_tools_steps_in_another_precision(prepared: Run, tmp_path: Path) -> None:
    run = copy_of(prepared, tmp_path, train={"engine": "scvi-tools", "precision": "bf16", "max_epochs": 1})
    assert run("train") == 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_early_stopping_stops(prepared: Run, tmp_path: Path) -> None:
    trainer = {"early_stopping_patience": 2, "early_stopping_min_delta": 1e9}
    run = copy_of(prepared, tmp_path, train={"max_epochs": 30, "early_stopping": True, "trainer": trainer})
    assert run("train") == 0
    assert run.record("train")["counts"]["epochs"] == 3


def test_all_cells_may_train(prepared: Run, tmp_path: Path) -> None:
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1, "train_size": 1.0})
    assert run("train") == 0
    assert run.record("train")["counts"]["validation_cells"] == 0
    assert "elbo_validation" not in run.record("train")["final_metrics"]


def test_devices_without_multi_gpu_are_said_not_to_count(
    prepared: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("census_scvi").propagate = True
    with caplog.at_level(logging.INFO):
        chosen = fit.choose_devices(load_config(prepared.config, ["train.devices=[0,1]"]).train)
    assert chosen["devices"] == 1
    assert "train.devices is [0, 1], which is used only with train.multi_gpu: true" in caplog.text


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="there are four GPUs here; CUDA_VISIBLE_DEVICES= hides them")
@pytest.mark.parametrize("settings", [["train.multi_gpu=true", "train.devices=[0,1,2,3]", "train.accelerator=auto"]])
def test_more_devices_than_there_are_is_refused(
    prepared: Run, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared("train", *settings) == 2
    assert "train.multi_gpu asks for devices [0, 1, 2, 3], but torch finds" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here; CUDA_VISIBLE_DEVICES= hides it")
def test_a_gpu_that_is_not_there_is_refused(prepared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared("train", "train.accelerator=gpu") == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here; CUDA_VISIBLE_DEVICES= hides it")
def test_a_precision_that_the_device_has_not_is_refused(prepared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--dry-run"]):
        assert prepared("train", "train.precision=fp16", *more) == 2
        assert "train.precision is fp16, which needs a GPU; set it to float32 or bf16" in capsys.readouterr().err
    assert prepared("train", "train.trainer={precision: 16-mixed}") == 2
    assert "train.trainer.precision cannot be set here; set train.precision" in capsys.readouterr().err


# --- what the libraries do not train with is known before the first minibatch

PLAN, TRAINER = "training_plan", "train.trainer"
# section, value (YAML), and what the one line must say
REFUSED = [
    # values that the libraries take without a word
    (PLAN, "{lr: 0}", "training_plan.lr is 0, expected a finite number above 0"),
    (PLAN, "{lr: -0.001}", "training_plan.lr is -0.001, expected"),
    (PLAN, "{lr: .nan}", "training_plan.lr is nan, expected a finite number above 0"),
    (PLAN, "{lr: .inf}", "training_plan.lr is inf, expected"),
    (PLAN, "{lr: null}", "training_plan.lr is null, expected"),
    (PLAN, "{n_epochs_kl_warmup: -3}", "training_plan.n_epochs_kl_warmup is -3, expected a whole number, 0 or more"),
    (PLAN, "{n_steps_kl_warmup: -1}", "training_plan.n_steps_kl_warmup is -1, expected a whole number, 0 or more"),
    (PLAN, "{weight_decay: -1.0}", "training_plan.weight_decay is -1.0, expected a finite number, 0 or more"),
    (PLAN, "{eps: 0}", "training_plan.eps is 0, expected a finite number above 0"),
    (PLAN, "{max_kl_weight: .nan}", "training_plan.max_kl_weight is nan, expected"),
    (PLAN, "{min_kl_weight: 2}", "training_plan.min_kl_weight is 2 and above training_plan.max_kl_weight, 1.0"),
    (PLAN, "{optimizer: Sgd}", "training_plan.optimizer is 'Sgd', expected one of Adam, AdamW"),
    (PLAN, "{lr_factor: 1.5}", "training_plan.lr_factor is 1.5, expected a number between 0 and 1"),
    (PLAN, "{lr_patience: -1}", "training_plan.lr_patience is -1, expected"),
    (PLAN, "{lr_scheduler_metric: elbo_valdation}", "expected one of elbo_validation, "),
    (PLAN, "{lr_scheduler_metric: elbo_valdation}", "did you mean elbo_validation?"),
    (TRAINER, "{early_stopping_monitor: nothing}", "early_stopping_monitor is 'nothing', expected one of"),
    (TRAINER, "{early_stopping_mode: up}", "train.trainer.early_stopping_mode is 'up', expected one of min, max"),
    (TRAINER, "{early_stopping_patience: -1}", "train.trainer.early_stopping_patience is -1, expected"),
    (TRAINER, "{accumulate_grad_batches: 0}", "accumulate_grad_batches is 0, expected a whole number, 1 or more"),
    (TRAINER, "{check_val_every_n_epoch: 0}", "check_val_every_n_epoch is 0, expected a whole number, 1 or more"),
    (TRAINER, "{log_every_n_steps: 0}", "log_every_n_steps is 0, expected a whole number, 1 or more"),
    (TRAINER, "{gradient_clip_val: abc}", "train.trainer.gradient_clip_val is 'abc', expected a number or null"),
    (TRAINER, "{gradient_clip_val: -1}", "train.trainer.gradient_clip_val is -1, expected a finite number, 0 or more"),
    (TRAINER, "{deterministic: maybe}", "train.trainer.deterministic is 'maybe', expected one of True, False, warn"),
    (TRAINER, "{strategy: ddp}", "train.trainer.strategy cannot be set here; set train.multi_gpu"),
    (TRAINER, "{max_epochs: 3}", "train.trainer.max_epochs cannot be set here; set train.max_epochs"),
    (TRAINER, "{callbacks: []}", "train.trainer.callbacks cannot be set here"),
    # values that a library refuses when it is given them
    (TRAINER, "{max_time: 5m}", "train.trainer.max_time is '5m': training cannot start with it"),
    (TRAINER, "{max_time: 5m}", "DD:HH:MM:SS"),
    (TRAINER, "{max_time: {hrs: 5}}", "train.trainer.max_time is {'hrs': 5}: training cannot start"),
    (TRAINER, "{max_time: {hours: 0}}", "no time to train in"),
    (TRAINER, "{profiler: mine}", "train.trainer.profiler is 'mine': training cannot start"),
    (TRAINER, "{limit_train_batches: 2.5}", "train.trainer.limit_train_batches is 2.5: training cannot start"),
    (TRAINER, "{gradient_clip_algorithm: best, detect_anomaly: true}", "gradient_clip_algorithm is 'best': training"),
    (PLAN, "{compile: true, compile_kwargs: {mode: quick}}", "compile_kwargs is {'mode': 'quick'}: training"),
    (PLAN, "{lr: 1.0e+300}", "training_plan.lr is 1e+300: training cannot start"),
    # values that a library would refuse at its first steps, in the first epoch or after it
    (TRAINER, "{val_check_interval: 1000}", "train.trainer.val_check_interval is 1000: training cannot start"),
    (TRAINER, "{limit_train_batches: 0.001}", "train.trainer.limit_train_batches is 0.001: training cannot start"),
    (TRAINER, "{limit_train_batches: 0}", "no step would be trained"),
    (TRAINER, "{max_steps: 0}", "train.trainer.max_steps is 0: training cannot start"),
    (PLAN, "{on_epoch: false}", "training_plan.on_epoch is False: training cannot start"),
    ("train", "{early_stopping: true, trainer: {limit_val_batches: 0}}", "limit_val_batches is 0: training cannot"),
    (PLAN, "{reduce_lr_on_plateau: true}\ntrain: {train_size: 1.0}", "reduce_lr_on_plateau is True: training cannot"),
    # devices
    ("train", "{devices: 0}", "train.devices is 0, expected a number of devices"),
    ("train", "{devices: [], multi_gpu: true}", "train.devices is [], expected"),
    ("train", "{devices: [0, 0], multi_gpu: true}", "train.devices is [0, 0], expected"),
    ("train", "{devices: [-1], multi_gpu: true}", "train.devices is [-1], expected"),
    ("train", "{devices: -2, multi_gpu: true}", "train.devices is -2, expected"),
    ("train", "{accelerator: mps}", "train.accelerator is mps"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "value", "said"), REFUSED, ids=[f"{case[0]}={case[1]}" for case in REFUSED])
def test_what_cannot_be_trained_is_one_line_before_the_first_minibatch(
    section: str, value: str, said: str, prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if value == "{accelerator: mps}" and torch.backends.mps.is_available():
        pytest.skip("torch finds such a GPU here: the setting is no mistake; run the test on another machine")
    *folders, key = section.split(".")
    given = "".join(f"{folder}: {{" for folder in folders) + f"{key}: {value}" + "}" * len(folders)
    settings = yaml.safe_load(given)
    config = {**yaml.safe_load(prepared.config.read_text()), "training_plan": {}}
    config |= {name: {**config.get(name, {}), **values} for name, values in settings.items()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    before = sorted(prepared.directory.rglob("*"))
    for more in (["--force"], ["--dry-run"]):
        assert main("train", ["--config", str(path), *more]) == 2
        out, err = capsys.readouterr()
        (error,) = (line for line in err.splitlines() if "which is used only with" not in line)
        assert error.startswith("error: ")
        assert said in error
        assert not out
    first = {prepared.path(".partial"), prepared.path(".partial/first-process.json")}  # of several, for the others
    assert set(prepared.directory.rglob("*")) - first == set(before) - first


def test_what_lightning_refuses_within_a_training_is_one_line(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "check_arguments", lambda *_: None)
    run = copy_of(prepared, tmp_path, train={"trainer": {"val_check_interval": 1000}})
    assert run("train") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: Lightning stopped the training (`val_check_interval` (1000) must be less than")
    assert "it was given train.trainer: {'val_check_interval': 1000}" in error


TRAINS = [
    {"trainer": {"max_time": "00:01:00:00", "val_check_interval": 0.5, "num_sanity_val_steps": None}},
    {"trainer": {"limit_train_batches": 0.5, "log_every_n_steps": 1, "check_val_every_n_epoch": 5, "max_steps": 10**9}},
    {"trainer": {"early_stopping_monitor": "validation_loss", "profiler": "simple"}, "early_stopping": True},
    {"max_epochs": 10**30, "trainer": {"max_steps": 2}},
]  # fmt: skip


@pytest.mark.parametrize("settings", TRAINS, ids=[str(number) for number in range(len(TRAINS))])
def test_unusual_settings_that_the_libraries_take_train(
    settings: dict[str, Any], prepared: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1, **settings})
    assert run("train") == 0
    assert not equal(weights(run), untrained(run))


def untrained(run: Run) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    description = load_safe(run.path("scvi.model"))[1]
    return build_model(description.genes, description.batches, description.arguments).module.state_dict()


def test_what_may_be_monitored_is_what_training_measures(finished_run: Run) -> None:
    measured = finished_run.record("train")["learning_curves"].keys()
    assert set(MEASURED) == {name for name in measured if not name.startswith("lr-")}


def test_a_warm_up_by_steps_counts_without_the_epochs(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = capture_fit(monkeypatch)
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1}, training_plan={"n_steps_kl_warmup": 10})
    assert run("train", "training_plan={lr: 0.001, n_steps_kl_warmup: 10}") == 0
    assert (seen["plan"].n_epochs_kl_warmup, seen["plan"].n_steps_kl_warmup) == (None, 10)
    assert seen["plan"].kl_weight == pytest.approx(seen["steps"] / 10)


# --- settings that train too little are said before

FEW = "913 training cells in minibatches of 1,024 for 100 epochs are 100 optimiser steps, but a model needs at least"


@pytest.mark.parametrize(
    ("settings", "plan", "n_train", "processes", "said"),
    [
        ({}, {"n_epochs_kl_warmup": 20}, 913, 1, [FEW, "try train.batch_size=128 train.max_epochs=400"]),
        ({"max_epochs": 400, "batch_size": 128}, {}, 913, 1, []),
        ({"max_epochs": 100}, {"n_epochs_kl_warmup": 20}, 10_262, 1, []),  # blood.yaml: 1,100 steps
        ({"max_epochs": 100}, {"n_epochs_kl_warmup": 20}, 10_262, 2, ["are 600 optimiser steps"]),
        ({"max_epochs": 8}, {"n_epochs_kl_warmup": 4}, 90_000_000, 4, []),
        ({"max_epochs": 1}, {"n_epochs_kl_warmup": 0}, 900_000, 1, ["train.batch_size=128 train.max_epochs=9"]),
        ({"trainer": {"accumulate_grad_batches": 100}}, {"n_epochs_kl_warmup": 20}, 90_000, 1, ["are 100 optimiser"]),
        ({"trainer": {"max_steps": 50}}, {"n_epochs_kl_warmup": 20}, 90_000, 1, ["are 50 optimiser steps"]),
        ({}, {}, 90_000, 1, ["after 400 epochs, but training ends after 100, at 25% of it"]),
        ({}, {}, 90_000, 1, ["try training_plan.n_epochs_kl_warmup=25"]),
        ({}, {"n_steps_kl_warmup": 10_000}, 90_000, 1, ["after 10,000 steps, but training ends after 8,800"]),
        ({}, {"n_epochs_kl_warmup": None}, 90_000, 1, []),
    ],
)  # fmt: skip
def test_a_training_that_is_too_short_is_said(
    settings: dict[str, Any], plan: dict[str, Any], n_train: int, processes: int, said: list[str]
) -> None:
    found = warnings_before(TrainSection(**settings), plan, n_train, processes)
    assert len(found) == bool(said)
    assert all(words in found[0] for words in said)


def test_the_warning_comes_before_training_and_in_the_plan(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_SAMPLE_SECONDS", 0.1)
    run = copy_of(prepared, tmp_path)
    assert run("train") == 0
    lines = capsys.readouterr().err.splitlines()
    (warning,) = (number for number, line in enumerate(lines) if "optimiser steps" in line)
    assert warning < next(number for number, line in enumerate(lines) if "epoch 1/3" in line)
    assert run("train", "--dry-run") == 0
    assert (
        "note   warning: 1,242 training cells in minibatches of 256 for 3 epochs are 15 optimiser"
        in capsys.readouterr().out
    )


CHOICES = {"torch": Libraries(), "onednn": Libraries("onednn", "onednn", "onednn", counts="sparse")}


def choosing(monkeypatch: pytest.MonkeyPatch, library: str) -> list[str]:
    """Let the measurement find this library faster, with oneDNN sparse counts too; returns a line a measurement."""
    measured: list[str] = []
    monkeypatch.setattr(fast_plan, "faster_libraries", lambda *_: measured.append(library) or CHOICES[library])
    return measured


def test_a_resumed_run_multiplies_with_the_library_that_it_began_with(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    settings = {**RESUMABLE, "train": {**RESUMABLE["train"], "checkpoint_minutes": 0}}
    undisturbed, stopped, other = (copy_of(prepared, tmp_path / name, **settings) for name in "abc")
    used: set[str] = set()
    real = products.times_transposed
    monkeypatch.setattr(products, "times_transposed", lambda library, *more: used.add(library) or real(library, *more))
    measured = choosing(monkeypatch, "onednn")
    assert undisturbed("train") == 0
    stop_in(stopped, 1, 1, monkeypatch)
    assert measured == ["onednn"] * 2
    measured = choosing(monkeypatch, "torch")
    products.use(Libraries())  # a new process
    used.clear()
    assert stopped("train") == 0
    assert (measured, used) == ([], {"onednn"})
    assert equal(weights(undisturbed), weights(stopped))
    used.clear()
    assert other("train") == 0
    assert (measured, used) == (["torch"], {"torch"})
    for run, library in ((undisturbed, "onednn"), (stopped, "onednn"), (other, "torch")):
        assert run.record("train")["libraries"] == asdict(CHOICES[library])
    # The choice belongs to the machine, not to the settings: the finished run is still that of its config.
    assert undisturbed("train") == 0
    assert measured == ["torch"]


@pytest.mark.parametrize(
    ("saved", "used"),
    [
        (None, Libraries("onednn", "onednn", "onednn")),
        (dict.fromkeys(("forward", "input_gradient", "weight_gradient"), "torch"), Libraries()),
    ],
    ids=["before there was a choice", "before there were sparse products"],
)
def test_a_training_resumed_from_an_older_checkpoint_multiplies_as_it_began(
    prepared: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: dict[str, str] | None,
    used: Libraries,
) -> None:
    run = copy_of(prepared, tmp_path)
    choosing(monkeypatch, "onednn")
    stop_in(run, 1, 0, monkeypatch)
    path = run.path(".partial/train/checkpoint.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["libraries"]
    if saved:
        checkpoint["libraries"] = saved
    torch.save(checkpoint, path)
    measured = choosing(monkeypatch, "onednn")
    assert run("train") == 0
    assert (measured, run.record("train")["libraries"]) == ([], asdict(used))


@pytest.mark.parametrize("settings", [{"engine": "scvi-tools"}, {"precision": "bf16"}])
def test_where_torch_alone_multiplies_nothing_is_measured(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    measured = choosing(monkeypatch, "onednn")
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1, **settings})
    assert run("train") == 0
    assert (measured, run.record("train")["libraries"]) == ([], None)


def test_a_precision_that_is_slower_here_than_float32_is_refused_before_training(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path, train={"checkpoint_minutes": 0, "precision": "bf16"})
    for reduced, code in ((12.835, 2), (0.1, 0)):
        monkeypatch.setattr(fit, "measure_precision", lambda *_, reduced=reduced: Precision(0.724, reduced))
        for more in (["--dry-run"], []):
            assert run("train", *more) == code
            error = capsys.readouterr().err
            if code:
                assert not run.directory.joinpath(".partial").exists()
                assert error.splitlines()[-1] == (
                    f"error: train.precision is bf16, but it is slower on this processor ({processor()}): 12,835 ms for"
                    " matrix products of this model, 724 ms in float32; set it to float32"
                )
    monkeypatch.setattr(fit, "measure_precision", lambda *_: Precision(0.724, 12.835))
    assert run("train", "train.precision=float32", "--force") == 0  # nothing is measured for it
    resumed = copy_of(prepared, tmp_path / "resumed", train={"checkpoint_minutes": 0, "precision": "bf16"})
    with monkeypatch.context() as before:
        before.setattr(fit, "measure_precision", lambda *_: None)
        stop_in(resumed, 1, 0, monkeypatch)
    capsys.readouterr()
    assert resumed("train") == 0  # on another machine: said, for it cannot be changed any more
    assert "12,835 ms for matrix products" in capsys.readouterr().err


BF16 = """
import sys
import torch
from census_scvi.settings import load_config
from census_scvi.training.fit import slow_precision

settings = load_config(sys.argv[1], ["train.precision=bf16"]).train
print(torch.backends.cpu.get_cpu_capability(), slow_precision(settings, 2000, 128))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"), reason="needs a processor with AVX2"
)
def test_without_instructions_for_bf16_it_is_measured_to_be_slower(prepared: Run) -> None:
    """The libraries kept from the newer instructions of this processor."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BF16, str(prepared.config)],
        env=os.environ | limits | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.fullmatch(r"AVX2 .*\): ([\d,]+) ms for .* model, ([\d,]+) ms in float32; .*", done.stdout.strip())
    assert found, done.stdout
    reduced, float32 = (int(number.replace(",", "")) for number in found.groups())
    assert reduced > 2 * float32


# --- what training does to the cells


def test_a_tail_of_one_cell_trains(prepared: Run, tmp_path: Path) -> None:
    n_cells = prepared.record("prepare")["counts"]["cells"]
    run = copy_of(prepared, tmp_path, train={"train_size": 1.0, "max_epochs": 1, "batch_size": n_cells - 1})
    assert run("train") == 0


def test_cells_without_counts_train_and_embed_without_nan(demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, hvg={"top_n_hvg": 2}, train={"max_epochs": 2}).all()
    assert run.record("prepare")["counts"]["cells_without_counts"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert np.isfinite(np.load(run.path("latent.npy"))).all()


def test_each_training_cell_once_an_epoch_with_its_own_counts(finished_run: Run) -> None:
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    data = PreparedDataModule(
        finished_run.path("anndata_model.h5ad"), batch_size=100, train_size=0.9, seed=0, workers=2
    )
    rows = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for minibatch in loader:
            row = minibatch["row"].numpy()
            rows += row.tolist()
            assert np.array_equal(minibatch["X"].numpy(), cells.X[row].toarray())
            assert np.array_equal(minibatch["batch"].numpy().ravel(), cells.obs["batch"].cat.codes.to_numpy()[row])
    assert sorted(rows) == list(range(cells.n_obs))


# --- training mode


@pytest.mark.parametrize("engine", ["fast", "scvi-tools"])
def test_a_second_training_runs_in_training_mode(finished_run: Run, tmp_path: Path, engine: str) -> None:
    config = load_config(
        finished_run.config, ["train.max_epochs=1", "model.dropout_rate=0.5", f"train.engine={engine}"]
    )
    model, _ = load_safe(finished_run.path("scvi.model"))  # loaded: in eval mode
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    modes = []
    (dropout,) = (layer for layer in model.module.z_encoder.modules() if isinstance(layer, torch.nn.Dropout))
    dropout.register_forward_pre_hook(lambda layer, _: modes.append((layer.training, torch.is_grad_enabled())))
    for attempt in ("first", "second"):
        data = PreparedDataModule(
            finished_run.path("anndata_model.h5ad"), batch_size=256, train_size=0.9, seed=0, workers=0
        )
        fit.fit(
            model,
            data,
            config.train,
            {},
            seed=0,
            checkpoint=tmp_path / f"{attempt}.ckpt",
            tensorboard=tmp_path / attempt,
        )
    assert {training_mode for training_mode, gradients in modes if gradients} == {True}
    assert {training_mode for training_mode, gradients in modes if not gradients} == {False}  # validation
    moved = model.module.state_dict()
    name = next(name for name in moved if name.endswith("running_mean"))
    assert not torch.equal(before[name], moved[name])  # BatchNorm is not frozen


def test_training_gives_its_minibatches_back(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, make = [], DenseMinibatches.make

    def noted(self: DenseMinibatches, parts: list[Rows]) -> Minibatch:
        minibatch = make(self, parts)
        places.append(minibatch["X"].data_ptr())
        return minibatch

    monkeypatch.setattr(DenseMinibatches, "make", noted)
    config = load_config(finished_run.config, ["train.max_epochs=3", "train.engine=scvi-tools"])
    path = finished_run.path("anndata_model.h5ad")
    data = PreparedDataModule(path, batch_size=128, train_size=0.9, seed=0, workers=1)
    model, _ = load_safe(finished_run.path("scvi.model"))
    fit.fit(model, data, config.train, {}, seed=0, checkpoint=tmp_path / "ckpt", tensorboard=tmp_path / "logs")
    a_pass = len(data.train_dataloader()) + len(data.val_dataloader())
    assert len(places) >= 3 * a_pass > 20
    assert len(set(places)) <= 4  # of 128 cells, and the last of training and of validation


# --- TensorBoard


def test_tensorboard_has_the_curves(finished_run: Run) -> None:
    (folder,) = finished_run.path("tb_logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"train_loss_epoch", "train_loss", "validation_loss", "elbo_train", "elbo_validation", "kl_local_train",
              "reconstruction_loss_train", "reconstruction_loss_validation", "kl_local_validation"}  # fmt: skip
    assert wanted - {"train_loss_epoch"} <= tags
    assert any(tag.startswith("lr") for tag in tags)
    assert len(events.Scalars("elbo_validation")) == 3
    assert {"cells_per_second", "minutes_left", "process_memory_gb"} <= tags
    assert all(event.value > 0 for event in events.Scalars("cells_per_second"))
    minutes = [event.value for event in events.Scalars("minutes_left")]
    assert minutes[-1] == 0 < minutes[0]


def test_a_log_tells_the_pace(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: False)  # another test may have run one in this process
    lines = {}
    for seconds in (600, 0):  # with the latter a line a minibatch
        monkeypatch.setattr(training_progress, "_SECONDS_BETWEEN_LINES", seconds)
        run = copy_of(prepared, tmp_path / str(seconds), train={"max_epochs": 2})
        assert run("train") == 0
        lines[seconds] = [line for line in capsys.readouterr().err.splitlines() if "cells/s" in line]
    assert re.search(r"epoch 1/2  elbo_train [\d.]+  elbo_validation [\d.]+  [\d,]+ cells/s", lines[600][0])
    assert re.search(r"epoch 1/2  \d+\.\d%  [\d,]+ cells/s", lines[0][0])


# --- failures


def test_a_loss_that_is_not_finite_stops_with_step_batch_and_advice(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path, training_plan={"lr": 1e30}, train={"max_epochs": 5})
    assert run("train") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss is nan at step ")
    assert "minibatch" in error
    assert "lower training_plan.lr" in error
    assert not run.path("scvi.model").exists()


@pytest.mark.parametrize("engine", ["fast", "scvi-tools"])
def test_gradients_that_are_not_finite_stop_at_their_own_step(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    real = ModelDescription.build
    steps = itertools.count()

    def build(description: ModelDescription) -> Any:
        model = real(description)
        model.module.z_encoder.mean_encoder.weight.register_hook(
            lambda gradient: gradient * (math.nan if next(steps) == 3 else 1)
        )
        return model

    monkeypatch.setattr(ModelDescription, "build", build)
    run = copy_of(prepared, tmp_path, train={"engine": engine, "checkpoint_minutes": 0})
    assert run("train") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: the loss is [\d.]+, but its gradients are not finite at step 4 \(epoch 1, minibatch 4", error
    )
    assert "check row" in error
    saved = torch.load(run.path(".partial/train/checkpoint.ckpt"), weights_only=True)
    assert saved["global_step"] == 3  # the last valid one
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values())


RESUMABLE: dict[str, Any] = {"train": {"max_epochs": 4}, "model": {"dropout_rate": 0.3}}


@pytest.fixture(scope="module")
def undisturbed(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    run = copy_of(prepared, tmp_path_factory.mktemp("undisturbed"), **RESUMABLE)
    assert run("train") == 0
    return run


def stop_in(run: Run, epoch: int, minibatch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the end of that minibatch, before anything is saved of it."""

    def stop(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (epoch, minibatch):
            raise InterruptedError

    with monkeypatch.context() as planted:
        planted.setattr(finite_loss.FiniteLoss, "on_train_batch_end", stop)
        run("train")
    assert not run.path("scvi.model").exists()


def trained_for(path: Path, seconds: float, cpu_seconds: float) -> None:
    """Change the time of training that a checkpoint has, after a check that it is plausible."""
    saved = torch.load(path, weights_only=True)
    (name,) = (name for name in saved["callbacks"] if name.startswith("LearningCurves"))
    assert all(0 < spent < 200 for spent in saved["callbacks"][name]["spent"])
    saved["callbacks"][name]["spent"] = [seconds, cpu_seconds]
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("minutes", "share", "epoch", "minibatch", "first"),
    [
        pytest.param(10, 1e9, 3, 2, (3, 0), id="epochs only"),
        pytest.param(10, 1e-9, 3, 2, (1, 0), id="epochs that are short compared with a checkpoint"),
        pytest.param(0, 1e-9, 3, 2, (3, 2), id="within an epoch"),
        pytest.param(0, 0.05, 0, 1, (0, 1), id="in the first epoch"),
        pytest.param(0, 0.05, 1, -1, (1, -1), id="before the last minibatch"),
        pytest.param(0, 0.05, 2, 0, (2, 0), id="at an epoch's start"),
    ],
)
def test_a_stopped_run_goes_on_to_the_weights_and_curves_of_an_undisturbed_one(
    minutes: float,
    share: float,
    epoch: int,
    minibatch: int,
    first: tuple[int, int],
    prepared: Run,
    undisturbed: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_minibatches = -(-undisturbed.record("train")["counts"]["training_cells"] // 256)
    minibatch, first = minibatch % n_minibatches, (first[0], first[1] % n_minibatches)
    torch.set_num_threads(1)
    settings = {**RESUMABLE, "train": {**RESUMABLE["train"], "checkpoint_minutes": minutes}}
    stopped = copy_of(prepared, tmp_path, **settings)
    monkeypatch.setattr(checkpoint, "_SHARE", share)
    stop_in(stopped, epoch, minibatch, monkeypatch)
    trained_for(stopped.path(".partial/train/checkpoint.ckpt"), 1000.0, 500.0)
    torch.manual_seed(12345)  # a new process has another random state
    steps = []
    real = finite_loss.FiniteLoss.on_train_batch_start

    def note(self: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        steps.append((trainer.current_epoch, batch_idx))
        real(self, trainer, module, batch, batch_idx)

    monkeypatch.setattr(finite_loss.FiniteLoss, "on_train_batch_start", note)
    assert stopped("train") == 0
    assert steps[0] == first
    assert equal(weights(undisturbed), weights(stopped))
    ours, theirs = (run.record("train")["learning_curves"] for run in (undisturbed, stopped))
    assert ours == theirs
    assert stopped.record("train")["resumed"]
    assert 1000 < stopped.record("train")["seconds"] < 1100
    assert 500 < stopped.record("train")["cpu_seconds"] < 600


def test_accumulated_gradients_survive_a_stop(prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    settings = {
        "train": {
            "max_epochs": 2,
            "batch_size": 128,
            "trainer": {"accumulate_grad_batches": 3},
            "checkpoint_minutes": 0,
        }
    }
    runs = [copy_of(prepared, tmp_path / name, **settings) for name in ("undisturbed", "stopped")]
    stop_in(runs[1], 1, 5, monkeypatch)
    for run in runs:
        assert run("train") == 0
    assert equal(*map(weights, runs))


def test_a_checkpoint_of_other_processes_is_refused(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path)
    stop_in(run, 1, 0, monkeypatch)
    path = run.path(".partial/train/checkpoint.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["processes"] *= 4
    torch.save(checkpoint, path)
    assert run("train") == 2
    assert "was written by 4 process(es), and now there are 1" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_said(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path)
    with monkeypatch.context() as planted:
        planted.setattr(train, "_save", lambda *_: 1 / 0)
        assert run("train") == 1
    checkpoint = run.path(".partial/train/checkpoint.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    assert run("train") == 2
    assert "checkpoint.ckpt is damaged; start again with --force" in capsys.readouterr().err
    assert run("train", "--force") == 0


def test_training_again_skips_and_force_replaces(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1})
    assert run("train") == 0
    finished = run.record("train")["finished"]
    assert run("train") == 0
    assert "train is done for these settings" in capsys.readouterr().err
    assert run("train", "train.max_epochs=2") == 2
    assert "train.max_epochs was 1 and is 2" in capsys.readouterr().err
    assert run.record("train")["finished"] == finished
    assert run("train", "train.max_epochs=2", "--force") == 0
    assert run.record("train")["counts"]["epochs"] == 2


def test_cells_in_memory_give_the_same_model(prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {}
    for in_memory in ("true", "false", "auto"):
        runs[in_memory] = copy_of(prepared, tmp_path / in_memory)
        assert runs[in_memory]("train", f"train.cells_in_memory={in_memory}") == 0
        decoded = f"{runs[in_memory].record('prepare')['counts']['cells']:,} cells decoded into memory: "
        assert (decoded in capsys.readouterr().err) == (in_memory == "true")  # auto: not on a CPU
    assert equal(weights(runs["true"]), weights(runs["false"]))


def test_auto_keeps_the_cells_of_a_training_on_a_gpu_that_take_a_quarter_of_the_free_memory(
    prepared: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = PreparedCells(prepared.path("anndata_model.h5ad"))
    settings = Config().train
    needed = bytes_in_memory(cells)
    for gpu, free, epochs, kept in ((1, 4.1, 2, True), (1, 3.9, 2, False), (1, 4.1, 1, False), (0, 4.1, 2, False)):
        monkeypatch.setattr(cells_in_memory, "on_gpu", lambda _, gpu=gpu: bool(gpu))
        monkeypatch.setattr(cells_in_memory, "free_memory", lambda free=free: free * needed)
        assert keeps_cells(settings.model_copy(update={"max_epochs": epochs}), cells) == kept
    assert keeps_cells(settings.model_copy(update={"cells_in_memory": True}), cells)


def test_free_memory_heeds_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory()
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_own_group", lambda: tmp_path)
    for limit, expected in (("100000000", 60_000_000), ("10000000", 0), ("max", None)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("40000000\n")
        assert memory.free_memory() == expected if expected is not None else memory.free_memory() > 100_000_000


def test_dry_run_samples_the_steps_in_their_precision(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SAMPLE_SECONDS", 0.1)
    seen = set()
    real = FastTrainingPlan.training_step

    def step(self: FastTrainingPlan, minibatch: Any, batch_idx: int) -> torch.Tensor | None:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return real(self, minibatch, batch_idx)

    monkeypatch.setattr(FastTrainingPlan, "training_step", step)
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        assert prepared("train", "--dry-run", f"train.precision={precision}", "model.n_layers=2") == 0
        assert seen == {dtype}


def test_a_run_older_than_a_setting_did_what_the_setting_does_by_default(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path, train={"max_epochs": 1})
    assert run("train") == 0
    manifest = run.manifest()
    del manifest["stages"]["train"]["fingerprint"]["config"]["train.precision"]
    run.path("manifest.json").write_text(json.dumps(manifest))
    assert run("train") == 0
    assert "train is done for these settings" in capsys.readouterr().err
    assert run("train", "train.precision=bf16") == 2
    assert 'train.precision was "float32" and is "bf16"' in capsys.readouterr().err


@pytest.mark.parametrize(("likelihood", "engine"), [("nb", "fast"), ("poisson", "scvi-tools")])
def test_dry_run_of_train(prepared: Run, capsys: pytest.CaptureFixture[str], likelihood: str, engine: str) -> None:
    before = sorted(prepared.directory.iterdir())
    assert prepared("train", "--dry-run", f"model.gene_likelihood={likelihood}") == 0
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert "scvi.model/" in out
    assert f"steps by train.engine {engine}" in out
    said = err.count("does not support this model (gene_likelihood is poisson): scvi-tools' own steps are used")
    assert said == (likelihood == "poisson")
    assert sorted(prepared.directory.iterdir()) == before


def test_the_model_equals_one_that_scvi_tools_builds(prepared: Run) -> None:
    config = load_config(prepared.config)
    cells = ad.read_h5ad(prepared.path("anndata_model.h5ad"))
    torch.manual_seed(7)
    ours = build_model(list(cells.var_names), list(cells.obs["batch"].cat.categories), init_arguments(config.model))
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    torch.manual_seed(7)
    theirs = scvi.model.SCVI(cells, **init_arguments(config.model))
    assert equal(ours.module.state_dict(), theirs.module.state_dict())


def test_counts_changed_after_prepare_are_refused(
    prepared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(prepared, tmp_path)
    path = run.path("anndata_model.h5ad")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run("train") == 2
    assert "anndata_model.h5ad has changed since it was written by scvi-prepare.py" in capsys.readouterr().err
    path.write_bytes(data[:1000])
    assert run("train") == 2
    assert "has 1,000 bytes, expected" in capsys.readouterr().err
    path.unlink()
    assert run("train") == 2
    assert "is missing" in capsys.readouterr().err


def test_train_before_prepare(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(tmp_path, demo_census)("train") == 2
    assert "anndata_model.h5ad does not exist; run scvi-prepare.py first" in capsys.readouterr().err


def test_no_stage_needs_the_pickle(finished_run: Run, tmp_path: Path) -> None:
    """model.pt is an export: without it, and with something else under its name, the model is the same."""
    for name in ("model.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((finished_run.path("scvi.model") / name).read_bytes())
    assert equal(load_safe(tmp_path)[0].module.state_dict(), weights(finished_run))
    (tmp_path / "model.pt").write_bytes(b"no pickle")
    assert equal(load_safe(tmp_path)[0].module.state_dict(), weights(finished_run))
