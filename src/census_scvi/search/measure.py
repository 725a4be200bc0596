"""Measures of a trained trial on the validation cells: active units, and scib-metrics' scores of the embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.errors import UserError
from census_scvi.files.json_values import json_values
from census_scvi.metrics.biology import biology
from census_scvi.metrics.mixing import mixing
from census_scvi.metrics.score import VAGUE, Score
from census_scvi.metrics.space import Space
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import load_safe

# scib-metrics' scores that are averaged: biology of the first label, mixing of the first batch column.
BIO = ("leiden_nmi", "leiden_ari", "silhouette_label", "isolated_labels", "clisi")
BATCH = ("silhouette_batch", "ilisi", "kbet")
# A dimension is active if the variance of its posterior mean over cells is larger (Burda et al. 2016).
_ACTIVE_VARIANCE = 0.01

Names = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Columns:
    """obs columns that are measured.

    Attributes
    ----------
    labels, batches
        Columns that the embedding should preserve, and that it should mix; the first of each counts for the metric.
    donors
        Column whose groups are held out and resampled as a whole; None: cells.
    """

    labels: list[str]
    batches: list[str]
    donors: str | None


def measure(
    model_folder: Path, data: PreparedDataModule, columns: Columns, *, n_cells: int, seed: int
) -> dict[str, Any]:
    """Measure a model on the validation cells.

    Parameters
    ----------
    model_folder
        The trained model in its safe form.
    data
        The cells, with the same validation cells for all trials.
    columns
        The obs columns; those that the prepared file lacks are not measured.
    n_cells
        Number of validation cells to measure; of more, this number is drawn at random.
    seed
        Seed of this draw, of clusters and classifiers; the same for all trials.

    Returns
    -------
    `active_units`; `bio` and `batch` (None if they cannot be measured); `scores`, a list of all scores; `problems`, why
    something could not be measured.
    """
    validation = np.flatnonzero(data.validation)
    rows = validation[draw(len(validation), n_cells, generator(seed, Stream.MEASURED_CELLS))]
    latent = _embed(model_folder, data, rows)
    scores, problems = _scores(latent, _obs(data, columns, rows), columns, seed)
    return {
        "cells": len(rows),
        "active_units": int((latent.var(axis=0) > _ACTIVE_VARIANCE).sum()),
        "bio": _mean(scores, BIO, columns.labels[:1]),
        "batch": _mean(scores, BATCH, columns.batches[:1]),
        "scores": json_values([asdict(score) for score in scores]),
        "problems": problems,
    }


def _embed(model_folder: Path, data: PreparedDataModule, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Posterior means of some cells, float32 (cells, n_latent)."""
    cells = data.cells
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    blocks = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]
    read = cells.read(blocks)
    model, _ = load_safe(model_folder)
    proteins = cells.protein_counts_of(rows) if cells.proteins and hasattr(model.module, "n_input_proteins") else None
    return Encoder(model)(read.csr(cells.n_genes), read.batch_codes, proteins).mean


def _obs(data: PreparedDataModule, columns: Columns, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
    """The columns that the prepared file has, of some cells."""
    wanted = [*columns.labels, *columns.batches, *([columns.donors] if columns.donors else []), "dataset_id"]
    known = [name for name in dict.fromkeys(wanted) if data.cells.has_obs(name)]
    return data.cells.obs(known, "evaluate").iloc[rows].reset_index(drop=True)


def _scores(
    latent: npt.NDArray[np.float32], obs: pd.DataFrame, columns: Columns, seed: int
) -> tuple[list[Score], list[str]]:
    """All scores, and why something could not be measured."""
    scores: list[Score] = []
    problems: list[str] = []
    space = Space(latent, np.arange(len(latent)), seed)
    labels = {name: _labels(obs[name]) for name in columns.labels if name in obs}
    batches = {name: obs[name].astype(str).to_numpy(dtype=object) for name in columns.batches if name in obs}
    problems += [f"the prepared file has no obs column {name}" for name in columns.labels if name not in obs]
    problems += [f"the prepared file has no obs column {name}" for name in columns.batches if name not in obs]
    donors = _donors(obs, columns.donors)
    whole = next(iter(batches.values()), np.full(len(obs), "", dtype=object))
    inner = next(iter(labels), "")
    within = labels.get(inner, np.full(len(obs), None, dtype=object))
    for column, values in labels.items():
        _try(scores, problems, partial(biology, space, column, values, donors, whole))
    for column, values in batches.items():
        _try(scores, problems, partial(mixing, space, column, values, values, inner, within, donors))
    return scores, problems


def _try(scores: list[Score], problems: list[str], measurement: Callable[[], list[Score]]) -> None:
    try:
        scores += measurement()
    except UserError as error:
        problems.append(str(error))


def _labels(column: pd.Series) -> Names:
    """Labels, object (cells,); None for missing and uninformative ones."""
    values = column.astype(object).where(column.notna(), None)
    return np.array([None if value is None or str(value) in VAGUE else str(value) for value in values], dtype=object)


def _donors(obs: pd.DataFrame, column: str | None) -> Names | None:
    """Donor of each cell with its dataset, since two studies may use the same names; None without such a column."""
    if column is None or column not in obs:
        return None
    dataset = obs["dataset_id"].astype(str) if "dataset_id" in obs else ""
    return (dataset + "|" + obs[column].astype(str)).to_numpy(dtype=object)


def _mean(scores: Sequence[Score], names: Sequence[str], columns: Sequence[str]) -> float | None:
    """Mean of some scores of a column; None if one of the column's scores is missing or not a number."""
    values = [score.value for score in scores if score.metric in names and score.column in columns]
    return float(np.mean(values)) if values and np.isfinite(values).all() else None
