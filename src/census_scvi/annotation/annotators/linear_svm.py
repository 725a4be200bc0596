"""Linear support vector machine on log-normalised counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.special import softmax
from sklearn.svm import LinearSVC

from census_scvi.annotation.annotators.on_counts import OnCounts

_PENALTY = 0.01


class LinearSvm(OnCounts):
    """One class against the rest; softmax turns the margins into probabilities, which are calibrated later."""

    name = "linear_svm"

    def classifier(self) -> Any:
        """scikit-learn's classifier."""
        return LinearSVC(C=_PENALTY, random_state=self._seed)

    def probabilities(self, classifier: Any, logged: sp.csr_matrix) -> npt.NDArray[np.floating]:
        """Softmax of the distances to the separating planes."""
        margins = classifier.decision_function(logged)
        if margins.ndim == 1:  # two classes have one plane
            margins = np.column_stack([-margins, margins])
        return np.asarray(softmax(2 * margins, axis=1))
