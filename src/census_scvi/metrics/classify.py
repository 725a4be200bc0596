"""Accuracy of classifiers of a label on an embedding, with held-out donors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from census_scvi.config.threads import n_jobs

NAMES = ("svm", "forest", "lr")
_FOLDS = 5
# Whole groups are held out if at least this share of the cells have labels that occur in several groups.
_SHARED = 0.9

Points = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer]


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for held-out cells.

    Attributes
    ----------
    rows
        int64 (cells,): rows of the held-out cells.
    right, predicted
        (cells,) for each of `svm`, `forest` and `lr`: bool, whether the predicted label is right; int64, its code.
    majority
        Accuracy of always predicting the most frequent label.
    held_out
        Name of the groups that were held out as a whole, or `cells`.
    """

    rows: npt.NDArray[np.int64]
    right: dict[str, npt.NDArray[np.bool_]]
    predicted: dict[str, npt.NDArray[np.int64]]
    majority: float
    held_out: str


def held_out(
    points: Points, codes: Codes, groups: npt.NDArray[np.object_] | None, what: str, *, seed: int = 0
) -> OutOfFold | None:
    """Stratified cross-validation with up to five folds, on standardised dimensions.

    Whole groups are held out if nearly all cells have labels that occur in several groups, else single cells. None if
    no fold has two labels for training.

    Parameters
    ----------
    points
        float32 (cells, dimensions).
    codes
        Integer (cells,): the labels.
    groups
        (cells,): donors; cells of a donor are never in both training and test cells. None: single cells are held out.
    what
        Name of the groups.
    seed
        Seed of the folds and the forest.
    """
    grouped = groups is not None and _several_groups(codes, groups)
    parts = StratifiedGroupKFold if grouped else StratifiedKFold
    n_folds = min(_FOLDS, len(np.unique(groups.astype(str))) if grouped and groups is not None else _rarest(codes))
    folds = parts(max(n_folds, 2), shuffle=True, random_state=seed).split(points, codes, groups if grouped else None)
    rows = []
    predicted: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in NAMES}
    for train, test in folds:
        if len(np.unique(codes[train])) < 2 or not len(test):
            continue
        scale = StandardScaler().fit(points[train])
        learnt, asked = scale.transform(points[train]), scale.transform(points[test])
        models = (SVC(), RandomForestClassifier(random_state=seed, n_jobs=n_jobs()), LogisticRegression(max_iter=300))
        for name, classifier in zip(NAMES, models, strict=True):
            predicted[name].append(_fit(classifier, learnt, codes[train]).predict(asked))
        rows.append(test)
    if not rows:
        return None
    tested, named = np.concatenate(rows), {name: np.concatenate(parts) for name, parts in predicted.items()}
    return OutOfFold(
        tested,
        {name: found == codes[tested] for name, found in named.items()},
        named,
        _commonest(codes),
        what if grouped else "cells",
    )


def _fit(classifier: ClassifierMixin, points: Points, codes: Codes) -> ClassifierMixin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # logistic regression at the library's 100 steps
        return classifier.fit(points, codes)


def _several_groups(codes: Codes, groups: npt.NDArray[np.object_]) -> bool:
    """Whether nearly all cells have labels that occur in two or more groups."""
    pairs = np.unique(np.column_stack([codes.astype(str), groups.astype(str)]), axis=0)
    labels, numbers = np.unique(pairs[:, 0], return_counts=True)
    return bool(np.isin(codes.astype(str), labels[numbers > 1]).mean() >= _SHARED)


def _rarest(codes: Codes) -> int:
    return int(np.unique(codes, return_counts=True)[1].min())


def _commonest(codes: Codes) -> float:
    return float(np.bincount(codes).max() / len(codes))
