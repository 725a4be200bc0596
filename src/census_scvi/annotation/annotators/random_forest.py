"""Random forest on log-normalised counts."""

from __future__ import annotations

from typing import Any

from sklearn.ensemble import RandomForestClassifier

from census_scvi.annotation.annotators.on_counts import OnCounts
from census_scvi.config.threads import n_jobs

_TREES = 200


class RandomForest(OnCounts):
    """200 trees."""

    name = "random_forest"

    def classifier(self) -> Any:
        """scikit-learn's classifier."""
        return RandomForestClassifier(_TREES, random_state=self._seed, n_jobs=n_jobs())
