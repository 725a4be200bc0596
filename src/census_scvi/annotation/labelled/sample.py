"""A sample of labelled reference cells of limited size, in which rare types are kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.config.random_streams import draw


def draw_balanced(
    labels: npt.ArrayLike, size: int, numbers: np.random.Generator, *, per_type: int | None = None
) -> npt.NDArray[np.int64]:
    """Rows of a sample without replacement, int64 (at most `size`,), ascending.

    Every type has the same number of cells, or all of its cells if it has fewer.

    Parameters
    ----------
    labels
        (cells,): types, or codes of types; cells with None are not drawn.
    size
        Maximum number of cells.
    numbers
        Random numbers.
    per_type
        Maximum number of cells of a type; None: no maximum.
    """
    codes, names = pd.factorize(np.asarray(labels))
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    most = _most_per_type(sizes if per_type is None else np.minimum(sizes, per_type), size)
    order = np.argsort(codes, kind="stable")[np.count_nonzero(codes < 0) :]
    starts = np.cumsum(sizes) - sizes
    drawn = [order[start + draw(n, min(n, most), numbers)] for start, n in zip(starts, sizes.tolist(), strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def _most_per_type(sizes: npt.NDArray[np.int64], size: int) -> int:
    """The largest number of cells per type with which all types have at most `size` cells together."""
    left = size
    for position, n in enumerate(np.sort(sizes)):
        most = left // (len(sizes) - position)
        if n > most:
            return most
        left -= n
    return int(sizes.max(initial=0))
