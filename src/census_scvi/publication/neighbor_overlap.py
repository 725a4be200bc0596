"""How far groups of cells lie apart in a space: shares of labels among nearest neighbours, with chance and interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.neighbors.index import NeighborIndex

_RESAMPLES = 500


@dataclass(frozen=True)
class Share:
    """A mean over cells.

    Attributes
    ----------
    value
        Mean share of a cell's nearest neighbours that have its label.
    low, high
        Interval of 95 % (bootstrap over cells).
    chance
        What neighbours drawn at random would give.
    """

    value: float
    low: float
    high: float
    chance: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, chance {self.chance:.3f})"


def label_share(
    points: npt.NDArray[np.floating],
    labels: npt.NDArray[Any],
    *,
    within: npt.NDArray[Any] | None = None,
    n_neighbors: int = 15,
    seed: int = 0,
) -> Share:
    """Share of a cell's nearest neighbours that have its own label.

    Parameters
    ----------
    points
        (cells, dimensions).
    labels
        (cells,): the label, of any kind.
    within
        (cells,): neighbours are sought, and chance is counted, among cells of the same value only; None: all cells.
    n_neighbors
        Neighbors per cell; fewer if its group is small. Cells alone in their group are excluded.
    seed
        Of the bootstrap.

    Returns
    -------
    NaN throughout where no cell has a neighbour.
    """
    groups = np.zeros(len(points), int) if within is None else np.unique(within, return_inverse=True)[1]
    shares, chances = [], []
    for group in np.unique(groups):
        cells = np.flatnonzero(groups == group)
        if len(cells) < 2:
            continue
        neighbors = cells[NeighborIndex(points[cells], exact_cells=len(cells)).others(n_neighbors)]
        shares.append((labels[neighbors] == labels[cells][:, None]).mean(axis=1))
        _, codes, times = np.unique(labels[cells], return_inverse=True, return_counts=True)
        chances.append((times[codes] - 1) / (len(cells) - 1))
    if not shares:
        return Share(*[float("nan")] * 4)
    share = np.concatenate(shares)
    drawn = np.random.default_rng(seed).integers(0, len(share), (_RESAMPLES, len(share)))
    low, high = np.quantile(share[drawn].mean(axis=1), [0.025, 0.975])
    return Share(float(share.mean()), float(low), float(high), float(np.concatenate(chances).mean()))
