"""Quality of predicted labels of cells whose labels are known: accuracy, calibration, risk and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.calibration import calibration_curve
from sklearn.metrics import recall_score

_BINS = 10
_COVERAGE = np.linspace(0.05, 1, 20)

Labels = npt.NDArray[np.object_]
Named = tuple[Labels, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class HeldOut:
    """Quality of the predicted labels of held-out cells.

    Attributes
    ----------
    accuracy
        Share of the cells with the correct label.
    mean_over_types
        Macro-averaged recall: the same share per type, mean over types.
    calibration_error
        Expected calibration error: mean absolute difference of `right` and `probability` over bins.
    probability, right
        (bins,): mean probability of the cells in a bin, and share of them with the correct label; ten bins of equal
        size, fewer if many cells have the same probability.
    coverage, risk
        (20,): share of the cells that are kept, the most confident first, and share of these with a wrong label.
    """

    accuracy: float
    mean_over_types: float
    calibration_error: float
    probability: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]

    @classmethod
    def of(cls, truth: Labels, named: Named, seed: int = 0) -> HeldOut:
        """Compare true labels with predicted labels and their probabilities."""
        labels, probability = named
        right = labels == truth
        bins = calibration_curve(right, np.clip(probability, 0, 1), n_bins=_BINS, strategy="quantile")
        # Cells with equal probability are in random order.
        order = np.lexsort((np.random.default_rng(seed).random(len(right)), -probability))
        wrong = np.cumsum(~right[order])
        named_cells = np.maximum((_COVERAGE * len(right)).round().astype(int), 1)
        names = truth.astype(str)
        return cls(
            accuracy=float(right.mean()),
            mean_over_types=float(
                recall_score(names, labels.astype(str), labels=np.unique(names), average="macro", zero_division=0)
            ),
            calibration_error=float(np.abs(bins[0] - bins[1]).mean()),
            probability=bins[1],
            right=bins[0],
            coverage=_COVERAGE,
            risk=wrong[named_cells - 1] / named_cells,
        )
