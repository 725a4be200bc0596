"""Annotation of groups of cells: the label of most of their cells, and its share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.cluster import MiniBatchKMeans

from census_scvi.annotation.protocol import UNKNOWN

# Mean number of cells per group, and most groups.
_CELLS_PER_GROUP, _MOST_GROUPS = 60, 500


def similar_cells(points: npt.NDArray[np.float32], seed: int = 0) -> npt.NDArray[np.int64]:
    """Groups of similar cells, int64 (cells,): k-means of an embedding (cells, dimensions)."""
    n_groups = min(len(points) // _CELLS_PER_GROUP, _MOST_GROUPS)
    if n_groups < 2:
        return np.zeros(len(points), np.int64)
    clusters = MiniBatchKMeans(n_groups, n_init=1, random_state=seed).fit_predict(points)
    return np.unique(clusters, return_inverse=True)[1].astype(np.int64)


def label_groups(
    groups: npt.NDArray[np.integer], labels: npt.NDArray[np.object_], unknown: npt.NDArray[np.bool_]
) -> pd.DataFrame:
    """The two most frequent labels of each group.

    Parameters
    ----------
    groups, labels, unknown
        (cells,): group and label of each cell, and whether it is unknown, which counts as a label.

    Returns
    -------
    One row per group, indexed by group: `cells`, `label` and its `share` of the cells, `second` and `second_share`
    (empty and 0 if all cells have one label).
    """
    rows = {}
    for group, found in pd.Series(np.where(unknown, UNKNOWN, labels)).groupby(groups):
        (label, share), (second, second_share) = [*found.value_counts(normalize=True).items(), ("", 0.0)][:2]
        rows[group] = (len(found), label, share, second, second_share)
    columns = ["cells", "label", "share", "second", "second_share"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("group")


def group_columns(
    labels: str,
    groups: npt.NDArray[np.integer],
    best: npt.NDArray[np.object_],
    unknown: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Columns for obs: `<labels>_group`, the label of most of the group's cells, and its share of them.

    Parameters
    ----------
    labels
        Name of the labels.
    groups, best, unknown
        As in `label_groups`.
    """
    found = label_groups(groups, best, unknown).loc[groups]
    return {
        f"{labels}_group": pd.Categorical(groups.astype(str)),
        f"{labels}_group_label": pd.Categorical(found["label"]),
        f"{labels}_group_share": found["share"].to_numpy(np.float32),
    }
