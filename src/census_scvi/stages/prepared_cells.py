"""Prepared cells: raw counts of selected genes, obs and proteins, written from the Census to one .h5ad in parts."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.cells import Cells, select_labels
from census_scvi.census.genes import read_var
from census_scvi.census.open import Census
from census_scvi.census.proteins import read_protein_names, stream_proteins
from census_scvi.census.stream import stream_blocks, stream_obs, tile_runs
from census_scvi.config.run_names import BATCH, LABELS, PROTEIN_NAMES
from census_scvi.counts.prepared_store import PreparedStore, count_nonzeros
from census_scvi.counts.writer import H5adWriter
from census_scvi.files.parts import WHOLE, Part
from census_scvi.settings import Config
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

# Label codes of the selected cells, int32 (cells,), and the labels in the order of the codes.
_Labels: TypeAlias = tuple[npt.NDArray[np.int32], list[str]]


def join_cells(
    census: Census, cells: Cells, genes: list[str], config: Config, path: Path, n_parts: int = 1
) -> dict[str, Any]:
    """Join the written parts; return the counts for the manifest."""
    _store(census, cells, genes, config, path, n_parts).join()
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


def _store(census: Census, cells: Cells, genes: list[str], config: Config, path: Path, n_parts: int) -> PreparedStore:
    measurement = config.anndata.protein_measurement
    uns = {PROTEIN_NAMES: np.array(read_protein_names(census, measurement), dtype=object)} if measurement else None
    writer = partial(H5adWriter, var=_var_of(census, genes), uns=uns, compression=config.anndata.compression)
    return PreparedStore(path, tile_runs(cells.joinids), config.seed, writer, n_parts)


def write_cells(census: Census, cells: Cells, genes: list[str], config: Config, path: Path, part: Part = WHOLE) -> None:
    """Write what is missing of a part of the cells; different processes may write different parts.

    Parameters
    ----------
    census
        The open Census.
    cells
        All cells of the file.
    genes
        feature_ids, in the order of the columns; a gene that the Census does not have is a column of zeros.
    config
        The settings.
    path
        The file; its portions are written to the same folder.
    part
        The part.
    """
    store, measurement = _store(census, cells, genes, config, path, part.of), config.anndata.protein_measurement
    missing, total = store.missing(part), store.n_cells(part)
    done = total - sum(map(len, missing))
    if done:
        log.info("%s of %s cells were written before", f"{done:,}", f"{total:,}")
    if not missing:
        return
    columns = _var_of(census, genes)["soma_joinid"].to_numpy()
    blocks = stream_blocks(census, cells.joinids, columns, blocks=[run for pool in missing for run in pool.runs])
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
