"""Command evaluate: computes metrics of embeddings on a slice of cells, and writes metrics.json and report.html."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.ontology import build_hierarchy, terms_in
from census_scvi.census.cells import read_obs
from census_scvi.census.open import open_census
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.config.run_names import CZ_BENCHMARKS, METRICS, REPORT
from census_scvi.config.versions import version
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_values import json_values
from census_scvi.files.uri import local_path, without_credentials
from census_scvi.metrics.biology import biology
from census_scvi.metrics.breakdown import break_down
from census_scvi.metrics.mixing import mixing
from census_scvi.metrics.score import Score, definition
from census_scvi.metrics.space import Space
from census_scvi.report.cz_benchmarks import as_cz_benchmarks
from census_scvi.report.groups import same_groups
from census_scvi.report.html import write_report
from census_scvi.report.named import embeddings_of, evaluation_place
from census_scvi.report.result import Evaluation
from census_scvi.report.settings import PCA
from census_scvi.report.slice import Slice, read_slice
from census_scvi.settings import Config
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

_PACKAGES = ("census-scvi", "scib-metrics", "scikit-learn", "scanpy", "igraph", "numpy")
# Constants for --dry-run, measured on two cores. Time: of imports and report; per cell of the slice (reading and PCA);
# per measured cell, column and embedding. Memory: of the imports, and per cell of the slice.
_FIXED_SECONDS, _CELL_SECONDS, _MEASURED_SECONDS = 30.0, 6e-4, 2e-3
_BASE_MEMORY, _BYTES_A_CELL = 1.2e9, 12_000.0

Names = npt.NDArray[np.object_]


def run(task: Task) -> None:
    """Compute the metrics and write metrics.json and report.html."""
    config, stage = task.config, task.run
    folder = task.directory
    if (folder / REPORT).is_file() and not stage.forced:  # from an earlier version, which kept no record
        raise UserError(f"{folder / REPORT} exists; set another evaluate.folder, or replace it with --force")
    stage.start()
    cells = read_slice(
        task.census,
        config.evaluate,
        config.directory,
        batch_key=config.anndata.batch_key,
        n_genes=config.hvg.top_n_hvg,
        seed=config.seed,
    )
    measured = _measured_rows(config, cells)
    found = evaluate(config, cells, measured)
    if not any(found.scores.values()):
        raise UserError(
            f"nothing can be measured on {len(cells.obs):,} cells: {'; '.join(found.problems) or 'no column is given'}."
            " Change evaluate.obs_filter, evaluate.labels or evaluate.batches"
        )
    record = {
        "census": task.census.identity,
        "settings": config.evaluate.model_dump(mode="json"),
        "seed": config.seed,
        "cells": {"matching": cells.n_matching, "evaluated": len(cells.obs), "measured": len(measured)},
        "packages": {name: version(name) for name in _PACKAGES},
        "definitions": {score.metric: definition(score.metric) for some in found.scores.values() for score in some},
        "problems": found.problems,
        "latents": _latents(config),
        "same_as": found.same_as,
        "scores": {name: [asdict(score) for score in scores] for name, scores in found.scores.items()},
        "breakdown": {
            name: {column: table.reset_index().to_dict("records") for column, table in tables.items()}
            for name, tables in found.breakdowns.items()
        },
    }
    record = without_credentials(json_values(record))
    write_json(stage.path(METRICS), record)
    write_json(stage.path(CZ_BENCHMARKS), json_values(as_cz_benchmarks(found.scores)))
    log.info("drawing the report")
    write_report(
        stage.path(REPORT), config.evaluate, config.directory, cells, measured, found, record, _shown_settings(config)
    )
    task.commit([METRICS, CZ_BENCHMARKS, REPORT], dict(record["cells"]), census=task.census.identity)
    for problem in found.problems:
        log.warning("%s", problem)
    log.info("wrote %s and %s", folder / METRICS, folder / REPORT)


def evaluate(config: Config, cells: Slice, measured: npt.NDArray[np.int64]) -> Evaluation:
    """Compute scores and breakdowns of every embedding of a slice.

    Parameters
    ----------
    config
        The config; its section `evaluate` names the columns.
    cells
        The slice.
    measured
        int64 (cells,): rows of the measured cells.
    """
    settings = config.evaluate
    found = Evaluation(problems=list(cells.problems))
    labels = {name: cells.names(name, vague=False) for name in settings.labels if name in cells.obs}
    batches = {name: cells.names(name, vague=True) for name in settings.batches if name in cells.obs}
    donors = donors_of(cells, settings.donors, found.problems)
    whole = next(iter(batches.values()), np.full(len(cells.obs), "", dtype=object))
    inner = next(iter(labels), "")
    within = labels.get(inner, np.full(len(cells.obs), None, dtype=object))
    found.same_as = same_groups(labels) | same_groups(batches)
    labels, batches = (
        {name: values for name, values in columns.items() if name not in found.same_as} for columns in (labels, batches)
    )
    with progress_bar(len(cells.spaces) * (len(labels) + len(batches)), "metrics", unit="columns") as bar:
        for name, points in cells.spaces.items():
            space = Space(points, measured, config.seed)
            measure = _Measure(found.scores.setdefault(name, []), found.problems)
            of_measured = None if donors is None else donors[measured]
            for column, values in labels.items():
                log.info("%s: %s", name, column)
                measure(
                    biology,
                    space,
                    column,
                    values[measured],
                    of_measured,
                    whole[measured],
                    partial(_lineage, cells, column),
                )
                bar.update()
            for column, values in batches.items():
                log.info("%s: %s", name, column)
                values = np.where([value is None for value in values], "missing", values).astype(object)
                measure(
                    mixing, space, column, values[measured], values, inner, within[measured], of_measured
                )  # fmt: skip
                bar.update()
            if labels and batches:
                first = next(iter(batches))
                found.breakdowns[name] = {inner: break_down(space, within, whole, within)}
                if not same_groups({inner: within, first: whole}):
                    found.breakdowns[name][first] = break_down(space, within, whole, whole)
    return found


def _lineage(cells: Slice, column: str, names: list[str]) -> npt.NDArray[np.bool_] | None:
    """Terms of the Cell Ontology above each label, bool (labels, terms); None if none of the labels is a term."""
    hierarchy = build_hierarchy(names, terms_in(cells.obs, column))
    return hierarchy.lineage[: len(names)] if hierarchy.has_terms else None


@dataclass
class _Measure:
    """Collects the scores of each measurement, or the reason if it fails."""

    scores: list[Score]
    problems: list[str]

    def __call__(self, measure: Callable[..., list[Score]], *arguments: Any) -> None:
        try:
            self.scores += measure(*arguments)
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def donors_of(cells: Slice, column: str | None, problems: list[str]) -> Names | None:
    """Donor of each cell, prefixed with its dataset: two studies may use the same donor names."""
    if column is None:
        return None
    if column not in cells.obs:
        problems.append(
            f"evaluate.donors contains {column!r}, which is not an obs column of the Census; cells are held out"
        )
        return None
    dataset = cells.obs["dataset_id"].astype(str) if "dataset_id" in cells.obs else ""
    return (dataset + "|" + cells.obs[column].astype(str)).to_numpy(dtype=object)


def _measured_rows(config: Config, cells: Slice) -> npt.NDArray[np.int64]:
    numbers = generator(config.seed, Stream.MEASURED_CELLS)
    return draw(len(cells.obs), config.evaluate.measured_cells, numbers)


def _shown_settings(config: Config) -> dict[str, Any]:
    """The config sections that an evaluation reads, without credentials."""
    values = without_credentials(config.model_dump(mode="json"))
    return {name: values[name] for name in ("census", "anndata", "hvg", "evaluate", "output", "seed")}


def _latents(config: Config) -> dict[str, Any]:
    """Identity of `latent.npy` for each embedding in a run directory."""
    found = {}
    for name, place in embeddings_of(config.evaluate, config.directory).items():
        path = local_path(place)
        if path is not None and (record := Workspace(path).record("create-latent-update")):
            found[name] = record["outputs"].get("latent.npy")
    return found


def plan(config: Config) -> Plan:
    """Plan of an evaluation: number of cells from the Census, time for two cores."""
    settings = config.evaluate
    folder = evaluation_place(settings, config.evaluation_folder).directory
    places = embeddings_of(settings, config.directory).values()
    with open_census(config.census) as census:
        n_matching = sum(
            len(table) for table in read_obs(census, settings.obs_filter, ["soma_joinid"], "evaluate.obs_filter")
        )
        uri = census.identity["uri"]
    n_cells = min(n_matching, settings.max_cells)
    n_measured = min(n_cells, settings.measured_cells)
    n_spaces = max(len(settings.embeddings), 1) + settings.baseline
    columns = len(settings.labels) + len(settings.batches)
    return Plan(
        "evaluate",
        reads=[
            f"{uri}: {n_cells:,} of {n_matching:,} cells of {settings.obs_filter or 'all'}",
            *places,
        ],
        writes=[str(folder / name) for name in (METRICS, CZ_BENCHMARKS, REPORT)],
        cells=n_cells,
        genes=config.hvg.top_n_hvg if settings.baseline else 0,
        memory=_BASE_MEMORY + _BYTES_A_CELL * n_cells,
        disk=2e6,
        seconds=_FIXED_SECONDS + _CELL_SECONDS * n_cells + _MEASURED_SECONDS * n_measured * columns * n_spaces,
        notes=[f"{n_measured:,} cells are measured, and a {PCA} of their counts" if settings.baseline else ""],
    )
