"""Posterior predictive checks: counts that the model generates for cells, compared with the measured counts.

The metrics are those of `scvi.criticism`, which the cards of models on scvi-hub have: coefficients of variation of
cells and genes, and differential expression between cell types. Its own code needs dense counts and half a minute of
compilation. Two of its metrics are not here: R2 has the two sides exchanged, and the ROC AUC compares one-sided scores
with two-sided P values.
"""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import scvi
import torch
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr

from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.reader import Rows
from census_scvi.model.safe import ModelDescription

_SAMPLES = 5
_READ_AT_ONCE = 256
# The cells of the prepared file are shuffled: cells for validation are searched in this many times as many cells.
_SEARCHED = 20
_FEWEST_OF_TYPE, _TOP_GENES = 10, 100

Values = npt.NDArray[np.float64]


def check_predictions(
    model: scvi.model.SCVI, description: ModelDescription, data: PreparedDataModule, n_cells: int, label: str, seed: int
) -> dict[str, Any]:
    """Compare generated with measured counts.

    Parameters
    ----------
    model, description
        The model.
    data
        The prepared cells, and which of them are for training and validation.
    n_cells
        Number of cells of each of the two.
    label
        obs column of the cell types; without it in the file, differential expression is not compared.
    seed
        Seed of the choice of cells and of the generated counts.

    Returns
    -------
    `cells`: number of cells for training and validation. `cell_variation`: agreement of the coefficients of variation
    of the cells for training, and of those for validation; `gene_variation`: of the genes over all cells. Each has
    `mean_absolute_error`, `pearson` and `spearman`. `differential_expression`: for each type with ten cells or more,
    `type`, `cells`, `gene_f1` of the 100 genes (at most a tenth) with the highest scores compared with the other types,
    and `lfc_pearson`, `lfc_spearman` and `lfc_mean_absolute_error` of the log fold changes of all genes.
    """
    rows, held_out = _chosen(data, n_cells, seed)
    cells = data.cells.read([(int(row), int(row) + 1) for row in rows])
    codes = pd.Index(description.batches).get_indexer(data.cells.batches)[cells.batch_codes]
    counts = cells.csr(data.cells.n_genes)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        of_cells, of_genes, generated = _generated(model, counts, codes, cells)
    measured = _variation(counts.sum(axis=1), counts.power(2).sum(axis=1), counts.shape[1])
    parts = {"training": ~held_out, "validation": held_out}
    found: dict[str, Any] = {
        "cells": {name: int(chosen.sum()) for name, chosen in parts.items()},
        "cell_variation": {
            name: _agreement(of_cells[chosen], measured[chosen]) for name, chosen in parts.items() if chosen.sum() > 1
        },
        "gene_variation": _agreement(
            of_genes, _variation(counts.sum(axis=0), counts.power(2).sum(axis=0), counts.shape[0])
        ),
        "differential_expression": [],
    }
    if data.cells.has_obs(label):
        types = data.cells.obs([label], "gates.label")[label].iloc[rows].astype(str).to_numpy()
        found["differential_expression"] = _differential_expression(counts, generated, types)
    return found


def _chosen(data: PreparedDataModule, n_cells: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Ascending rows of cells for training and validation, and whether each is for validation."""
    numbers, searched = generator(seed, Stream.PREDICTED_CELLS), slice(0, _SEARCHED * n_cells)
    chosen = []
    for mask in (data.training[searched], data.validation[searched]):
        places = np.flatnonzero(mask)
        chosen.append(places[draw(len(places), n_cells, numbers)])
    rows = np.sort(np.concatenate(chosen))
    return rows, data.validation[rows]


def _generated(
    model: scvi.model.SCVI, counts: sp.csr_matrix, batch_codes: npt.NDArray[np.int64], cells: Rows
) -> tuple[Values, Values, sp.csr_matrix]:
    """Mean coefficient of variation of each cell and gene over some samples, and the counts of the first sample."""
    n_cells, n_genes = counts.shape
    of_cells, first = np.zeros(n_cells), []
    total, squares = np.zeros((_SAMPLES, n_genes)), np.zeros((_SAMPLES, n_genes))
    module = model.module.eval()
    for start in range(0, n_cells, _READ_AT_ONCE):
        block = slice(start, start + _READ_AT_ONCE)
        tensors = {
            "X": torch.from_numpy(counts[block].toarray()),
            "batch": torch.from_numpy(batch_codes[block, None]),
            "labels": torch.zeros((len(batch_codes[block]), 1), dtype=torch.int64),
        }
        if cells.proteins is not None:
            tensors["proteins"] = torch.from_numpy(cells.proteins[block])
        for number in range(_SAMPLES):
            sample = module.sample(tensors, n_samples=1)
            values = (sample[0] if isinstance(sample, tuple) else sample).cpu().numpy().astype(np.float64)
            of_cells[block] += _variation(values.sum(axis=1), np.square(values).sum(axis=1), n_genes) / _SAMPLES
            total[number] += values.sum(axis=0)
            squares[number] += np.square(values).sum(axis=0)
            if number == 0:
                first.append(sp.csr_matrix(values, dtype=np.float32))
    of_genes = np.array([_variation(one, two, n_cells) for one, two in zip(total, squares, strict=True)])
    return of_cells, of_genes.mean(axis=0), sp.vstack(first, format="csr")


def _variation(total: npt.ArrayLike, squares: npt.ArrayLike, number: int) -> Values:
    """Coefficients of variation from sums over `number` values and sums of their squares; 0 if all values are 0."""
    mean, square = (np.asarray(values, np.float64).ravel() / number for values in (total, squares))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 0)


def _agreement(generated: Values, measured: Values) -> dict[str, float | None]:
    """Error and correlations; None: not defined, as the correlation with values that are all equal."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", ConstantInputWarning)
        found = {
            "mean_absolute_error": np.abs(generated - measured).mean(),
            "pearson": pearsonr(measured, generated)[0],
            "spearman": spearmanr(measured, generated)[0],
        }
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


def _differential_expression(
    measured: sp.csr_matrix, generated: sp.csr_matrix, types: npt.NDArray[np.object_]
) -> list[dict[str, Any]]:
    """Agreement of the genes of each type in the measured and in the generated counts; the largest type first."""
    names, numbers = np.unique(types, return_counts=True)
    names = names[np.argsort(-numbers, kind="stable")][: int((numbers >= _FEWEST_OF_TYPE).sum())]
    kept = np.flatnonzero(np.isin(types, names))
    if len(names) < 2:
        return []
    tables = [_ranked(counts[kept], types[kept]) for counts in (measured, generated)]
    return [
        {"type": str(name), "cells": int((types == name).sum()), **_agreement_of_genes(*(of[name] for of in tables))}
        for name in names
    ]


def _ranked(counts: sp.csr_matrix, types: npt.NDArray[np.object_]) -> dict[str, pd.DataFrame]:
    """For each type: statistics of its genes compared with the other cells (t-test), by gene."""
    cells = ad.AnnData(
        counts.copy(), obs=pd.DataFrame({"type": pd.Categorical(types)}, [str(n) for n in range(len(types))])
    )
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.tl.rank_genes_groups(cells, "type", method="t-test", use_raw=False)
    return {name: sc.get.rank_genes_groups_df(cells, name).set_index("names").sort_index() for name in set(types)}


def _agreement_of_genes(measured: pd.DataFrame, generated: pd.DataFrame) -> dict[str, float | None]:
    n_top = min(_TOP_GENES, max(len(measured) // 10, 1))
    top = [set(table["scores"].nlargest(n_top).index) for table in (measured, generated)]
    changes = [table["logfoldchanges"].to_numpy(np.float64) for table in (generated, measured)]
    of_changes = {f"lfc_{name}": value for name, value in _agreement(*changes).items()}
    return {"gene_f1": len(top[0] & top[1]) / n_top, **of_changes}
