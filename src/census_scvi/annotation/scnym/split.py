"""Which labelled cells are for early stopping: whole donors where there are any, else some cells of every class."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from census_scvi.config.random_streams import Stream, generator

log = logging.getLogger(__name__)

_SHARE, _MOST = 0.1, 0.25  # share of the labelled cells that is held out, and that whole donors may have


def validation_cells(
    codes: npt.NDArray[np.int64], donors: npt.NDArray[np.object_] | None, seed: int
) -> npt.NDArray[np.bool_]:
    """Labelled cells to hold out for early stopping, about a tenth of them.

    Whole donors are held out if their cells are at most a quarter, and every class keeps cells of other donors.
    Otherwise a tenth of the cells of every class is; a class with fewer than ten cells keeps them all.

    Parameters
    ----------
    codes
        int64 (labelled cells,): class of each cell.
    donors
        (labelled cells,); None: unknown.
    seed
        Seed of the choice.

    Returns
    -------
    bool (labelled cells,).
    """
    numbers = generator(seed, Stream.CLASSIFIER_VALIDATION)
    held_out = None if donors is None else _whole_donors(codes, donors.astype(str), numbers)
    if held_out is not None:
        return held_out
    chosen = np.zeros(len(codes), bool)
    for code in np.unique(codes):
        of_class = np.flatnonzero(codes == code)
        chosen[numbers.permutation(of_class)[: round(_SHARE * len(of_class))]] = True
    return chosen


def _whole_donors(
    codes: npt.NDArray[np.int64], donors: npt.NDArray[np.str_], numbers: np.random.Generator
) -> npt.NDArray[np.bool_] | None:
    """Cells of some donors; None if no donors can be held out."""
    names, of_cell = np.unique(donors, return_inverse=True)
    classes = np.unique(codes)
    chosen = np.zeros(len(codes), bool)
    held_out = []
    for donor in numbers.permutation(len(names)):
        more = chosen | (of_cell == donor)
        if more.mean() <= _MOST and np.array_equal(np.unique(codes[~more]), classes):
            chosen = more
            held_out.append(str(names[donor]))
        if chosen.mean() >= _SHARE:
            break
    if chosen.mean() < _SHARE / 2:
        return None
    log.info("early stopping on %d of %d donors, %d cells", len(held_out), len(names), chosen.sum())
    return chosen
