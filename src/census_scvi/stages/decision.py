"""`fine-tune --decide`: keep a model, fine-tune it or train it again, measured on held-out cells of a newer Census."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scvi

from census_scvi.census.genes import locate_genes
from census_scvi.census.open import Census, open_census
from census_scvi.config.run_names import DECISION, HELD_OUT, REPORT
from census_scvi.files.atomic import partial_of, write_json
from census_scvi.files.json_values import json_values
from census_scvi.files.uri import without_credentials
from census_scvi.fine_tuning.extrapolate import extrapolated
from census_scvi.fine_tuning.held_out import HeldOut, held_out_keys, read_held_out
from census_scvi.fine_tuning.measure import Measured, compared, costs, measure
from census_scvi.fine_tuning.new_cells import NewCells, require_new_cells
from census_scvi.fine_tuning.selection import select_for_fine_tuning
from census_scvi.fine_tuning.settings import NEW_BATCHES, RETRAIN
from census_scvi.fine_tuning.start import load_for_fine_tuning
from census_scvi.fine_tuning.verdict import KEEP, recommend
from census_scvi.model.safe import ModelDescription, load_safe
from census_scvi.report.decision import as_text, write_decision_report
from census_scvi.report.slice import Slice
from census_scvi.settings import Config
from census_scvi.stages.evaluate import evaluate
from census_scvi.stages.fine_tuning_ways import config_of_way, modes_of
from census_scvi.stages.protocol import run_stage
from census_scvi.terminal.printing import printable
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

_RECORD = "decision.json"


@dataclass(frozen=True)
class _Way:
    """A way to renew the model: the result, and what it cost."""

    model: scvi.model.SCVI
    description: ModelDescription
    record: dict[str, Any]  # of its training; empty for the model as it is

    @property
    def untrained(self) -> bool:
        return not self.record.get("counts", {}).get("epochs", 0)


def decide(config: Config, *, force: bool = False) -> dict[str, Any]:
    """Train the ways, measure them, and write `decision/` in the run directory; what is trained is not trained again.

    Returns
    -------
    The record: recommendation, table, facts.
    """
    folder = config.directory / DECISION
    with open_census(config.census) as census:
        kept = load_for_fine_tuning(config.fine_tune, config.model, config.census.organism, config.anndata.batch_key)
        selection = select_for_fine_tuning(census, config.fine_tune, config.census, kept[1], config.training_filter)
        require_new_cells(selection.found, config.fine_tune)
        keys, source = held_out_keys(selection.found, str(config.fine_tune.model), config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        with partial_of(folder / HELD_OUT).open("wb") as file:
            np.save(file, keys)
        partial_of(folder / HELD_OUT).replace(folder / HELD_OUT)
        columns = _columns(config, census)
        genes = locate_genes(census, kept[1].genes, config.genes.min_share, "genes.min_share")
        cells = read_held_out(
            census, selection.found, keys, genes, columns, most=config.fine_tune.measured_cells, seed=config.seed
        )
        n_cells = int(census.identity["cells"])
    ways = {KEEP: _Way(*kept, {})}
    for mode in modes_of(selection.found):
        ways[mode] = _trained(config, mode, folder, force=force)
    rows = _rows(config, ways, cells, selection.found, n_cells)
    record = {
        "recommendation": recommend(rows),
        "rows": rows,
        "facts": _facts(config, cells, selection.found, source),
    }
    record = without_credentials(json_values(record))
    write_json(folder / _RECORD, record)
    write_decision_report(folder / REPORT, record)
    print(printable(as_text(record)))
    log.info("wrote %s and %s", folder / _RECORD, folder / REPORT)
    return dict(record)


def _columns(config: Config, census: Census) -> list[str]:
    """Columns of obs for the measurements, the label first."""
    known = set(census.experiment.obs.schema.names)
    wanted = [*config.evaluate.labels, *config.evaluate.batches, *config.anndata.batch_key, "dataset_id"]
    wanted += [config.evaluate.donors or "dataset_id", "cell_type_ontology_term_id"]
    return [name for name in dict.fromkeys(wanted) if name in known]


def _trained(config: Config, mode: str, folder: Path, *, force: bool) -> _Way:
    """Prepare and train a way without the held-out cells, in a run directory of its own."""
    own = config_of_way(config, mode, folder, held_out=str(folder / HELD_OUT))
    log.info("training: %s", mode)
    for stage in ("prepare", "train"):
        run_stage(stage, own, force=force)
    model, description = load_safe(own.directory / own.artifacts.model)
    return _Way(model, description, Workspace(own.directory).whole_record("train") or {})


def _rows(
    config: Config, ways: dict[str, _Way], cells: HeldOut, found: NewCells, n_cells: int
) -> dict[str, dict[str, Any]]:
    """The table: a row for each way."""
    measured = {
        name: measure(way.model, way.description, cells, config.seed)
        for name, way in ways.items()
        if name == KEEP or not way.untrained
    }
    for name in ways:
        measured.setdefault(name, measured[KEEP])  # nothing was trained: the model as it is
    new_donors = ~np.isin(cells.new.batches.astype(str), ways[KEEP].description.batches)
    scores = _scores(config, cells, measured, new_donors)
    rows = {}
    for name, way in ways.items():
        row = compared(measured[name], measured[KEEP], cells, new_donors) | scores[name]
        embedded = int(found.new.sum()) if name in (KEEP, NEW_BATCHES) else n_cells
        seconds = (cells.seconds_per_cell + measured[name].seconds_per_cell) * embedded
        row |= costs(float(way.record.get("seconds", 0.0)), seconds, config.cost.per_hour)
        row |= {"epochs": way.record.get("counts", {}).get("epochs", 0)}
        if name == RETRAIN:
            row["moved"] = float("nan")  # another latent space: distances mean nothing
            row |= _at_full_budget(config, way, row)
        rows[name] = row
    return rows


def _at_full_budget(config: Config, way: _Way, row: dict[str, Any]) -> dict[str, Any]:
    """What a training for a share of the epochs would be at the full number, as far as its curve says."""
    if config.fine_tune.budget == 1.0:
        return {}
    curve = way.record["learning_curves"].get("elbo_validation", [])
    end = extrapolated(curve, config.train.max_epochs)
    change = float("nan") if end is None else end - curve[-1]
    hours = row["train_hours"] / config.fine_tune.budget + row["embed_hours"]
    found = {
        "budget": config.fine_tune.budget,
        "elbo_new_extrapolated": row["elbo_new"] + change,
        "hours_extrapolated": hours,
    }
    return found | ({} if config.cost.per_hour is None else {"price_extrapolated": hours * config.cost.per_hour})


def _scores(
    config: Config, cells: HeldOut, measured: dict[str, Measured], new_donors: np.ndarray[Any, Any]
) -> dict[str, dict[str, float]]:
    """Mean of the benchmark's metrics of biology, and of batches, of each way, on all held-out cells."""
    obs = pd.concat([cells.old.obs, cells.new.obs])
    obs = obs.assign(batch=np.concatenate([cells.old.batches, cells.new.batches]))
    spaces, same = {}, {}
    for name, each in measured.items():
        same[name] = next(other for other in measured if measured[other] is each)
        spaces[same[name]] = np.concatenate([each.old, each.new])
    evaluated = evaluate(config, Slice(obs, spaces, len(obs)), np.arange(len(obs)))
    for problem in evaluated.problems:
        log.warning("%s", problem)
    means = {}
    for name in spaces:
        values: dict[str, list[float]] = {"biology": [], "batch": []}
        for score in evaluated.scores.get(name, []):
            values[score.about].append(score.value)
        means[name] = {
            short: float(np.mean(values[about])) if values[about] else float("nan")
            for short, about in (("bio", "biology"), ("batch", "batch"))
        }
    return {name: means[other] for name, other in same.items()}


def _facts(config: Config, cells: HeldOut, found: NewCells, source: str) -> dict[str, Any]:
    """What a reader of the table should know."""
    counts = found.counts()
    facts = {
        "model": str(config.fine_tune.model),
        "Census": config.census.uri or config.census.version,
        "cells seen before, of which gone": f"{counts['cells_seen_before']:,}, {counts['cells_gone']:,}",
        "new cells, new batches": f"{counts['new_cells']:,}, {counts['new_batches']:,}",
        "held-out new cells": f"{len(cells.new):,}, at random",
        "held-out old cells": f"{len(cells.old):,}, {source}",
        "reference of the label transfer": f"{len(cells.reference):,} cells that the model was trained on",
        "learning rate, fine-tuning": f"{config.tuned.training_plan.get('lr', float('nan')):g}",
        "replayed cells, mode continue": f"{config.fine_tune.replay_cells:,}",
    }
    if config.fine_tune.budget < 1:
        facts["retrain"] = (
            f"for {config.fine_tune.budget:.0%} of the {config.train.max_epochs} epochs; its values at all epochs are"
            " extrapolated"
        )
    return facts
