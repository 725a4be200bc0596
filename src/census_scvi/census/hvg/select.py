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


def select_in_one_pass(census: Census, cells: Cells, n_top: int, seed: int) -> npt.NDArray[np.bool_]:
    """The genes that `cellxgene_census.experimental.pp.highly_variable_genes` selects, bool (genes,).

    Parameters
    ----------
    census
        The open Census.
    cells
        The cells and the batches to rank in.
    n_top
        Genes to select.
    seed
        Seed of the jitter in fits that fail without.

    Raises
    ------
    ValueError
        A fit fails in spite of jitter.
    """
    n_cells = cells.batch_sizes().to_numpy()
    n_genes = census.experiment.ms["RNA"].X["raw"].shape[1]
    tally = GeneTally(len(n_cells), n_genes)
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        tally.add(batch, gene, count)
    means, variances = mean_and_variance(tally.sums, tally.squares, n_cells)
    deviation = np.array(
        [regularised_deviation(mean, variance, seed) for mean, variance in zip(means, variances, strict=True)]
    )
    clip = deviation * np.sqrt(n_cells)[:, None] + means
    sums, squares, exact = tally.clipped(clip)
    if not exact.all():
        _read_again(census, cells, clip, sums, squares, ~exact)
    return top_genes(normalised_variance(means, deviation, sums, squares, n_cells), n_top)


def _read_again(
    census: Census,
    cells: Cells,
    clip: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    squares: npt.NDArray[np.float64],
    wanted: npt.NDArray[np.bool_],
) -> None:
    """Fill in the clipped sums that the tally could not give: of (batch, gene) pairs with very many large counts."""
    log.info("%d genes have more large counts than were kept: reading them again", wanted.any(axis=0).sum())
    sums[wanted], squares[wanted] = 0, 0
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        chosen = (batch >= 0) & wanted[batch, gene]
        batch, gene = batch[chosen], gene[chosen]
        clipped = np.minimum(count[chosen].astype(np.float64), clip[batch, gene])
        np.add.at(sums, (batch, gene), clipped)
        np.add.at(squares, (batch, gene), clipped**2)
