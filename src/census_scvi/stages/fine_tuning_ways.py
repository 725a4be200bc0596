"""The ways to renew a model that train: their settings and their cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from census_scvi.census.cells import Cells
from census_scvi.census.open import Census
from census_scvi.config.run_names import DECISION
from census_scvi.files.uri import without_credentials
from census_scvi.fine_tuning.new_cells import NewCells, require_new_cells
from census_scvi.fine_tuning.selection import Selection
from census_scvi.fine_tuning.settings import CONTINUE, NEW_BATCHES, RETRAIN
from census_scvi.model.safe import ModelDescription
from census_scvi.settings import Config
from census_scvi.stages.plan import Cost, Plan, human_bytes, human_time
from census_scvi.stages.prepare import cost_of_writing
from census_scvi.stages.train import cost_of_training

# Bytes: imports of both stages and the model before, in addition to those of training.
_LOADED = 0.2e9
# Bytes per cell of the Census and per cell that the model has seen, while the two are compared: keys, their order.
_BYTES_COMPARED, _BYTES_SEEN = 62.0, 8.0


def modes_of(found: NewCells) -> list[str]:
    """Modes in which a fine-tuning on a Census is possible, the cheapest first."""
    return [mode for mode in (NEW_BATCHES, CONTINUE, RETRAIN) if mode != NEW_BATCHES or found.of_new_batches.any()]


def config_of_way(config: Config, mode: str, folder: Path, held_out: str | None) -> Config:
    """The config of a way that `--decide` trains, in a run directory of its own in `folder`.

    It trains on one device: the processes of other devices would run the whole command.
    """
    tune: dict[str, Any] = {"mode": mode, "held_out": held_out}
    update: dict[str, Any] = {
        "output": config.output.model_copy(update={"directory": str(folder / mode)}),
        "train": config.train.model_copy(update={"multi_gpu": False}),
    }
    if mode != CONTINUE:
        tune["replay_cells"] = 0
    if mode == RETRAIN:
        update |= _budgeted(config.model_copy(update=update))
    update["fine_tune"] = config.fine_tune.model_copy(update=tune)
    return config.model_copy(update=update)


def _budgeted(config: Config) -> dict[str, Any]:
    """The sections of a training for the share `fine_tune.budget` of the epochs, and of those of the KL warm-up."""
    share = config.fine_tune.budget
    plan = dict(config.training_plan)
    for name in ("n_epochs_kl_warmup", "n_steps_kl_warmup"):
        if plan.get(name):
            plan[name] = max(round(share * plan[name]), 1)
    epochs = max(round(share * config.train.max_epochs), 1)
    return {"train": config.train.model_copy(update={"max_epochs": epochs}), "training_plan": plan}


def plan_fine_tuning(config: Config, census: Census, selection: Selection, description: ModelDescription) -> Plan:
    """Plan of prepare and train, from a sample of the cells that is prepared and trained on for a few steps.

    UserError as in the fine-tuning: nothing is new, or the settings do not fit.
    """
    require_new_cells(selection.found, config.fine_tune)
    cells, counts, _ = selection.training(config.fine_tune, config.seed)
    names = (config.artifacts.prepared, config.artifacts.genes, f"{config.artifacts.model}/")
    cost = _cost(config, census, selection, cells, description)
    train, plan = config.tuned.train, config.tuned.training_plan
    how = (
        f"mode {config.fine_tune.mode}: {len(cells):,} cells, {counts['replayed_cells']:,} of them seen before; up to"
        f" {train.max_epochs} epochs, learning rate {plan.get('lr', 'of scvi-tools')}"
    )
    return Plan(
        "fine-tune",
        reads=[without_credentials(str(config.fine_tune.model)), *_census(census)],
        writes=[str(config.directory / name) for name in names],
        cells=len(cells),
        genes=len(description.genes),
        **vars(replace(cost, notes=[how, *cost.notes])),
    )


def plan_decision(config: Config, census: Census, selection: Selection, description: ModelDescription) -> Plan:
    """Plan of `--decide`: that of each way, one after the other. Measuring the held-out cells is not included."""
    require_new_cells(selection.found, config.fine_tune)
    folder = config.directory / DECISION
    costs, notes = [], []
    for mode in modes_of(selection.found):
        own = config_of_way(config, mode, folder, held_out=None)
        cells, _, _ = selection.training(own.fine_tune, config.seed)
        costs.append(cost := _cost(own, census, selection, cells, description))
        notes.append(
            f"{mode}: up to {len(cells):,} cells, {own.tuned.train.max_epochs} epochs, {human_bytes(cost.memory)} of"
            f" memory, {human_bytes(cost.disk)} of disk, {human_time(cost.seconds)}"
        )
        notes += [note for note in cost.notes if "trains nothing" in note]
    measured = config.fine_tune.measured_cells
    return Plan(
        "fine-tune --decide",
        reads=[without_credentials(str(config.fine_tune.model)), *_census(census)],
        writes=[f"{folder}/"],
        cells=len(selection.found.cells),
        genes=len(description.genes),
        memory=max(cost.memory for cost in costs),
        disk=sum(cost.disk for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        notes=[*notes, f"up to {measured:,} held-out cells of each release are then measured, in minutes"],
    )


def _census(census: Census) -> list[str]:
    return [f"{census.identity['uri']} ({census.identity['organism']})"]


def _cost(config: Config, census: Census, selection: Selection, cells: Cells, description: ModelDescription) -> Cost:
    with TemporaryDirectory() as folder:
        update = {
            "output": config.output.model_copy(update={"directory": folder}),
            "train": config.train.model_copy(update={"held_out": None}),  # may match no cell, or all of a sample
        }
        own = config.model_copy(update=update)
        prepared = cost_of_writing(census, cells, description.genes, own, Path(folder) / own.artifacts.prepared)
        trained = cost_of_training(own, len(cells))
    compared = _LOADED + _BYTES_COMPARED * len(selection.found.cells) + _BYTES_SEEN * len(selection.seen)
    return Cost(
        memory=compared + max(prepared.memory, trained.memory),
        disk=prepared.disk + trained.disk,
        seconds=prepared.seconds + trained.seconds,
        notes=trained.notes,
    )
