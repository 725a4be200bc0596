"""Confidence intervals of scores by a bootstrap over donors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_RESAMPLES = 200
_FEWEST_GROUPS = 5

Rows = npt.NDArray[np.int64]


def interval(
    statistic: Callable[[Rows], float], groups: npt.NDArray[np.object_] | None, n_cells: int, *, seed: int = 0
) -> tuple[float, float]:
    """95 % confidence interval of a statistic of cells, by the bootstrap.

    Parameters
    ----------
    statistic
        Function of rows, int64, in which a cell may occur more than once; returns NaN if it cannot be computed.
    groups
        (cells,): groups that are resampled as a whole, because cells of a donor are similar; single cells are resampled
        if it is None or there are fewer than five groups.
    n_cells
        Number of cells.
    seed
        Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    members = _members(groups)
    found = []
    for _ in range(_RESAMPLES):
        if len(members) < _FEWEST_GROUPS:
            rows = generator.integers(0, n_cells, n_cells)
        else:
            rows = np.concatenate([members[number] for number in generator.integers(0, len(members), len(members))])
        found.append(statistic(rows))
    usable = np.array(found)[~np.isnan(found)]
    return tuple(np.quantile(usable, [0.025, 0.975]).tolist()) if len(usable) else (float("nan"), float("nan"))


def _members(groups: npt.NDArray[np.object_] | None) -> list[Rows]:
    """Rows of each group."""
    if groups is None:
        return []
    _, codes, sizes = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
