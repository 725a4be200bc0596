"""Where a learning curve would end after more epochs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeWarning, curve_fit

_FEWEST_EPOCHS = 5


def extrapolated(curve: Sequence[float], epochs: int) -> float | None:
    """Value of a falling learning curve after more epochs, by a power law that is fitted to its last four fifths.

    `a + b * epoch**-c` with b and c of 0 or more: the usual form of learning curves (Hestness et al. 2017,
    https://arxiv.org/abs/1712.00409). It is a guess, and is called that wherever it is shown.

    Parameters
    ----------
    curve
        Value after each epoch; not finite where it was not measured.
    epochs
        Epoch, counted from 1, of which the value is wanted.

    Returns
    -------
    The value; None if fewer than five epochs were measured, or no curve fits.
    """
    values = np.asarray(curve, float)
    numbers = np.arange(1, len(values) + 1)
    used = np.isfinite(values) & (numbers > len(values) / 5)
    if used.sum() < _FEWEST_EPOCHS:
        return None
    last, first = values[used][-1], values[used][0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            fitted, _ = curve_fit(
                _power_law,
                numbers[used],
                values[used],
                p0=(last, max(first - last, 1e-6), 0.5),
                bounds=([-np.inf, 0, 0], [np.inf, np.inf, 5]),
            )
    except RuntimeError:  # no convergence
        return None
    # The fitted fall from the last epoch on, from the last value: the noise of the last epoch is not multiplied.
    fall = _power_law(np.array([len(values), epochs], float), *fitted)
    return float(last + fall[1] - fall[0])


def _power_law(epoch: npt.NDArray[np.floating], a: float, b: float, c: float) -> npt.NDArray[np.float64]:
    return np.asarray(a + b * epoch ** (-c), np.float64)
