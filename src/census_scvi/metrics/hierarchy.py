"""Metrics of predicted cell types that know which type is an ancestor of which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.integer]
Lineage = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HierarchicalScores:
    """Agreement of predicted types with the true ones.

    Attributes
    ----------
    precision, recall, f1
        Hierarchical precision and recall, and their harmonic mean: a predicted and a true type are compared by the
        sets of terms that they are or have above them, summed over the cells (Kiritchenko and others, 2006). NaN if no
        cell has such a term.
    right
        Share of the cells whose predicted type is the true one.
    right_or_ancestor
        Share of the cells whose predicted type is the true one or an ancestor of it, the root excluded.
    """

    precision: float
    recall: float
    f1: float
    right: float
    right_or_ancestor: float


def hierarchical_scores(lineage: Lineage, truth: Codes, predicted: Codes) -> HierarchicalScores:
    """Compare predicted types with true types.

    Parameters
    ----------
    lineage
        bool (types, terms): the terms that each type is or has above it. The root, which tells nothing, is no column:
        a prediction of the root has no term.
    truth, predicted
        int (cells,): rows of `lineage`.
    """
    sizes, common = lineage.sum(axis=1), _common(lineage)[truth, predicted].sum()
    of_truth, of_predicted = sizes[truth].sum(), sizes[predicted].sum()
    return HierarchicalScores(
        precision=_ratio(common, of_predicted),
        recall=_ratio(common, of_truth),
        f1=_ratio(2 * common, of_truth + of_predicted),
        right=_ratio((truth == predicted).sum(), len(truth)),
        right_or_ancestor=_ratio(right_or_ancestor(lineage, truth, predicted).sum(), len(truth)),
    )


def right_or_ancestor(lineage: Lineage, truth: Codes, predicted: Codes) -> npt.NDArray[np.bool_]:
    """Whether each predicted type is the true one or an ancestor of it, bool (cells,); the root is neither."""
    sizes = lineage.sum(axis=1)[predicted]
    above = (sizes > 0) & (_common(lineage)[truth, predicted] == sizes)
    found: npt.NDArray[np.bool_] = above | (truth == predicted)
    return found


def _common(lineage: Lineage) -> npt.NDArray[np.float32]:
    """Number of terms that each pair of types has in common, (types, types)."""
    counted = lineage.astype(np.float32)
    return counted @ counted.T


def _ratio(part: np.number | int, whole: np.integer | int) -> float:
    return float(part / whole) if whole else float("nan")
