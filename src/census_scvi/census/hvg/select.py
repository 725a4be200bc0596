"""Select genes after one pass over the counts of the chosen cells; some pairs of gene and batch may need a second one.

Each pass may be made by several processes, each with a part of the cells; the result is the same (see `in_parts`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from census_scvi.census.cells import Cells
from census_scvi.census.hvg.seurat_v3 import mean_and_variance, normalised_variance, regularised_deviation, top_genes
from census_scvi.census.hvg.tally import GeneTally, n_kept
from census_scvi.census.open import Census
from census_scvi.census.schema import X_TILE
from census_scvi.census.stream import stream_nonzeros, tile_runs
from census_scvi.files.parts import WHOLE, Part

log = logging.getLogger(__name__)

# Selected genes, and candidates that they were selected from, bool (genes,) each.
Masks = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
# Of each pair (batch, gene) to read again: number of counts above the clip value, sum of the others, of their squares.
Recount = npt.NDArray[np.float64]


def select_in_one_pass(census: Census, cells: Cells, n_top: int, seed: int, min_cells: int = 0) -> Masks:
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
    tally, _ = tally_genes(census, cells)
    found = fit(tally, cells, n_top, seed, min_cells)
    if isinstance(found, Fit) and found.again.any():
        found.complete(read_again(census, cells, found))
    return found.select(n_top) if isinstance(found, Fit) else found


def tally_genes(census: Census, cells: Cells, part: Part = WHOLE) -> tuple[GeneTally, npt.NDArray[np.int64]]:
    """Tally of the batches that have cells in a part of the cells, and these batches."""
    rows = _rows(cells, part)
    n_genes, n_batches = _n_genes(census), len(cells.batches)
    codes = cells.batch_codes[rows]
    batches = np.flatnonzero(np.bincount(codes, minlength=n_batches))
    tally = GeneTally(len(batches), n_genes, kept=n_kept(n_batches, n_genes))
    if len(batches) < n_batches:
        place = np.zeros(n_batches, np.int32)
        place[batches] = np.arange(len(batches), dtype=np.int32)
        codes = place[codes]
    if len(batches):
        for batch, gene, count in stream_nonzeros(census, cells.joinids[rows], codes):
            tally.add(batch, gene, count)
    return tally, batches


@dataclass
class Fit:
    """What the score of each gene in each batch is computed from.

    Attributes
    ----------
    n_cells
        int64 (batches,): cells of each batch.
    candidates
        bool (genes,).
    means, deviation
        float64 (batches, genes): mean, and expected standard deviation of a gene with this mean.
    sums, squares
        float64 (batches, genes): sums of the clipped counts and of their squares.
    again
        bool (batches, genes): the sums are not known, because more counts may exceed the clip value than were kept.
    """

    n_cells: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.bool_]
    means: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]
    sums: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    again: npt.NDArray[np.bool_]

    @property
    def clip(self) -> npt.NDArray[np.float64]:
        """Value at which the counts are clipped, float64 (batches, genes)."""
        return np.where(self.candidates, self.deviation * np.sqrt(self.n_cells)[:, None] + self.means, np.inf)

    def complete(self, recount: Recount) -> None:
        """Set the sums that were not known."""
        limit = self.clip[self.again]
        self.sums[self.again] = recount[1] + recount[0] * limit
        self.squares[self.again] = recount[2] + recount[0] * limit**2

    def select(self, n_top: int) -> Masks:
        """The genes with the highest scores, and the candidates."""
        scores = normalised_variance(self.means, self.deviation, self.sums, self.squares, self.n_cells)
        return top_genes(np.where(self.candidates, scores, -1), n_top), self.candidates

    def save(self, file: IO[bytes]) -> None:
        """Write it to a file."""
        np.savez(file, **vars(self))

    @classmethod
    def load(cls, file: IO[bytes]) -> Fit:
        """Read a file."""
        with np.load(file) as saved:
            return cls(**saved)


def fit(tally: GeneTally, cells: Cells, n_top: int, seed: int, min_cells: int) -> Fit | Masks:
    """Fit the variance to the mean in each batch; the masks, if there are no more candidates than wanted genes.

    ValueError if a fit fails despite the jitter.
    """
    n_cells = cells.batch_sizes().to_numpy()
    candidates = tally.cells >= min_cells
    if candidates.sum() <= n_top:
        return candidates, candidates
    means, variances = mean_and_variance(tally.sums, tally.squares, n_cells)
    variances[:, ~candidates] = 0  # the fit ignores genes with variance 0
    deviation = np.array(
        [regularised_deviation(mean, variance, seed) for mean, variance in zip(means, variances, strict=True)]
    )
    nothing = np.empty((0, 0))
    found = Fit(n_cells, candidates, means, deviation, nothing, nothing, np.empty((0, 0), bool))
    found.sums, found.squares, exact = tally.clipped(found.clip)
    found.again = ~exact
    if found.again.any():
        genes = found.again.any(axis=0).sum()
        log.info("%d genes have more large counts than were kept: their counts are read again", genes)
    return found


def read_again(census: Census, cells: Cells, found: Fit, part: Part = WHOLE) -> Recount:
    """Counts above the clip value, and sums of the others, of a part of the cells; several parts are added."""
    rows, clip, again = _rows(cells, part), found.clip, found.again
    place = np.cumsum(again).reshape(again.shape) - 1
    recount = np.zeros((3, again.sum()))
    if rows.start == rows.stop:
        return recount
    for batch, gene, count in stream_nonzeros(census, cells.joinids[rows], cells.batch_codes[rows]):
        wanted = (batch >= 0) & again[batch, gene]
        batch, gene, value = batch[wanted], gene[wanted], count[wanted].astype(np.float64)
        below = value <= clip[batch, gene]
        for total, values in zip(recount, (~below, value * below, value**2 * below), strict=True):
            np.add.at(total, place[batch, gene], values)
    return recount


def count_detections(census: Census, cells: Cells) -> npt.NDArray[np.int64]:
    """Number of cells in which each gene is detected, int64 (genes,)."""
    detected = np.zeros(_n_genes(census), dtype=np.int64)
    for batch, gene, count in stream_nonzeros(census, cells.joinids, cells.batch_codes):
        detected += np.bincount(gene[(batch >= 0) & (count > 0)], minlength=len(detected))
    return detected


def _rows(cells: Cells, part: Part) -> slice:
    """Positions of the cells of a part, which are stored in whole rows of tiles."""
    if part == WHOLE:
        return slice(0, len(cells))
    runs = part.take(tile_runs(cells.joinids, 2 * X_TILE))
    return slice(runs[0][0], runs[-1][1]) if runs else slice(0, 0)


def _n_genes(census: Census) -> int:
    return int(census.experiment.ms["RNA"].X["raw"].shape[1])
