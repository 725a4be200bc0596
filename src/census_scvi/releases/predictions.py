"""Predicted labels of a user's cells by two releases, compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.metrics.agreement import accuracy_gain, share_equal
from census_scvi.releases.cells import MOST_CHANGES

Labels = npt.NDArray[np.object_]


def compare_predictions(old: Labels, new: Labels, unknown: str, truth: Labels | None) -> dict[str, Any]:
    """Compare predicted labels of the same cells.

    Parameters
    ----------
    old, new
        object (cells,): label of each cell by each release.
    unknown
        Label of a cell for which no label was predicted.
    truth
        object (cells,): label that the file has, None if it has none for the cell; None: the file has no labels.

    Returns
    -------
    `cells`; `same`: share with the same label; `old_unknown` and `new_unknown`: shares; `changes`: list of `old`,
    `new`, `cells`, the most frequent first; and with known labels `old_accuracy`, `new_accuracy`, `gain` and its
    standard error `gain_error`.
    """
    differing = np.flatnonzero(old != new)
    pairs = pd.DataFrame({"old": old[differing].astype(str), "new": new[differing].astype(str)})
    changes = [
        {"old": one, "new": other, "cells": int(number)}
        for (one, other), number in pairs.value_counts().head(MOST_CHANGES).items()
    ]
    found = {
        "cells": len(old),
        "same": float((old == new).mean()),
        "old_unknown": float((old == unknown).mean()),
        "new_unknown": float((new == unknown).mean()),
        "changes": changes,
    }
    if truth is None or not any(label is not None for label in truth):
        return found
    gain, error = accuracy_gain(truth, new, old)
    return found | {
        "old_accuracy": share_equal(truth, old),
        "new_accuracy": share_equal(truth, new),
        "labelled": sum(label is not None for label in truth),
        "gain": gain,
        "gain_error": error,
    }
