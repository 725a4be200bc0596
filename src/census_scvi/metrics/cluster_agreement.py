"""Agreement of labels with clusters, from the table of their cells: a bootstrap computes it hundreds of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
# Cells of each label (rows) in each cluster (columns), int64 (labels, clusters).
Table = npt.NDArray[np.int64]


def agreement(measure: Callable[[Table], float], labels: Codes, clusters: Codes) -> Callable[[Any], float]:
    """A statistic: the measure of some rows, int64, of labels and clusters, integers from 0."""
    shape = int(labels.max()) + 1, int(clusters.max()) + 1
    pairs = labels * shape[1] + clusters
    return lambda rows: measure(np.bincount(pairs[rows], minlength=shape[0] * shape[1]).reshape(shape))


def normalized_mutual_information(table: Table) -> float:
    """Mutual information, divided by the mean of both entropies; that of `sklearn.metrics`, without its checks."""
    total = table.sum()
    of_labels, of_clusters = _entropy(table.sum(axis=1), total), _entropy(table.sum(axis=0), total)
    if not of_labels and not of_clusters:  # one label and one cluster
        return 1.0
    information = of_labels + of_clusters - _entropy(table.ravel(), total)
    return max(float(2 * information / (of_labels + of_clusters)), 0.0)


def adjusted_rand_index(table: Table) -> float:
    """Rand index, adjusted for chance (Hubert and Arabie 1985); that of `sklearn.metrics`, without its checks."""
    together, of_labels, of_clusters = (
        int(_pairs(numbers).sum()) for numbers in (table, table.sum(axis=1), table.sum(axis=0))
    )
    every = int(_pairs(table.sum()))
    if together == of_labels == of_clusters:
        return 1.0
    expected = of_labels * of_clusters / every
    return (together - expected) / ((of_labels + of_clusters) / 2 - expected)


def _entropy(numbers: npt.NDArray[np.int64], total: np.int64) -> float:
    some = numbers[numbers > 0]
    return float(np.log(total) - (some * np.log(some)).sum() / total) if len(some) > 1 else 0.0


def _pairs(numbers: Any) -> Any:
    return numbers * (numbers - 1) // 2
