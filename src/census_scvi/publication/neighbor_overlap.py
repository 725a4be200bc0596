"""Separation of groups of cells: share of nearest neighbours with the same label, with chance level and interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.neighbors.index import NeighborIndex

_RESAMPLES = 500


@dataclass(frozen=True)
class Share:
    """Mean share over cells.

    Attributes
    ----------
    value
        Mean share of a cell's nearest neighbours that have the cell's label.
    low, high
        95 % interval (bootstrap over cells).
    chance
        Expected share for random neighbours.
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
        (cells,): labels of any type.
    within
        (cells,): groups; neighbours and chance level are restricted to cells of the same group. None: all cells.
    n_neighbors
        Neighbours per cell; fewer in a small group. Cells that are alone in their group are excluded.
    seed
        Seed of the bootstrap.

    Returns
    -------
    The share; all values are NaN if no cell has a neighbour.
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
