"""Where a learning curve would end after more epochs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FEWEST_EPOCHS = 5
_POWERS = np.geomspace(0.05, 5.0, 200)


def extrapolated(curve: Sequence[float], epochs: int) -> float | None:
    """Value of a falling learning curve after more epochs, by a power law that is fitted to its last four fifths.

    `a + b * epoch**-c` with b of 0 or more and c of 0.05 to 5: the usual form of learning curves (Hestness et al. 2017,
    https://arxiv.org/abs/1712.00409). It is a guess, and is called that wherever it is shown.

    Parameters
    ----------
    curve
        Value after each epoch; not finite where it was not measured.
    epochs
        Epoch, counted from 1, of which the value is wanted.

    Returns
    -------
    The value; None if fewer than five epochs were measured.
    """
    values = np.asarray(curve, float)
    numbers = np.arange(1, len(values) + 1)
    used = np.isfinite(values) & (numbers > len(values) / 5)
    if used.sum() < _FEWEST_EPOCHS:
        return None
    fits = [(*_fitted(numbers[used], values[used], power), power) for power in _POWERS]
    _, scale, power = min(fits)
    # The fitted fall from the last epoch on, from the last value: the noise of the last epoch is not multiplied.
    fall = max(scale, 0.0) * (len(values) ** -power - epochs**-power)
    return float(values[used][-1] - fall)


def _fitted(epoch: npt.NDArray[np.integer], value: npt.NDArray[np.floating], power: float) -> tuple[float, float]:
    """Sum of squared residuals, and b, of the least-squares fit of `a + b * epoch**-power`."""
    terms = np.column_stack([np.ones(len(epoch)), epoch.astype(float) ** -power])
    (level, scale), *_ = np.linalg.lstsq(terms, value, rcond=None)
    return float(((terms @ (level, scale) - value) ** 2).sum()), float(scale)
