"""Metrics per cell type and per batch, to find the cells for which an embedding fails."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import silhouette_samples

from census_scvi.metrics.entropy import neighbor_entropy
from census_scvi.metrics.space import Space

_NEAREST = 15
Names = npt.NDArray[np.object_]


def break_down(space: Space, labels: Names, batches: Names, of: Names) -> pd.DataFrame:
    """Mean metrics over the measured cells of each type or batch.

    Parameters
    ----------
    space
        The embedding.
    labels, batches
        (cells,): label (None if missing) and batch of all cells of the slice.
    of
        (cells,): types or batches that define the rows of the table; None if missing.

    Returns
    -------
    One row per value, the most frequent first, indexed by name: `cells`, number of cells of the slice; `same_type`,
    share of the 15 nearest neighbors with the cell's label; `silhouette` of the label, 0 to 1; `mixing`, entropy of the
    batches among 200 neighbors, divided by the entropy of the batches of all cells of the same type.
    """
    rows = space.measured
    known = np.array([label is not None for label in labels])
    names, types = np.unique(np.where(known, labels, "").astype(str), return_inverse=True)
    codes = np.unique(batches.astype(str), return_inverse=True)[1]
    told, mine = known[rows], types[rows]
    near = types[space.neighbors[:, 1 : _NEAREST + 1]]
    same = (near == mine[:, None]).mean(axis=1) if near.size else np.full(len(rows), np.nan)  # one cell has no neighbor
    widths = np.full(len(rows), np.nan)
    if len(np.unique(mine[told])) > 1:
        compact = np.unique(mine[told], return_inverse=True)[1]
        widths[told] = (silhouette_samples(space.points[told], compact) + 1) / 2
    most = np.array([_entropy(codes[types == number]) for number in range(len(names))])[mine]
    mixing = np.divide(neighbor_entropy(space.neighbors, codes), most, out=np.full(len(rows), np.nan), where=most > 0)
    frame = pd.DataFrame(
        {
            "name": of[rows],
            "same_type": np.where(told, same, np.nan),
            "silhouette": widths,
            "mixing": np.where(told, mixing, np.nan),
        }
    ).dropna(subset="name")
    means = frame.groupby(frame["name"].astype(str))[["same_type", "silhouette", "mixing"]].mean()
    means.insert(0, "cells", pd.Series(of).dropna().astype(str).value_counts())
    return means.sort_values("cells", ascending=False)


def _entropy(codes: npt.NDArray[np.integer]) -> float:
    shares = np.bincount(codes) / len(codes)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
