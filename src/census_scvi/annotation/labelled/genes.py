"""Most variable genes of labelled cells (seurat_v3), in memory."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from census_scvi.census.hvg.seurat_v3 import mean_and_variance, normalised_variance, regularised_deviation, top_genes

log = logging.getLogger(__name__)

_FEWEST_CELLS = 3  # a gene is detected in at least this number of cells
_FEWEST_IN_BATCH = 50  # cells of a batch in which genes are ranked


def variable_genes(counts: sp.csr_matrix, batch: npt.NDArray[np.object_], n_top: int) -> npt.NDArray[np.int64]:
    """Positions of the most variable genes, int64 (genes,), ascending.

    Genes are ranked within each batch, as `census.hvg.select` does for a Census. Batches of few cells are ranked
    together. All detected genes are returned if they are no more than asked for, or if no batch can be ranked.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts.
    batch
        object (cells,).
    n_top
        Number of genes.
    """
    detected = counts.getnnz(axis=0) >= _FEWEST_CELLS
    if detected.sum() <= n_top:
        return np.flatnonzero(counts.getnnz(axis=0))
    names, codes = np.unique(batch.astype(str), return_inverse=True)
    few = np.bincount(codes) < _FEWEST_IN_BATCH
    codes = np.where(few[codes], len(names), codes)
    variances = []
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        try:
            variances.append(_normalised(counts[rows], detected))
        except ValueError as error:  # the fit needs some different means
            log.debug("genes are not ranked in %s cells of a batch: %s", len(rows), error)
    if not variances:
        return np.flatnonzero(detected)
    return np.flatnonzero(top_genes(np.where(detected, np.stack(variances), -1), n_top))


def _normalised(counts: sp.csr_matrix, detected: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Variance of the standardised, clipped counts of one batch, float64 (genes,)."""
    counts = sp.csr_matrix(counts, dtype=np.float64)
    n_cells = np.array([counts.shape[0]])
    means, variances = mean_and_variance(_sums(counts), _sums(counts.power(2)), n_cells)
    variances[:, ~detected] = 0  # the fit ignores genes with variance 0
    deviation = regularised_deviation(means[0], variances[0], seed=0)
    limit = means[0] + deviation * np.sqrt(counts.shape[0])
    counts.data = np.minimum(counts.data, limit[counts.indices])
    return normalised_variance(means, deviation[None], _sums(counts), _sums(counts.power(2)), n_cells)[0]


def _sums(counts: sp.csr_matrix) -> npt.NDArray[np.float64]:
    return np.asarray(counts.sum(axis=0), np.float64).reshape(1, -1)
