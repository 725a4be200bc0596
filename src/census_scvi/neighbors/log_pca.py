"""PCA of log-normalised counts: the space that people use without a model, and that a model is compared with."""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import scanpy as sc
import scipy.sparse as sp
from sklearn.decomposition import PCA

COUNTS_PER_CELL = 1e4
_COMPONENTS = 50


def log_normalized(counts: Any, counts_per_cell: float | None = COUNTS_PER_CELL) -> Any:
    """log1p of counts scaled to the same total in every cell, as scanpy does it; cells without counts stay 0.

    Parameters
    ----------
    counts
        Sparse or dense (cells, genes): raw counts; not changed.
    counts_per_cell
        The total; None: the median of the cells.

    Returns
    -------
    The same kind of matrix: float64 for float64, else float32.
    """
    plain = ad.AnnData(counts.copy())
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some cells have zero counts")
        sc.pp.normalize_total(plain, target_sum=counts_per_cell)
    sc.pp.log1p(plain)
    return plain.X


def fit_pca(logged: Any, n_components: int = _COMPONENTS, *, seed: int = 0) -> tuple[PCA, npt.NDArray[np.floating]]:
    """scikit-learn's PCA, fitted, and the positions (cells, components); of few cells or genes there are fewer."""
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
        Dimensions. Of few cells or genes there are fewer; of cells that do not differ there is one, which is 0.
    counts_per_cell
        As of `log_normalized`.
    seed
        Of the PCA.

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
    """Whether a column of a matrix has two values."""
    least, most = (sp.csr_matrix(extreme(axis=0)).toarray() for extreme in (values.min, values.max))
    return bool((least != most).any())
