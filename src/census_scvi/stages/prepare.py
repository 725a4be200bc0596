"""Stage prepare: writes raw counts of the training cells and highly variable genes to one .h5ad."""

from __future__ import annotations

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.cells import Cells, require_columns, select_cells, select_labels, soma_filter
from census_scvi.census.genes import Selection, locate_genes, read_genes, read_var, select_genes, write_genes
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.census.open import Census, open_census
from census_scvi.census.proteins import read_protein_names, stream_proteins
from census_scvi.census.schema import X_TILE
from census_scvi.census.stream import stream_blocks, stream_obs, tile_runs
from census_scvi.config.run_names import BATCH, LABELS, PROTEIN_NAMES, SEEN_CELLS
from census_scvi.counts.file_order import POOL_RUNS
from census_scvi.counts.prepared_store import PART_POOLS, PreparedStore, count_nonzeros
from census_scvi.counts.writer import H5adWriter
from census_scvi.files.atomic import write_json
from census_scvi.files.parts import WHOLE, Part
from census_scvi.settings import Config
from census_scvi.stages.plan import Cost, Plan, human_bytes
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar
from census_scvi.workspace import StageRun

log = logging.getLogger(__name__)

# Label codes of the selected cells, int32 (cells,), and the labels in the order of the codes.
_Labels: TypeAlias = tuple[npt.NDArray[np.int32], list[str]]

# Constants for --dry-run, checked by benchmarks/stages.py. Memory before the first cell: the imports of this stage and
# TileDB's buffers.
_BASE_MEMORY = 0.4e9
# Bytes per non-zero while it is read (two rows of tiles, two copies), and in the shuffle pool.
_BYTES_READ, _BYTES_POOLED = 96.0, 16.0
_SAMPLE_RUNS = 12
_VARIABLE = 0.6
_BYTES_A_NONZERO = {"gzip": 1.9, "none": 8.0}
# Time of the stage, in passes over all counts: one for gene selection, one for writing, the rest for work that does not
# overlap with reading.
_PASSES, _FIXED_SECONDS = 2.3, 1.5


def run(task: Task) -> None:
    """Select cells and genes and write `hv_genes.pkl` and `anndata_model.h5ad`; a killed run resumes."""
    config, artifacts, census, stage = task.config, task.artifacts, task.census, task.run
    _check_columns(census, config)
    if config.fine_tune.model is not None:
        _prepare_fine_tuning(task)
        return
    stage.start()
    cells = select_cells(census, config.training_filter, config.anndata.batch_key)
    _report_cells(cells)
    genes = _genes(stage, census, config, stage.path(artifacts.genes))
    counts = _write(census, cells, genes.feature_ids, config, stage.path(artifacts.prepared))
    counts["genes_below_min_cells"] = genes.below_min_cells
    task.commit([artifacts.prepared, artifacts.genes], counts, census=census.identity)
    log.info("wrote %s: %s cells x %d genes", task.directory / artifacts.prepared, f"{len(cells):,}", counts["genes"])


def _prepare_fine_tuning(task: Task) -> None:
    """Write the cells that the model has not seen, with its genes, and the keys of all cells that it has seen then."""
    # Imported here, because no other run of this stage needs scvi-tools.
    from census_scvi.fine_tuning.selection import select_for_fine_tuning
    from census_scvi.fine_tuning.start import load_for_fine_tuning

    config, artifacts, census, stage = task.config, task.artifacts, task.census, task.run
    model = load_for_fine_tuning(config.fine_tune, config.model, config.census.organism, config.anndata.batch_key)
    genes = model[1].genes
    locate_genes(census, genes, config.genes.min_share, "genes.min_share")
    selection = select_for_fine_tuning(census, config.fine_tune, config.census, model[1], config.training_filter)
    cells, of_selection, seen = selection.training(config.fine_tune, config.seed)
    stage.start()
    log.info(
        "%s new cells in %d new batches, and %s that the model has seen",
        f"{of_selection['new_cells']:,}",
        of_selection["new_batches"],
        f"{of_selection['replayed_cells']:,}",
    )
    if not stage.resumed:
        write_genes(stage.path(artifacts.genes), genes)
    np.save(stage.path(SEEN_CELLS), seen)
    counts = _write(census, cells, genes, config, stage.path(artifacts.prepared)) | of_selection
    written = [artifacts.prepared, artifacts.genes, SEEN_CELLS]
    task.commit(written, counts, census=census.identity, cells_of_model=selection.origins)
    log.info("wrote %s: %s cells x %d genes", task.directory / artifacts.prepared, f"{len(cells):,}", counts["genes"])


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


def _genes(stage: StageRun, census: Census, config: Config, path: Path) -> Selection:
    """Select genes, or read the selection of a killed run."""
    record = stage.path("selection.json")
    if stage.resumed:
        genes = read_genes(path)
        log.info("resuming with %d genes that were selected before", len(genes))
        # A version without genes.min_cells wrote no record; it excluded no genes.
        return Selection(genes, **(json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}))
    selection = select_genes(census, config.training_filter, config.hvg, config.seed, config.genes.min_cells)
    log.info("%d highly variable genes", len(selection.feature_ids))
    if selection.below_min_cells:
        log.info(
            "%s genes were excluded beforehand: detected in fewer than %s cells (genes.min_cells)",
            f"{selection.below_min_cells:,}",
            f"{config.genes.min_cells:,}",
        )
    write_json(record, {"below_min_cells": selection.below_min_cells})
    write_genes(path, selection.feature_ids)  # last: if this file exists, the stage can resume
    return selection


def _write(census: Census, cells: Cells, genes: list[str], config: Config, path: Path) -> dict[str, Any]:
    """Stream the cells to the file; return the counts for the manifest."""
    store = _fill(census, cells, genes, config, path)
    store.join()
    nonzeros, empty = count_nonzeros(path)
    if empty:
        log.warning(
            "%d cells have no counts in the selected genes; they are kept, because they match the filter", empty
        )
    return {
        "cells": len(cells),
        "genes": len(genes),
        "batches": len(cells.batches),
        "batches_of_one_cell": int((cells.batch_sizes() == 1).sum()),
        "nonzeros": nonzeros,
        "cells_without_counts": empty,
    }


def _fill(
    census: Census, cells: Cells, genes: list[str], config: Config, path: Path, part: Part = WHOLE
) -> PreparedStore:
    """Write a part of the cells; different processes may write different parts."""
    var = _var_of(census, genes)
    measurement = config.anndata.protein_measurement
    uns = {PROTEIN_NAMES: np.array(read_protein_names(census, measurement), dtype=object)} if measurement else None
    writer = partial(H5adWriter, var=var, uns=uns, compression=config.anndata.compression)
    store = PreparedStore(path, tile_runs(cells.joinids), config.seed, writer)
    missing, total = store.missing(part), store.n_cells(part)
    done = total - sum(map(len, missing))
    if done:
        log.info("%s of %s cells were written before", f"{done:,}", f"{total:,}")
    runs = [run for pool in missing for run in pool.runs]
    blocks = stream_blocks(census, cells.joinids, var["soma_joinid"].to_numpy(), blocks=runs)
    frames = stream_obs(census, cells.joinids, (pool.cells() for pool in missing), config.anndata.obs_columns)
    counts = (block.counts for block in blocks)
    labels = _labels(census, config, cells)
    obs = (_with_batch(frame, places, cells, labels) for places, frame in frames)
    proteins = None
    if measurement:
        proteins = stream_proteins(census, measurement, cells.joinids, (pool.cells() for pool in missing))
    with progress_bar(total, "prepare", done=done) as bar:
        for written in store.fill(counts, obs, part, proteins=proteins):
            bar.update(written)
    return store


def _var_of(census: Census, genes: list[str]) -> pd.DataFrame:
    """Var of some genes, indexed by feature_id; the soma_joinid of a gene that the Census does not have is -1."""
    var = read_var(census).set_index("feature_id")
    if var.index.isin(genes).sum() == len(genes):
        return var.loc[genes]
    found = var.reindex(genes)
    absent = {
        name: -1 if name == "soma_joinid" else 0 if dtype.kind in "if" else "" for name, dtype in var.dtypes.items()
    }
    return found.astype(object).fillna(absent).astype(var.dtypes)


def _labels(census: Census, config: Config, cells: Cells) -> _Labels | None:
    """Label codes of the selected cells, and the labels; None without `anndata.labels_key`."""
    settings = config.anndata
    if settings.labels_key is None:
        return None
    codes, labels = select_labels(
        census, cells, config.training_filter, settings.labels_key, settings.unlabeled_category
    )
    n_labels = len(labels) - 1
    unlabeled = 100 * float((codes == n_labels).mean())
    log.info("%d labels in %s, %.1f%% of the cells are unlabelled", n_labels, settings.labels_key, unlabeled)
    return codes, labels


def _with_batch(obs: pd.DataFrame, places: npt.NDArray[np.int64], cells: Cells, labels: _Labels | None) -> pd.DataFrame:
    """Obs with the columns `batch` and `labels`, indexed by the position among the selected cells."""
    obs = obs.assign(**{BATCH: pd.Categorical.from_codes(cells.batch_codes[places], categories=cells.batches)})
    if labels:
        codes, categories = labels
        obs = obs.assign(**{LABELS: pd.Categorical.from_codes(codes[places], categories=categories)})
    return obs.set_axis(pd.Index(places.astype(str)))


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
    n_cells = len(cells)
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
        memory=_memory(n_cells, detected.sum() / n_sampled, nonzeros) + GeneTally.memory(len(groups), len(var)),
        disk=kept,
        seconds=_FIXED_SECONDS + _PASSES * seconds / n_sampled * n_cells,
        notes=[
            "genes are not selected yet: disk and memory are estimates from the genes detected most often",
            *(
                ["fine_tune.model is set: only new cells are prepared; scvi-fine-tune.py --dry-run says how many"]
                if config.fine_tune.model is not None
                else []
            ),
            *(
                [f"while it joins its parts, twice as much disk: {human_bytes(2 * kept)}"]
                if len(runs) > PART_POOLS * POOL_RUNS
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
    counts = _write(census, Cells(cells.joinids[rows], cells.batch_codes[rows], cells.batches), genes, config, path)
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
    return _BASE_MEMORY + 25.0 * n_cells + X_TILE * (_BYTES_READ * read + POOL_RUNS * _BYTES_POOLED * written)


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
