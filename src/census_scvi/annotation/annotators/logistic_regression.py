"""Logistic regression on log-normalised counts."""

from __future__ import annotations

from typing import Any

from sklearn.linear_model import LogisticRegression as Regression

from census_scvi.annotation.annotators.on_counts import OnCounts

_PENALTY, _ITERATIONS = 0.1, 300


class LogisticRegression(OnCounts):
    """Multinomial, with an L2 penalty."""

    name = "logistic_regression"

    def classifier(self) -> Any:
        """scikit-learn's classifier."""
        return Regression(C=_PENALTY, max_iter=_ITERATIONS)
