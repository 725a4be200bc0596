"""Probabilities of all classes from those of the classes that have training cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def with_absent_classes(
    codes: npt.NDArray[np.int64],
    n_classes: int,
    n_cells: int,
    predict: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]],
) -> npt.NDArray[np.float32]:
    """Probabilities, float32 (cells, n_classes), 0 for a class without training cells.

    Parameters
    ----------
    codes
        int64 (training cells,): their classes.
    n_classes, n_cells
        Number of classes, and of cells to annotate.
    predict
        Function of the classes that have training cells, int64 (present classes,), that trains and returns their
        probabilities, (cells, present classes). It is not called for a single class.
    """
    present = np.unique(codes)
    found = np.zeros((n_cells, n_classes), np.float32)
    found[:, present] = 1 if len(present) == 1 else predict(present)
    return found
