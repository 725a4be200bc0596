"""Stage index: builds an index for the nearest cells of an embedding, measures its recall, and publishes it."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from census_scvi.config.run_names import INDEX_RECORD, PROGRESS
from census_scvi.config.stages import STAGES
from census_scvi.config.versions import version
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.neighbors.cell_index import CellIndex, recall_at_ten
from census_scvi.neighbors.ivf_flat import IvfFlatBuilder
from census_scvi.neighbors.settings import IndexSection, Metric
from census_scvi.publication.index_copy import publish_index
from census_scvi.settings import Config
from census_scvi.stages.inputs import inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

# Searched partitions for which the recall is measured, in addition to `index.nprobe`; searches use the fewest of them
# that reach this recall.
_NPROBES, _GOOD_RECALL = (1, 3, 10, 30), 0.99
# Constants for --dry-run, measured with 200,000 and 1,000,000 cells of 50 dimensions. Memory: of the imports and of the
# written tiles, and per cell. Time: fixed, per cell, and per cell, partition and dimension.
_BASE_MEMORY, _BYTES_A_CELL = 0.7e9, 16.0
_FIXED_SECONDS, _CELL_SECONDS, _PRODUCT_SECONDS = 3.0, 10e-6, 1e-10


def run(task: Task) -> None:
    """Build the indexes that are missing; write the folder with them and their recall."""
    config, artifacts = task.config, task.artifacts
    latent = np.load(task.directory / artifacts.latent, mmap_mode="r")
    joinids = np.load(task.directory / artifacts.latent_joinids)
    task.start()
    progress, folder = task.run.path(PROGRESS), task.run.path(artifacts.index)
    folder.mkdir(exist_ok=True)
    indexes: dict[str, Any] = read_json(progress) if progress.exists() else {}
    write_json(progress, indexes)
    for metric in config.index.metrics:
        if metric not in indexes:
            builder = IvfFlatBuilder(
                latent, joinids, folder / metric, metric, _n_partitions(config.index, len(latent)), config.seed
            )
            with progress_bar(2 * len(latent), f"index, {metric}") as bar:
                for n_cells in builder.build():
                    bar.update(n_cells)
            try:
                indexes[metric] = _measured(str(folder / metric), metric, latent, joinids, config)
            except UserError:
                task.run.discard()  # so that it can be built with the settings that the error asks for
                raise
            write_json(progress, indexes)
    n_cells, n_dimensions = latent.shape
    record = {
        "embedding": task.run.fingerprint["inputs"][artifacts.latent],
        "n_cells": n_cells,
        "n_dimensions": n_dimensions,
        "seed": config.seed,
        "tiledb-vector-search": version("tiledb-vector-search"),
        "indexes": indexes,
    }
    write_json(folder / INDEX_RECORD, record)
    task.commit([artifacts.index], {"cells": n_cells, "n_latent": n_dimensions}, indexes=indexes)
    log.info("wrote %s: %s cells", task.directory / artifacts.index, f"{n_cells:,}")
    publish_index(task.directory, artifacts)


def when_done(config: Config) -> None:
    """Publish a finished index, if its embedding was published since."""
    publish_index(config.directory, config.artifacts)


def _n_partitions(settings: IndexSection, n_cells: int) -> int:
    return min(settings.partitions or max(math.isqrt(n_cells), 1), n_cells)


def _measured(uri: str, metric: Metric, latent: Any, joinids: Any, config: Config) -> dict[str, Any]:
    """Record of an index with its recall; UserError if the recall is too low."""
    settings, (n_cells, n_dimensions) = config.index, latent.shape
    partitions = _n_partitions(settings, n_cells)
    index = CellIndex(uri, metric, n_cells, n_dimensions, partitions, settings.nprobe)
    nprobes = sorted({min(nprobe, partitions) for nprobe in (*_NPROBES, settings.nprobe)})
    recall = recall_at_ten(index, latent, joinids, settings.measured_cells, nprobes, config.seed)
    log.info(
        "%s: recall at 10 with nprobe %s",
        metric,
        ", ".join(f"{nprobe}: {value:.3f}" for nprobe, value in recall.items()),
    )
    found = recall[min(settings.nprobe, partitions)]
    if not found >= settings.min_recall:
        raise UserError(
            f"the recall at 10 of the {metric} index is {found:.3f} with index.nprobe {settings.nprobe}, and"
            f" index.min_recall is {settings.min_recall:g}; increase index.nprobe, or set fewer index.partitions than"
            f" {partitions:,}"
        )
    good = [nprobe for nprobe, value in recall.items() if value >= _GOOD_RECALL]
    return {
        "partitions": partitions,
        "nprobe": min(good, default=min(settings.nprobe, partitions)),
        "recall": {str(nprobe): round(value, 6) for nprobe, value in recall.items()},
    }


def plan(config: Config) -> Plan:
    """Plan of the stage, from the size of the embedding."""
    artifacts = config.artifacts
    inputs_of(STAGES["index"], config)
    n_cells, n_dimensions = np.load(config.directory / artifacts.latent, mmap_mode="r").shape
    partitions, n_indexes = _n_partitions(config.index, n_cells), len(config.index.metrics)
    seconds = n_cells * (_CELL_SECONDS + _PRODUCT_SECONDS * partitions * n_dimensions)
    return Plan(
        "index",
        reads=[str(config.directory / name) for name in (artifacts.latent, artifacts.latent_joinids)],
        writes=[f"{config.directory / artifacts.index}/"],
        cells=n_cells,
        genes=0,
        memory=_BASE_MEMORY + _BYTES_A_CELL * n_cells,
        disk=n_indexes * n_cells * (4.0 * n_dimensions + 8),
        seconds=_FIXED_SECONDS + n_indexes * seconds,
        notes=[f"{partitions:,} partitions"],
    )
