"""Stage prepare: writes raw counts of the training cells and highly variable genes to one .h5ad."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from census_scvi.census.cells import Cells, require_columns, select_cells, soma_filter
from census_scvi.census.genes import (
    GenesInParts,
    Selection,
    locate_genes,
    read_genes,
    read_var,
    select_genes,
    write_genes,
)
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.census.open import Census, open_census
from census_scvi.census.proteins import read_protein_names
from census_scvi.census.schema import X_TILE
from census_scvi.census.selected_once import selected_once
from census_scvi.census.stream import stream_blocks, stream_obs, tile_runs
from census_scvi.config.run_names import EXCLUDED_GENES, GENES_LOCK, SEEN_CELLS, SELECTION
from census_scvi.counts.file_order import POOL_RUNS
from census_scvi.counts.prepared_store import PART_POOLS
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import waiting_lock
from census_scvi.files.parts import WHOLE, Part, parts
from census_scvi.settings import Config
from census_scvi.stages.plan import Cost, Plan, human_bytes
from census_scvi.stages.prepared_cells import join_cells, write_cells
from census_scvi.stages.protocol import Task
from census_scvi.workspace.staged_parts import number_of_parts

log = logging.getLogger(__name__)

# Constants for --dry-run, checked by benchmarks/stages.py. Memory before the first cell: the imports of this stage and
# TileDB's buffers.
_BASE_MEMORY = 0.4e9
# Bytes per non-zero while it is read (two rows of tiles, two copies), and in the shuffle pool.
_BYTES_READ, _BYTES_POOLED = 96.0, 16.0
# Bytes per cell while the cells are selected for the genes; between 0.5 and 5 million cells (benchmarks/many_cells.py).
_BYTES_A_CELL = 55.0
_SAMPLE_RUNS = 12
_VARIABLE = 0.6
_BYTES_A_NONZERO = {"gzip": 1.9, "none": 8.0}
# Time of the stage, in passes over all counts: one for gene selection, one for writing, the rest for work that does not
# overlap with reading.
_PASSES, _FIXED_SECONDS = 2.3, 1.5


def run(task: Task) -> None:
    """Select cells and genes and write `hv_genes.pkl` and `anndata_model.h5ad`; a killed run resumes."""
    n_parts = number_of_parts(task.run)
    job = _job(task, n_parts)
    if (genes := job.genes(parts(n_parts))) is None:
        raise RuntimeError("all parts are read, and the genes are not selected")
    for part in parts(n_parts):
        job.write(genes, part)
    job.finish(genes, n_parts)


def run_part(task: Task, part: Part) -> bool:
    """Read the counts of a part for the selection of genes; write the cells of the part if the genes are selected.

    Returns
    -------
    Whether the part is done; False: the counts of other parts must be read before.
    """
    job = _job(task, part.of)
    if (genes := job.genes([part])) is None:
        return False
    job.write(genes, part)
    return True


def _job(task: Task, n_parts: int) -> _Preparation:
    """Check the settings, begin, and select the cells."""
    config, census = task.config, task.census
    _check_columns(census, config)
    if config.fine_tune.model is not None:
        return _of_fine_tuning(task)
    task.start()

    def select() -> Cells:
        return select_cells(census, config.training_filter, config.anndata.batch_key)

    cells = select() if n_parts == 1 else selected_once(task.run.path(SELECTION), select)
    _report_cells(cells)
    return _Preparation(task, cells)


def _of_fine_tuning(task: Task) -> _Preparation:
    """The cells that the model has not seen, its genes, and the keys of all cells that it has seen then."""
    # Imported here, because no other run of this stage needs scvi-tools.
    from census_scvi.fine_tuning.selection import select_for_fine_tuning
    from census_scvi.fine_tuning.start import load_for_fine_tuning

    config, census = task.config, task.census
    model = load_for_fine_tuning(config.fine_tune, config.model, config.census.organism, config.anndata.batch_key)
    genes = model[1].genes
    locate_genes(census, genes, config.genes.min_share, "genes.min_share")
    selection = select_for_fine_tuning(census, config.fine_tune, config.census, model[1], config.training_filter)
    cells, of_selection, seen = selection.training(config.fine_tune, config.seed)
    task.start()
    log.info(
        "%s new cells in %d new batches, and %s that the model has seen",
        f"{of_selection['new_cells']:,}",
        of_selection["new_batches"],
        f"{of_selection['replayed_cells']:,}",
    )
    with waiting_lock(task.run.path(GENES_LOCK)):
        if not task.run.path(task.artifacts.genes).exists():
            write_genes(task.run.path(task.artifacts.genes), genes)
    return _Preparation(task, cells, of_selection, seen, {"cells_of_model": selection.origins})


@dataclass
class _Preparation:
    """One run of the stage: select the genes, write the cells, or parts of both.

    Attributes
    ----------
    task
        What the stage needs.
    cells
        All cells that the file will have.
    of_selection, seen, details
        Of a fine-tuning: numbers for the record, keys of the cells that the model has seen afterwards, and more
        entries of the record.
    """

    task: Task
    cells: Cells
    of_selection: dict[str, int] = field(default_factory=dict)
    seen: Any = None
    details: dict[str, Any] = field(default_factory=dict)

    def genes(self, mine: list[Part]) -> list[str] | None:
        """Genes of the file, after reading what is missing of some parts; None: other parts must be read."""
        config, path = self.task.config, self.task.run.path(self.task.artifacts.genes)
        if path.exists():
            genes = read_genes(path)
            log.info("%d genes were selected before", len(genes))
            return genes
        arguments = (self.task.census, config.training_filter, config.hvg, config.seed, config.genes.min_cells)
        if mine == [WHOLE]:
            self._keep(select_genes(*arguments))
            return read_genes(path)
        counts, advanced = GenesInParts(*arguments, self.task.run.path(SELECTION)), True
        while advanced and not path.exists():  # some counts may be read twice
            read = [counts.read(part) for part in mine]
            advanced = any(read)
            with waiting_lock(self.task.run.path(GENES_LOCK)):
                if not path.exists() and (selection := counts.select(mine[0].of)) is not None:
                    self._keep(selection)
        return read_genes(path) if path.exists() else None

    def _keep(self, selection: Selection) -> None:
        log.info("%d highly variable genes", len(selection.feature_ids))
        if selection.below_min_cells:
            log.info(
                "%s genes were excluded beforehand: detected in fewer than %s cells (genes.min_cells)",
                f"{selection.below_min_cells:,}",
                f"{self.task.config.genes.min_cells:,}",
            )
        write_json(self.task.run.path(EXCLUDED_GENES), {"below_min_cells": selection.below_min_cells})
        # Last: if this file exists, the stage can resume.
        write_genes(self.task.run.path(self.task.artifacts.genes), selection.feature_ids)

    def write(self, genes: list[str], part: Part) -> None:
        """Write the cells of a part."""
        write_cells(self.task.census, self.cells, genes, self.task.config, self._prepared, part)

    @property
    def _prepared(self) -> Path:
        return self.task.run.path(self.task.artifacts.prepared)

    def finish(self, genes: list[str], n_parts: int) -> None:
        """Join the parts, and commit."""
        task, artifacts, run = self.task, self.task.artifacts, self.task.run
        counts = join_cells(task.census, self.cells, genes, task.config, self._prepared, n_parts) | self.of_selection
        written = [artifacts.prepared, artifacts.genes]
        if self.seen is not None:
            np.save(run.path(SEEN_CELLS), self.seen)
            written.append(SEEN_CELLS)
        else:
            # A version without genes.min_cells wrote no record; it excluded no genes.
            excluded = run.path(EXCLUDED_GENES)
            counts["genes_below_min_cells"] = read_json(excluded)["below_min_cells"] if excluded.exists() else 0
        task.commit(written, counts, census=task.census.identity, parts=n_parts, **self.details)
        log.info(
            "wrote %s: %s cells x %d genes", task.directory / artifacts.prepared, f"{len(self.cells):,}", len(genes)
        )


def _check_columns(census: Census, config: Config) -> None:
    """UserError if a configured obs column is missing; checked before anything in the run directory changes."""
    require_columns(census, config.anndata.batch_key, "anndata.batch_key")
    require_columns(census, config.hvg.hvg_batch, "hvg.hvg_batch")
    require_columns(census, config.anndata.obs_columns or [], "anndata.obs_columns")
    if config.anndata.labels_key is not None:
        require_columns(census, [config.anndata.labels_key], "anndata.labels_key")
    if config.anndata.protein_measurement is not None:
        read_protein_names(census, config.anndata.protein_measurement)
    soma_filter(census, config.census.obs_query, "census.obs_query")
    soma_filter(census, config.census.obs_query_model, "census.obs_query_model")
    if config.hvg.min_genes:
        require_columns(census, ["nnz"], "hvg.min_genes")
    kept = config.anndata.obs_columns or census.experiment.obs.schema.names
    if "batch" in kept and config.anndata.batch_key != ["batch"]:
        log.warning(
            "the Census has an obs column 'batch', which %s does not keep: its own column of that name has the label"
            " of anndata.batch_key (%s)",
            config.anndata.model_filename,
            ", ".join(config.anndata.batch_key),
        )


def _report_cells(cells: Cells) -> None:
    log.info("%s cells in %d batches", f"{len(cells):,}", len(cells.batches))
    sizes = cells.batch_sizes()
    if single := list(sizes.index[sizes == 1]):
        log.warning(
            "%d batches have one cell, the first %r: scVI cannot separate such a cell from its batch effect;"
            " they are kept (exclude them with census.obs_query_model)",
            len(single),
            single[0],
        )


def plan(config: Config) -> Plan:
    """Plan of the stage: cells and genes from the Census, cost from some runs of cells that are read and timed."""
    with open_census(config.census) as census:
        _check_columns(census, config)
        cells = select_cells(census, config.training_filter, config.anndata.batch_key)
        groups = select_cells(census, config.training_filter, config.hvg.hvg_batch).batches
        var = read_var(census)
        n_genes = min(config.hvg.top_n_hvg, len(var))
        runs = tile_runs(cells.joinids)
        sample = _sampled(runs)
        joinids, genes = cells.joinids, var["soma_joinid"].to_numpy()
        next(iter(stream_blocks(census, joinids, genes, blocks=sample[:1])))  # opens files and compiles code
        started = time.monotonic()
        detected = np.zeros(len(var))
        for block in stream_blocks(census, joinids, genes, blocks=sample):
            detected += np.bincount(block.counts.indices, minlength=len(var))
        seconds = time.monotonic() - started
        sampled = np.concatenate([np.arange(*run) for run in sample])
        n_sampled = len(sampled)
        ((_, obs),) = stream_obs(census, joinids, [sampled], config.anndata.obs_columns)
    n_cells, workers = len(cells), config.cluster.workers
    # Upper limit: the genes detected most often. Only part of them are highly variable.
    nonzeros = (_VARIABLE if n_genes < len(var) else 1.0) * np.sort(detected)[::-1][:n_genes].sum() / n_sampled
    kept = n_cells * (nonzeros * _BYTES_A_NONZERO[config.anndata.compression] + _stored_bytes(obs) / n_sampled)
    artifacts = config.artifacts
    return Plan(
        "prepare",
        reads=[f"{census.identity['uri']} ({config.census.organism}), cells {config.training_filter or 'all'}"],
        writes=[str(config.directory / name) for name in (artifacts.prepared, artifacts.genes)],
        cells=n_cells,
        genes=n_genes,
        memory=workers * _memory(n_cells, detected.sum() / n_sampled, nonzeros)
        + GeneTally.memory(len(groups), len(var)),
        disk=kept,
        seconds=_FIXED_SECONDS + _PASSES * seconds / n_sampled * n_cells / workers,
        notes=[
            "genes are not selected yet: disk and memory are estimates from the genes detected most often",
            *(
                ["fine_tune.model is set: only new cells are prepared; scvi-fine-tune.py --dry-run says how many"]
                if config.fine_tune.model is not None
                else []
            ),
            *(
                [f"while it joins its parts, twice as much disk: {human_bytes(2 * kept)}"]
                if len(runs) > PART_POOLS * POOL_RUNS or workers > 1
                else []
            ),
        ],
    )


def cost_of_writing(census: Census, cells: Cells, genes: list[str], config: Config, path: Path) -> Cost:
    """Cost of writing chosen cells and genes; a sample of them is written to `path`, and timed.

    Parameters
    ----------
    census, cells, genes
        What would be written.
    config
        The settings.
    path
        File for the sample: several runs of cells that the Census stores together.
    """
    runs = tile_runs(cells.joinids)
    sample = _sampled(runs)
    every = read_var(census)["soma_joinid"].to_numpy()
    read = sum(block.counts.nnz for block in stream_blocks(census, cells.joinids, every, blocks=sample))
    rows = np.concatenate([np.arange(*run) for run in sample])
    started = time.monotonic()
    sampled = Cells(cells.joinids[rows], cells.batch_codes[rows], cells.batches)
    write_cells(census, sampled, genes, config, path)
    counts = join_cells(census, sampled, genes, config, path)
    seconds = time.monotonic() - started
    return Cost(
        memory=_memory(len(cells), read / len(rows), counts["nonzeros"] / len(rows)),
        disk=path.stat().st_size * len(cells) / len(rows),
        seconds=_FIXED_SECONDS + seconds * len(runs) / len(sample),
    )


def _sampled(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [runs[len(runs) * place // _SAMPLE_RUNS] for place in range(min(_SAMPLE_RUNS, len(runs)))]


def _memory(n_cells: int, read: float, written: float) -> float:
    """Bytes of memory to write cells of which `read` non-zeros are read and `written` are written, each on average."""
    return _BASE_MEMORY + _BYTES_A_CELL * n_cells + X_TILE * (_BYTES_READ * read + POOL_RUNS * _BYTES_POOLED * written)


def _stored_bytes(obs: pd.DataFrame) -> float:
    """Estimated bytes of obs in the file: labels compress well, text and numbers unique to each cell do not."""
    stored = 1.0 * len(obs)  # the obs names
    for _, column in obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            stored += 0.5 * len(obs)
        elif column.dtype.kind in "biuf":
            stored += min(column.dtype.itemsize, 6) * len(obs) * (column.nunique() > 2)
        else:
            stored += (column.str.len().mean() + 16) * len(obs)
    return stored
