"""Read the counts of the chosen cells once and select genes."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from census_scvi.census.cells import Cells
from census_scvi.census.hvg.seurat_v3 import mean_and_variance, normalised_variance, regularised_deviation, top_genes
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.census.open import Census
from census_scvi.census.stream import stream_nonzeros

log = logging.getLogger(__name__)


def select_in_one_pass(
    census: Census, cells: Cells, n_top: int, seed: int, min_cells: int = 0
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Highly variable genes (seurat_v3), and the candidates that they were selected from, bool (genes,) each.

    The selection equals that of scanpy. `cellxgene_census.experimental.pp.highly_variable_genes` selects a few other
    genes: it clips in single precision, and it moves the means at random if the fit fails in a small batch.

    Parameters
    ----------
    census
        The open Census.
    cells
        The cells, and the batches in which genes are ranked.
    n_top
        Number of genes to select.
    seed
        Seed of the jitter, which is used only if a fit fails.
    min_cells
        Genes detected in fewer cells are excluded before the selection.

    Raises
    ------
    ValueError
        A fit fails despite the jitter.
    """
    n_cells = cells.batch_sizes().to_numpy()
    tally = GeneTally(len(n_cells), _n_genes(census))
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        tally.add(batch, gene, count)
    candidates = tally.cells >= min_cells
    if candidates.sum() <= n_top:
        return candidates, candidates
    means, variances = mean_and_variance(tally.sums, tally.squares, n_cells)
    variances[:, ~candidates] = 0  # the fit ignores genes with variance 0
    deviation = np.array(
        [regularised_deviation(mean, variance, seed) for mean, variance in zip(means, variances, strict=True)]
    )
    clip = np.where(candidates, deviation * np.sqrt(n_cells)[:, None] + means, np.inf)
    sums, squares, exact = tally.clipped(clip)
    if not exact.all():
        _read_again(census, cells, clip, sums, squares, ~exact)
    scores = normalised_variance(means, deviation, sums, squares, n_cells)
    return top_genes(np.where(candidates, scores, -1), n_top), candidates


def count_detections(census: Census, cells: Cells) -> npt.NDArray[np.int64]:
    """Number of cells in which each gene is detected, int64 (genes,)."""
    detected = np.zeros(_n_genes(census), dtype=np.int64)
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        detected += np.bincount(gene[(batch >= 0) & (count > 0)], minlength=len(detected))
    return detected


def _n_genes(census: Census) -> int:
    return int(census.experiment.ms["RNA"].X["raw"].shape[1])


def _read_again(
    census: Census,
    cells: Cells,
    clip: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    squares: npt.NDArray[np.float64],
    wanted: npt.NDArray[np.bool_],
) -> None:
    """Compute the clipped sums of (batch, gene) pairs with more large counts than the tally keeps, in place."""
    log.info("%d genes have more large counts than were buffered: reading them again", wanted.any(axis=0).sum())
    sums[wanted], squares[wanted] = 0, 0
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        chosen = (batch >= 0) & wanted[batch, gene]
        batch, gene = batch[chosen], gene[chosen]
        clipped = np.minimum(count[chosen].astype(np.float64), clip[batch, gene])
        np.add.at(sums, (batch, gene), clipped)
        np.add.at(squares, (batch, gene), clipped**2)
