"""seurat_v3 from moments: regularised deviations, clip values, normalised variances, ranks.

Stuart et al. 2019, https://doi.org/10.1016/j.cell.2019.05.031, as implemented by `highly_variable_genes` in scanpy and
cellxgene-census. Scores equal those of scanpy. Scores of cellxgene-census differ, because it clips in single precision.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from skmisc.loess import loess

_SPAN = 0.3
_FIRST_JITTER, _LARGEST_JITTER = 1e-18, 1e-6


def mean_and_variance(
    sums: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], n_cells: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and variance (ddof 1), float64 (batches, genes), from sums over `n_cells` (batches,) cells."""
    n = n_cells[:, None].astype(np.float64)
    means = sums / n
    variances = np.maximum(squares - n * means**2, 0) / np.maximum(n - 1, 1)
    # A gene with the same count in all cells has variance 0; a smaller value is a rounding error.
    variances[variances <= 1e-12 * means**2] = 0
    return means, variances


def regularised_deviation(
    means: npt.NDArray[np.float64], variances: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.float64]:
    """Expected standard deviation of a gene with this mean in a batch, float64 (genes,).

    It comes from a loess fit of log variance to log mean. If the fit fails, as it may in batches of few cells, it is
    repeated with a seeded jitter of the means, ten times larger each time.

    Raises
    ------
    ValueError
        The fit fails with every jitter from 1e-18 to less than 1e-6.
    """
    expected = np.zeros(len(means))
    varies = variances > 0
    if varies.any():
        x, y = np.log10(means[varies]), np.log10(variances[varies])
        expected[varies] = _fit(x, y, seed)
    return np.sqrt(10**expected)


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    jitter = 0.0
    while True:
        moved = x + np.random.default_rng(seed).uniform(-jitter, jitter, len(x)) if jitter else x
        try:
            model = loess(moved, y, span=_SPAN, degree=2)
            model.fit()
            return np.asarray(model.outputs.fitted_values)
        except ValueError:
            jitter = jitter * 10 if jitter else _FIRST_JITTER
            if jitter >= _LARGEST_JITTER:
                raise


def normalised_variance(
    means: npt.NDArray[np.float64],
    deviation: npt.NDArray[np.float64],
    clipped_sums: npt.NDArray[np.float64],
    clipped_squares: npt.NDArray[np.float64],
    n_cells: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Variance of the standardised, clipped counts, float64 (batches, genes); 0 in batches of one cell."""
    n = n_cells[:, None].astype(np.float64)
    variances = (n * means**2 + clipped_squares - 2 * clipped_sums * means) / (np.maximum(n - 1, 1) * deviation**2)
    variances[n_cells < 2] = 0
    return variances


def top_genes(variances: npt.NDArray[np.float64], n_top: int) -> npt.NDArray[np.bool_]:
    """Select the top genes, bool (genes,).

    Genes are ranked within each batch. They are sorted by the median of their ranks in the batches where they are among
    the first `n_top`, then by the number of these batches (descending), then by their position in var.
    """
    ranks = np.argsort(np.argsort(-variances, axis=1, kind="stable"), axis=1, kind="stable").astype(np.float64)
    ranks[ranks >= n_top] = np.nan
    n_batches = np.isfinite(ranks).sum(axis=0)
    median = np.full(ranks.shape[1], np.inf)
    ranked = n_batches > 0
    median[ranked] = np.nanmedian(ranks[:, ranked], axis=0)
    order = np.lexsort((np.arange(len(median)), -n_batches, median))
    chosen = np.zeros(len(median), dtype=bool)
    chosen[order[:n_top]] = True
    return chosen
