"""A sample of labelled reference cells of limited size, in which rare types are kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd


def draw_balanced(labels: npt.NDArray[np.object_], size: int, numbers: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of a sample, int64 (at most `size`,), ascending.

    Every type has the same number of cells, or all of its cells if it has fewer.

    Parameters
    ----------
    labels
        object (cells,): types; cells with None are not drawn.
    size
        Maximum number of cells.
    numbers
        Random numbers.
    """
    codes, names = pd.factorize(labels)
    rows = np.flatnonzero(codes >= 0)
    if len(rows) <= size:
        return rows
    counts = np.bincount(codes[rows], minlength=len(names))
    # The largest number per type at which the sample is not too large.
    ordered = np.sort(counts)
    most, left = 0, size
    for position, count in enumerate(ordered):
        most = left // (len(ordered) - position)
        if count > most:
            break
        left -= count
    drawn = [
        members if len(members) <= most else numbers.choice(members, most, replace=False)
        for code in range(len(names))
        if len(members := np.flatnonzero(codes == code))
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
