"""Stage train: trains the model on the prepared cells."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import scvi
import torch
from scvi.train import TrainingPlan

from census_scvi.config.flat import digest
from census_scvi.config.run_names import CHECKPOINT, PROGRESS
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.kept_cells import bytes_in_memory
from census_scvi.counts.loader import MOST_KEPT
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove
from census_scvi.fine_tuning.seen_cells import LINEAGE_CELLS
from census_scvi.fine_tuning.settings import RETRAIN
from census_scvi.fine_tuning.start import (
    FineTuned,
    changed,
    lineage_record,
    load_for_fine_tuning,
    start_from,
)
from census_scvi.model.build import init_arguments
from census_scvi.model.families import SCANVI, TOTALVI
from census_scvi.model.safe import ModelDescription, save_for_scvi_tools, save_safe
from census_scvi.settings import Config
from census_scvi.stages.plan import Cost, Plan, human_bytes
from census_scvi.stages.protocol import Task
from census_scvi.training.callbacks import LearningCurves
from census_scvi.training.cells_in_memory import keeps_cells
from census_scvi.training.fast import products
from census_scvi.training.fast.measure import faster_libraries, shape_of
from census_scvi.training.fit import (
    check_arguments,
    choose_devices,
    choose_precision,
    engine_of,
    fit,
    loader_threads,
    local_processes,
    n_processes,
    slow_precision,
)
from census_scvi.training.initial import set_protein_priors, start_from_scvi_model
from census_scvi.training.pace import seconds_per_cell
from census_scvi.training.plans import make_plan, plan_arguments
from census_scvi.training.schedule import warnings_before
from census_scvi.workspace import StageRun, Workspace

log = logging.getLogger(__name__)

# Constants for --dry-run, checked by benchmarks/stages.py: memory of the imports; fixed time; bytes per entry (cell x
# gene) of a minibatch.
_BASE_MEMORY, _FIXED_SECONDS = 0.75e9, 3.0
_BYTES_AN_ENTRY = {"fast": 45.0, "scvi-tools": 140.0}
_SAMPLE_SECONDS = 5.0


def run(task: Task) -> None:
    """Train and write `scvi.model/`; a killed run resumes from its last checkpoint."""
    config, artifacts, stage = task.config.tuned, task.artifacts, task.run
    choose_devices(config.train)
    choose_precision(config.train)
    data = _data(config)
    check_arguments(config.train, config.training_plan, data, config.model.kind)
    slow = slow_precision(config.train, data.cells.n_genes, config.model.n_hidden)
    if slow and not stage.resumed:
        raise UserError(slow)
    model, description, tuning = _build(config, data)
    task.start()
    if stage.resumed:
        log.info("resuming from the last checkpoint")
    if slow:
        log.warning("warning: %s, and run it with --force to start again", slow)
    for problem in _problems(config, data):
        log.warning("warning: %s", problem)
    if tuning is not None and tuning.untrained:
        log.warning("fine_tune.mode %s trains nothing: %s", config.fine_tune.mode, tuning.untrained)
        curves = LearningCurves("none")
    else:
        curves = _fit(config, model, data, stage.staging, digest(stage.staged_fingerprint))
    stage.earlier = curves.earlier
    if tuning is not None:
        model = _finish_fine_tuning(config, tuning, model, data, curves)
    _save(config, model, description, curves, stage)
    counts = _counts(model, data, curves)
    data.cells.close()
    task.commit(
        [artifacts.model],
        counts,
        engine=curves.engine,
        processes=curves.processes,
        libraries=curves.libraries,
        final_metrics=_final(curves),
        learning_curves=curves.curves,
    )
    losses = ", ".join(f"{name} {value:.1f}" for name, value in _final(curves).items()) or "no training"
    log.info("wrote %s after %d epochs: %s", task.directory / artifacts.model, counts["epochs"], losses)


def follow(config: Config, stage: StageRun) -> None:
    """Train in a process of rank above 0; rank 0 manages the run directory."""
    config = config.tuned
    data = _data(config)
    model, _, tuning = _build(config, data)
    if tuning is not None and tuning.untrained:
        return
    _fit(config, model, data, stage.staging, digest(stage.staged_fingerprint))


def _data(config: Config) -> PreparedDataModule:
    data = PreparedDataModule(
        config.directory / config.artifacts.prepared,
        batch_size=config.train.batch_size,
        train_size=config.train.train_size,
        seed=config.seed,
        workers=loader_threads(config.train),
        labels=config.model.kind == SCANVI,
        proteins=config.model.kind == TOTALVI,
        n_samples_per_label=config.train.n_samples_per_label,
        held_out=config.train.held_out,
        split_seed=config.train.split_seed,
        max_cells=config.train.max_cells,
    )
    data.in_memory = keeps_cells(config.train, data.cells)
    if config.train.early_stopping and not data.n_val:
        raise UserError(f"train.early_stopping needs validation cells, but all {data.n_train} cells are for training")
    return data


def _problems(config: Config, data: PreparedDataModule) -> list[str]:
    if config.fine_tune.model is not None:  # the model is trained already
        return []
    plan = plan_arguments(config.training_plan, config.model.kind, data.cells.n_cells)
    return warnings_before(config.train, plan, data.n_train, n_processes(config.train))


def _build(config: Config, data: PreparedDataModule) -> tuple[scvi.model.SCVI, ModelDescription, FineTuned | None]:
    """The model before the training, its description, and the fine-tuning if it is one."""
    lightning.seed_everything(config.seed, verbose=False)
    if config.fine_tune.model is not None:
        tuning = _start_fine_tuning(config, data)
        if config.fine_tune.mode == RETRAIN:
            return tuning.model, replace(tuning.description, lineage=[]), None
        return tuning.model, tuning.description, tuning
    description = _describe(config, data.cells)
    model = description.build()
    if description.proteins:
        set_protein_priors(model, data.cells, description)
    if config.model.from_scvi_model is not None:
        description.lineage.append(start_from_scvi_model(model, description, config.model.from_scvi_model))
    return model, description, None


def _start_fine_tuning(config: Config, data: PreparedDataModule) -> FineTuned:
    """The model `fine_tune.model`, extended by the batches of the prepared cells."""
    settings, batch_key = config.fine_tune, config.anndata.batch_key
    before = load_for_fine_tuning(settings, config.model, config.census.organism, batch_key)
    tuning = start_from(settings, before, data.cells, config.seed)
    prepared = Workspace(config.directory).record("prepare") or {}
    record = lineage_record(settings, before, prepared.get(LINEAGE_CELLS, []))
    cells = {name: prepared.get("counts", {}).get(name) for name in ("new_cells", "replayed_cells")}
    tuning.description.lineage.append(record | cells)
    return tuning


def _finish_fine_tuning(
    config: Config, tuning: FineTuned, trained: scvi.model.SCVI, data: PreparedDataModule, curves: LearningCurves
) -> scvi.model.SCVI:
    """The fine-tuned model, in the form of any other; its description records what has changed."""
    trained.to_device("cpu")
    model = tuning.description.build()
    model.module.load_state_dict(trained.module.state_dict())
    model.module.eval()
    model.is_trained_ = True
    moved = changed(tuning, model, config.fine_tune, data.cells)
    epochs = len(curves.curves.get("elbo_train", []))
    tuning.description.lineage[-1] |= {"epochs": epochs, "lr": config.training_plan["lr"], "moved": moved}
    log.info(
        "the embedding of the model's own cells moved by %.3g on average (%s; mean distance from their center: %.3g)",
        moved["mean"],
        f"{moved['cells']:,} cells of the {moved['source']}",
        moved["scale"],
    )
    return model


def _describe(config: Config, cells: PreparedCells) -> ModelDescription:
    description = ModelDescription(
        genes=cells.genes,
        batches=cells.batches,
        arguments=init_arguments(config.model),
        organism=config.census.organism,
        batch_key=config.anndata.batch_key,
        n_cells=cells.n_cells,
        symbols=cells.symbols,
        model=config.model.kind,
    )
    if config.model.kind == SCANVI:
        *classes, unlabeled = cells.labels
        if len(classes) < 2:
            raise UserError(
                f"{cells.path} has {len(classes)} labels (anndata.labels_key: {config.anndata.labels_key}), and SCANVI"
                " needs two or more: choose another column, or set model.kind to SCVI"
            )
        return replace(
            description, labels=classes, labels_key=str(config.anndata.labels_key), unlabeled_category=unlabeled
        )
    if config.model.kind == TOTALVI:
        return replace(description, proteins=cells.proteins, missing_proteins=cells.missing_proteins())
    return description


def _fit(
    config: Config, model: scvi.model.SCVI, data: PreparedDataModule, staging: Path, run_id: str
) -> LearningCurves:
    return fit(
        model,
        data,
        config.train,
        config.training_plan,
        seed=config.seed,
        checkpoint=staging / CHECKPOINT,
        progress=staging / PROGRESS,
        # One folder per fingerprint: a resumed run continues its curves, and another run adds separate ones.
        tensorboard=config.directory / config.artifacts.tensorboard / run_id[:12],
    )


def _save(
    config: Config, model: scvi.model.SCVI, description: ModelDescription, curves: LearningCurves, stage: StageRun
) -> None:
    """Write the model in scvi-tools' format and in the safe form, in one folder."""
    folder = stage.path(config.artifacts.model)
    remove(folder)  # a killed run may leave temporary files of safetensors
    model.history_ = {name: _history(name, values) for name, values in curves.curves.items()}
    save_for_scvi_tools(model, folder)
    save_safe(model, description, folder)


def _history(name: str, values: list[float]) -> pd.DataFrame:
    """Learning curve in the format of scvi-tools' `model.history`."""
    return pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))


def _final(curves: LearningCurves) -> dict[str, float]:
    wanted = ("elbo_train", "elbo_validation", "reconstruction_loss_validation", "kl_local_validation")
    return {name: round(curves.curves[name][-1], 4) for name in wanted if name in curves.curves}


def _counts(model: scvi.model.SCVI, data: PreparedDataModule, curves: LearningCurves) -> dict[str, Any]:
    return {
        "cells": data.cells.n_cells,
        "training_cells": data.n_train,
        "validation_cells": data.n_val,
        "genes": data.cells.n_genes,
        "batches": len(data.cells.batches),
        "epochs": len(curves.curves.get("elbo_train", [])),
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
    }


def plan(config: Config) -> Plan:
    """Plan of the stage: size from the prepared file, time from a few training steps on its cells."""
    artifacts = config.artifacts
    Workspace(config.directory).require("prepare", [artifacts.prepared])
    data = _data(config.tuned)
    cost = _cost(config.tuned, data, data.cells.n_cells)
    return Plan(
        "train",
        reads=[str(config.directory / artifacts.prepared)],
        writes=[f"{config.directory / name}/" for name in (artifacts.model, artifacts.tensorboard)],
        cells=data.cells.n_cells,
        genes=data.cells.n_genes,
        memory=cost.memory,
        disk=cost.disk,
        seconds=cost.seconds,
        notes=cost.notes,
    )


def cost_of_training(config: Config, n_cells: int) -> Cost:
    """Cost of training on `n_cells` cells, of which those prepared in `config.directory` are a sample.

    UserError as in training, for settings that do not fit the model, the cells or this machine.
    """
    data = _data(config.tuned)
    try:
        return _cost(config.tuned, data, n_cells)
    finally:
        data.cells.close()


def _cost(config: Config, data: PreparedDataModule, n_cells: int) -> Cost:
    """Cost on `n_cells` cells like those of `data`; the settings are those of `Config.tuned`."""
    devices = choose_devices(config.train)
    choose_precision(config.train)
    check_arguments(config.train, config.training_plan, data, config.model.kind)
    model, _, tuning = _build(config, data)
    if slow := slow_precision(config.train, data.cells.n_genes, config.model.n_hidden):
        raise UserError(slow)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    training = make_plan(config.train, model, data, config.training_plan)
    libraries = _libraries(config, training, data)
    engine = engine_of(training)
    more = n_cells / data.cells.n_cells
    n_train, n_val = round(more * data.n_train), round(more * data.n_val)
    if config.train.max_cells is not None:
        n_train = min(n_train, config.train.max_cells)
    passes = n_train + 0.4 * n_val  # of validation, a forward pass only
    in_memory = bytes_in_memory(data.cells, n_cells) * local_processes(config.train) if data.in_memory else 0.0
    seconds, untrained = 0.0, "" if tuning is None else tuning.untrained
    if not untrained:
        data.in_memory = False  # a sample of the steps does not need all cells
        step = _seconds_per_cell(config, training, data)
        seconds = step * passes * config.train.max_epochs / n_processes(config.train)
    nodes = f" on each of {config.train.num_nodes} nodes" if config.train.num_nodes > 1 else ""
    kept = 4.0 * data.cells.density * n_val * data.cells.n_genes  # sparse validation cells
    if engine != "fast" or kept > MOST_KEPT:
        kept = 0.0
    entries = config.train.batch_size * data.cells.n_genes
    return Cost(
        memory=_BASE_MEMORY + 16.0 * parameters + _BYTES_AN_ENTRY[engine] * entries + kept + in_memory,
        disk=8.5 * parameters,
        seconds=_FIXED_SECONDS + seconds,
        notes=[
            f"{n_train:,} cells train, {n_val:,} validate, {len(data.cells.batches):,} batches",
            *([f"the cells are kept in memory: {human_bytes(in_memory)}"] if in_memory else []),
            f"{parameters:,} parameters",
            f"devices: {devices['devices']} ({devices['accelerator']}){nodes}, steps by train.engine {engine}",
            f"while it trains, a checkpoint of {human_bytes(12.0 * parameters)}",
            *(f"warning: {problem}" for problem in _problems(config, data)),
            *(
                [f"mode {config.fine_tune.mode} trains nothing: {tuning.untrained}"]
                if tuning and tuning.untrained
                else []
            ),
            *([f"float32 matrix products: {libraries}"] if libraries else []),
        ],
    )


def _libraries(config: Config, plan: TrainingPlan, data: PreparedDataModule) -> products.Libraries | None:
    """Choose the CPU libraries for matrix products as the training does; None if only torch is used."""
    if engine_of(plan) != "fast" or config.train.precision != "float32" or _device(config) != "cpu":
        return None
    libraries = faster_libraries(*shape_of(plan.module), data.cells.density)
    products.use(libraries)
    return libraries


def _seconds_per_cell(config: Config, plan: TrainingPlan, data: PreparedDataModule) -> float:
    return seconds_per_cell(plan, data, config.train, _SAMPLE_SECONDS)


def _device(config: Config) -> str:
    return "cuda" if torch.cuda.is_available() and config.train.accelerator != "cpu" else "cpu"
