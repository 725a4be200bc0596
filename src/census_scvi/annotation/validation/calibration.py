"""Calibrated probabilities: one temperature per method, fitted on held-out cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

# Limits of the logarithm of the temperature.
_LIMITS = (-1.5, 1.5)

Probability = npt.NDArray[np.float32]


def with_temperature(probability: Probability, temperature: float) -> Probability:
    """Probabilities (cells, classes) to the power 1 / temperature, normalised; their order does not change."""
    powers = np.power(probability.astype(np.float64), 1 / temperature)
    return (powers / np.maximum(powers.sum(axis=1, keepdims=True), 1e-300)).astype(np.float32)


def without_type(probability: Probability, code: int) -> Probability:
    """Probabilities (cells, classes) if a class did not exist: those of the others, normalised."""
    others = probability.copy()
    others[:, code] = 0
    total = others.sum(axis=1, keepdims=True)
    return np.where(total > 0, others / np.maximum(total, 1e-12), 1 / others.shape[1]).astype(np.float32)


def fit_temperature(probability: Probability, codes: npt.NDArray[np.int64]) -> float:
    """The temperature with the least Brier score; 1 without cells.

    Unlike the likelihood, the Brier score is limited: single cells with a certain and wrong label do not decide.

    Parameters
    ----------
    probability
        float32 (cells, classes) of held-out cells.
    codes
        (cells,): their true classes.
    """
    if not len(codes):
        return 1.0
    rows = np.arange(len(codes))

    def brier(logarithm: float) -> float:
        found = with_temperature(probability, float(np.exp(logarithm))).astype(np.float64)
        return float(np.square(found).sum(axis=1).mean() - 2 * found[rows, codes].mean())

    return float(np.exp(minimize_scalar(brier, bounds=_LIMITS, method="bounded").x))
