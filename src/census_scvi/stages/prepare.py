"""Stage prepare: the unique cells and the highly variable genes, as one .h5ad of raw counts."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from census_scvi.census.cells import Cells, require_columns, select_cells, training_filter
from census_scvi.census.genes import read_var, select_genes, write_genes
from census_scvi.census.open import Census, open_census
from census_scvi.census.stream import stream_blocks
from census_scvi.config import Config
from census_scvi.counts.writer import H5adWriter
from census_scvi.stages.plan import Plan
from census_scvi.workspace import Artifacts, StageRun, Workspace

log = logging.getLogger(__name__)

STAGE = "prepare"
KEYS = ("census", "hvg", "anndata", "seed")
BLOCK_CELLS = 2048
# Resident before the first cell: the imports of this stage, and TileDB's buffers and pool.
_BASE_MEMORY = 1.0e9


def run(config: Config, *, force: bool = False) -> None:
    """Select cells and genes and write `hv_genes.pkl` and `anndata_model.h5ad`."""
    with Workspace(config.directory).locked(STAGE) as workspace, open_census(config.census) as census:
        stage = workspace.begin(STAGE, config, KEYS, {"census": census.identity}, force=force)
        if stage.done:
            log.info("%s is done for these settings in %s; --force does it again", STAGE, config.directory)
            return
        _check_columns(census, config)
        cells = select_cells(census, training_filter(config), config.anndata.batch_key)
        _report_cells(cells)
        genes = select_genes(census, training_filter(config), config.hvg, config.seed)
        log.info("%d highly variable genes", len(genes))
        counts = _write(stage, census, cells, genes, Artifacts.of(config))
        artifacts = Artifacts.of(config)
        stage.commit([artifacts.prepared, artifacts.genes], counts, census=census.identity)
        log.info("wrote %s: %s cells x %d genes", config.directory / artifacts.prepared, f"{len(cells):,}", len(genes))


def _check_columns(census: Census, config: Config) -> None:
    """Every column that is named is there, before any work is done."""
    require_columns(census, config.anndata.batch_key, "anndata.batch_key")
    require_columns(census, config.hvg.hvg_batch, "hvg.hvg_batch")
    if config.hvg.min_genes:
        require_columns(census, ["nnz"], "hvg.min_genes")


def _report_cells(cells: Cells) -> None:
    log.info("%s cells in %d batches", f"{len(cells):,}", len(cells.batches))
    sizes = cells.batch_sizes()
    if single := list(sizes.index[sizes == 1]):
        log.warning(
            "%d batches have one cell, the first %r: scVI cannot tell such a cell from its batch;"
            " they are kept (leave them out with census.obs_query_model)",
            len(single),
            single[0],
        )


def _write(stage: StageRun, census: Census, cells: Cells, genes: list[str], artifacts: Artifacts) -> dict[str, Any]:
    """Stream the cells to the file; returns what was counted."""
    var = read_var(census).set_index("feature_id").loc[genes]
    write_genes(stage.path(artifacts.genes), genes)
    nonzeros, empty = 0, 0
    with (
        H5adWriter(stage.path(artifacts.prepared), var) as writer,
        tqdm(total=len(cells), desc="prepare", unit=" cells", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        for block in stream_blocks(census, cells.joinids, var["soma_joinid"].to_numpy(), block_size=BLOCK_CELLS):
            stop = block.start + len(block.obs)
            codes = cells.batch_codes[block.start : stop]
            obs = block.obs.assign(batch=pd.Categorical.from_codes(codes, categories=cells.batches))
            obs.index = pd.Index([str(i) for i in range(block.start, stop)])
            writer.append(obs, counts=block.counts)
            nonzeros += block.counts.nnz
            empty += int((np.diff(block.counts.indptr) == 0).sum())
            bar.update(len(obs))
    if empty:
        log.warning("%d cells have no count in the selected genes; they are kept, as the filter says", empty)
    return {
        "cells": len(cells),
        "genes": len(genes),
        "batches": len(cells.batches),
        "batches_of_one_cell": int((cells.batch_sizes() == 1).sum()),
        "nonzeros": nonzeros,
        "cells_without_counts": empty,
    }


def plan(config: Config) -> Plan:
    """Cells and genes from the Census, the rest from a block that is read and timed."""
    with open_census(config.census) as census:
        _check_columns(census, config)
        cells = select_cells(census, training_filter(config), config.anndata.batch_key)
        var = read_var(census)
        n_genes = min(config.hvg.top_n_hvg, len(var))
        sample = cells.joinids[len(cells) // 2 :][:BLOCK_CELLS]
        started = time.monotonic()
        block = next(iter(stream_blocks(census, sample, var["soma_joinid"].to_numpy(), block_size=BLOCK_CELLS)))
        seconds = (time.monotonic() - started) / len(sample) * len(cells)
        detected = np.sort(np.bincount(block.counts.indices, minlength=len(var)))[::-1]
    nonzeros = detected[:n_genes].sum() / len(sample) * len(cells)
    artifacts = Artifacts.of(config)
    return Plan(
        STAGE,
        reads=[f"{census.identity['uri']} ({config.census.organism}), cells {training_filter(config) or 'all'}"],
        writes=[str(config.directory / name) for name in (artifacts.prepared, artifacts.genes)],
        cells=len(cells),
        genes=n_genes,
        memory=_BASE_MEMORY + 12.0 * len(cells) + 12.0 * BLOCK_CELLS * detected.sum() / len(sample) * 4,
        disk=nonzeros * 3.5 + 60.0 * len(cells),
        seconds=4 * seconds,  # gene selection reads the counts twice and computes on them; writing reads them once
        notes=["genes are not selected yet: disk is for the genes detected most often, so an upper bound"],
    )
