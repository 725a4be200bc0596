"""Command compare-releases: measures what changed between two releases; writes comparison.json and report.html."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.labelled.labels import read_labels
from census_scvi.annotation.protocol import UNKNOWN
from census_scvi.atlas import Atlas
from census_scvi.census.cells import require_columns
from census_scvi.census.open import Census, open_census
from census_scvi.config.obs_filter import in_section
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.config.run_names import COMPARISON_RECORD, REPORT
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_values import json_values
from census_scvi.files.uri import without_credentials
from census_scvi.query.cells import QueryCells
from census_scvi.query.places import query_source
from census_scvi.releases.cells import Shared, match, read_cells
from census_scvi.releases.differences import differences
from census_scvi.releases.measure import Drift, Moved, measure_movement, measure_sample
from census_scvi.releases.places import STAGES, comparison_place, identities_of, places_of
from census_scvi.releases.predictions import compare_predictions
from census_scvi.releases.release import Release, open_release
from census_scvi.report.releases import findings, write_release_report
from census_scvi.report.slice import VAGUE, Slice, read_slice_obs
from census_scvi.settings import Config
from census_scvi.stages.evaluate import donors_of, evaluate
from census_scvi.stages.map_query import predict
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.workspace.provenance import package_versions

log = logging.getLogger(__name__)

OLD, NEW = "old", "new"
# Constants for --dry-run, measured on two cores with 1,000,000 cells (benchmarks/releases.py). Memory: of the imports,
# and per cell of a release. Time: fixed; per cell of a release; per sampled cell; per measured cell and column.
_BASE_MEMORY, _BYTES_A_CELL = 1.2e9, 650.0
_FIXED_SECONDS, _CELL_SECONDS, _SAMPLE_SECONDS, _MEASURED_SECONDS = 30.0, 1e-5, 2.5e-4, 1e-2


def run(task: Task) -> None:
    """Compare the releases and write the record and the page."""
    config, settings = task.config, task.config.compare_releases
    task.start()
    places = places_of(settings, config.directory)
    old, new = (open_release(place, setting) for setting, place in places.items())
    if old.organism != new.organism:
        raise UserError(
            f"{old.place} is of {old.organism} and {new.place} of {new.organism}; compare releases of one organism"
        )
    with (
        open_census(old.census(settings.old_census, config.census.tiledb, "compare_releases.old_census")) as old_census,
        open_census(new.census(settings.new_census, config.census.tiledb, "compare_releases.new_census")) as new_census,
    ):
        shared = _shared(config, old, new, old_census, new_census)
        moved = measure_movement(
            shared, old.embedding(old_census), new.embedding(new_census), settings.sampled_cells, config.seed
        )
        cells = _slice(config, new, new_census, shared, moved)
        identity = new_census.identity
    drift = Drift(shared, moved, measure_sample(moved, _known_codes(shared, moved, settings.label), config.seed))
    record = _record(config, old, new, drift, cells)
    write_json(task.run.path(COMPARISON_RECORD), record)
    write_release_report(task.run.path(REPORT), record, drift, cells, config.seed)
    task.commit([COMPARISON_RECORD, REPORT], dict(record["cells"]), census=identity)
    for sentence in record["findings"]:
        log.info("%s", sentence)
    log.info("wrote %s and %s", task.directory / COMPARISON_RECORD, task.directory / REPORT)


def _record(config: Config, old: Release, new: Release, drift: Drift, cells: Slice) -> dict[str, Any]:
    """Content of comparison.json."""
    settings, shared, moved = config.compare_releases, drift.shared, drift.moved
    label = settings.label
    measured = draw(len(cells.obs), config.evaluate.measured_cells, generator(config.seed, Stream.MEASURED_CELLS))
    found = evaluate(config, cells, measured)
    record = {
        "old": old.facts(),
        "new": new.facts(),
        "identities": {OLD: old.identity, NEW: new.identity},
        "settings": settings.model_dump(mode="json"),
        "seed": config.seed,
        "cells": shared.numbers() | {"compared": len(moved.cells), "sampled": len(moved.sample)},
        "datasets": shared.by_dataset(),
        "relabelled": {"cells": int(shared.relabelled(label).sum()), "changes": shared.changes(label)},
        "scale": moved.superposition.scale,
        "n_neighbors": drift.sampled.n_neighbors,
        "overall": drift.overall(donors_of(cells, config.evaluate.donors, []), config.seed),
        "by": {column: drift.by(column, label) for column in settings.by},
        "measured": len(measured),
        "scores": {name: [asdict(score) for score in scores] for name, scores in found.scores.items()},
        "problems": found.problems,
        "predictions": _predictions(config, old, new),
        "differences": differences(old, new, _defaults()),
        "packages": package_versions(),
    }
    record = without_credentials(json_values(record))
    return {"findings": findings(record), **record}


def _shared(config: Config, old: Release, new: Release, old_census: Census, new_census: Census) -> Shared:
    """The cells of both releases, matched."""
    settings = config.compare_releases
    columns = [*settings.by, settings.label]
    for census in (old_census, new_census):
        require_columns(census, [settings.label], "compare_releases.label")
    cells = [
        read_cells(census, release.obs_query, columns, "compare_releases.by")
        for release, census in ((old, old_census), (new, new_census))
    ]
    shared = match(cells[0], cells[1], (old.place, new.place))
    log.info("%s cells are in both releases, of %s and %s", *(f"{n:,}" for n in (len(shared), *map(len, cells))))
    return shared


def _slice(config: Config, new: Release, census: Census, shared: Shared, moved: Moved) -> Slice:
    """The sampled cells, as an evaluation reads them, with obs of the new release for both embeddings."""
    problems: list[str] = []
    joinids = shared.new.joinids[shared.new_rows[moved.sample]]
    obs = read_slice_obs(census, joinids, config.evaluate, new.batch_key, problems)
    return Slice(obs, {OLD: moved.old, NEW: moved.new}, len(shared), problems)


def _known_codes(shared: Shared, moved: Moved, label: str) -> npt.NDArray[np.int64]:
    """Label of each sampled cell in the new release, int64 (cells,); -1 if it is missing or uninformative."""
    values = shared.new.labels[label][shared.new_rows[moved.sample]]
    informative = np.append(~np.isin(values.categories.astype(str), VAGUE), False)
    return np.where(informative[values.codes], values.codes, -1).astype(np.int64)


def _predictions(config: Config, old: Release, new: Release) -> dict[str, Any] | None:
    """Labels of the cells of `query.file` by both releases, compared for each label column; None without a file."""
    if config.query.file is None or not config.query.labels:
        return None
    settings, predicted = config.compare_releases, []
    source = query_source(config.query)
    for release, census in ((old, settings.old_census), (new, settings.new_census)):
        log.info("predicting the labels of %s by %s", source, without_credentials(release.place))
        with (
            in_section("query"),
            Atlas.open(release.place, census=census, tiledb=config.census.tiledb) as atlas,
            QueryCells(source, config.query.values) as cells,
        ):
            predicted.append(predict(atlas, cells, config).obs)
    compared = {}
    for label in config.query.labels:
        first, second = (obs[f"{label}_predicted"].to_numpy(dtype=object) for obs in predicted)
        truth = read_labels(predicted[1][label], label) if label in predicted[1] else None
        compared[label] = compare_predictions(first, second, UNKNOWN, truth)
    return {"file": str(source), "labels": compared}


def _defaults() -> dict[str, Any]:
    """Defaults of the settings that change the result of a stage of a release."""
    defaults = Config()
    return {key: value for stage in STAGES for key, value in defaults.of_stage(stage).items()}


def plan(config: Config) -> Plan:
    """Plan of the command: numbers of cells from the records of run directories, time for two cores."""
    settings = config.compare_releases
    places = places_of(settings, config.directory)
    identities_of(places)
    folder = comparison_place(settings, config.comparison_folder).directory
    releases = [open_release(place, setting) for setting, place in places.items()]
    n_cells = [release.facts()["cells"] for release in releases]
    sampled = min(settings.sampled_cells, *n_cells)
    columns = len(config.evaluate.labels) + len(config.evaluate.batches)
    measured = min(config.evaluate.measured_cells, sampled)
    return Plan(
        "compare-releases",
        reads=[
            *(f"{place}: {number:,} cells" for place, number in zip(places.values(), n_cells, strict=True)),
            *([f"{query_source(config.query)}: labels predicted by both"] if config.query.file else []),
        ],
        writes=[str(folder / COMPARISON_RECORD), str(folder / REPORT)],
        cells=max(n_cells),
        genes=0,
        memory=_BASE_MEMORY + _BYTES_A_CELL * sum(n_cells),
        disk=2e6,
        seconds=_FIXED_SECONDS
        + _CELL_SECONDS * sum(n_cells)
        + _SAMPLE_SECONDS * sampled
        + _MEASURED_SECONDS * measured * columns,
        notes=[f"{sampled:,} cells of both releases are sampled, {measured:,} of them for the metrics"],
    )
