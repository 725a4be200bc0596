"""Held-out parts of a reference: studies if there are several, else donors or batches, else cells."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold, StratifiedKFold

BY_CELLS = "cells"  # what is held out, if no studies, donors or batches are known
_FOLDS = 3

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Positions in the labelled reference cells: int64, `test` only has types that `train` has."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def held_out_folds(
    codes: npt.NDArray[np.int64], units: Mapping[str, Sequence[object] | npt.NDArray[np.object_]], seed: int
) -> tuple[list[Fold], str]:
    """Folds of the labelled cells, and what is held out.

    Parameters
    ----------
    codes
        int64 (cells,): types.
    units
        Columns of what can be held out, the best one first: study, donor, batch. The first one with two values or more
        whose parts share a type is used.
    seed
        Seed of the assignment of units, or of cells, to folds.

    Returns
    -------
    At most three folds, none if there are too few cells; and the name of the column, or `cells`.
    """
    for name, values in units.items():
        groups = np.asarray(values).astype(str)
        n_groups = len(np.unique(groups))
        if n_groups > 1:
            splits = GroupKFold(min(_FOLDS, n_groups), shuffle=True, random_state=seed).split(codes, groups=groups)
            if folds := _usable(splits, codes):
                return folds, name
    sizes = np.bincount(codes)
    several = np.flatnonzero(sizes[codes] > 1)
    if len(several) < _FOLDS:
        return [], BY_CELLS
    n_folds = int(min(_FOLDS, sizes[sizes > 1].max()))
    kept = codes[several]
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # types with fewer cells than folds
        splits = [(several[train], several[test]) for train, test in splitter.split(kept, kept)]
    return _usable(splits, codes), BY_CELLS


def _usable(splits: Iterable[tuple[Rows, Rows]], codes: npt.NDArray[np.int64]) -> list[Fold]:
    folds = []
    for train, test in splits:
        known = test[np.isin(codes[test], codes[train])]
        if len(np.unique(codes[train])) > 1 and len(known):
            folds.append(Fold(train, known))
    return folds
