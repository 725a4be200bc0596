"""PCA of log-normalised counts: the usual embedding without a model, and the baseline for a model."""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import scanpy as sc
import scipy.sparse as sp
from sklearn.decomposition import PCA

from census_scvi.neighbors.numba_threads import start_numba_threads

COUNTS_PER_CELL = 1e4
_COMPONENTS = 50


def log_normalized(counts: Any, counts_per_cell: float | None = COUNTS_PER_CELL) -> Any:
    """log1p of counts scaled to the same total in every cell, as in scanpy; cells without counts stay 0.

    Parameters
    ----------
    counts
        Sparse or dense (cells, genes): raw counts; not changed.
    counts_per_cell
        Total count per cell; None: the median over cells.

    Returns
    -------
    A matrix of the same kind: float64 if the counts are float64, else float32.
    """
    plain = ad.AnnData(counts.copy())
    start_numba_threads()
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some cells have zero counts")
        sc.pp.normalize_total(plain, target_sum=counts_per_cell)
    sc.pp.log1p(plain)
    return plain.X


def fit_pca(logged: Any, n_components: int = _COMPONENTS, *, seed: int = 0) -> tuple[PCA, npt.NDArray[np.floating]]:
    """scikit-learn's fitted PCA, and the positions (cells, components); fewer components for few cells or genes."""
    pca = PCA(min(n_components, min(logged.shape) - 1), svd_solver="arpack", random_state=seed)
    return pca, pca.fit_transform(logged)


def log_pca(
    counts: Any,
    n_components: int = _COMPONENTS,
    *,
    counts_per_cell: float | None = COUNTS_PER_CELL,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Positions of cells in a PCA of their log-normalised counts.

    Parameters
    ----------
    counts
        Sparse or dense (cells, genes): raw counts; not changed.
    n_components
        Number of components. Few cells or genes give fewer; cells that do not differ give one, which is 0.
    counts_per_cell
        As in `log_normalized`.
    seed
        Seed of the PCA.

    Returns
    -------
    float32 (cells, components).
    """
    logged = log_normalized(counts, counts_per_cell)
    if min(logged.shape) < 2:
        values = np.asarray(sp.csr_matrix(logged).toarray(), np.float32)
        return (values - values.mean(axis=0))[:, :1]
    if not _vary(logged):
        return np.zeros((logged.shape[0], 1), np.float32)
    return np.asarray(fit_pca(logged, n_components, seed=seed)[1], dtype=np.float32)


def _vary(values: Any) -> bool:
    """Whether any column of a matrix has two or more different values."""
    least, most = (sp.csr_matrix(extreme(axis=0)).toarray() for extreme in (values.min, values.max))
    return bool((least != most).any())
