"""Base of the classifiers on log-normalised counts."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning

from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.annotators.present_classes import with_absent_classes
from census_scvi.annotation.protocol import Cells
from census_scvi.neighbors.log_pca import log_normalized


class OnCounts(ABC):
    """A classifier of scikit-learn on log-normalised counts.

    Parameters
    ----------
    n_neighbors
        Not used; all annotators have the same arguments.
    seed
        Random seed.
    """

    name: ClassVar[str]
    refits: ClassVar[bool] = False
    space: None = None

    def __init__(self, *, n_neighbors: int = NEIGHBORS, seed: int = 0) -> None:
        del n_neighbors
        self._seed = seed
        self._logged: sp.csr_matrix | None = None

    def fit(self, cells: Cells) -> None:
        """Log-normalise the counts."""
        self._logged = log_normalized(sp.csr_matrix(cells.counts, dtype=np.float64))

    @abstractmethod
    def classifier(self) -> Any:
        """An untrained classifier."""

    def probabilities(self, classifier: Any, logged: sp.csr_matrix) -> npt.NDArray[np.floating]:
        """Probabilities by the trained classifier, (cells, its classes)."""
        return np.asarray(classifier.predict_proba(logged))

    def predict(
        self,
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Probabilities by a classifier of the training cells; see `Annotator`."""
        logged = self._logged
        assert logged is not None, "fit comes first"

        def trained(_: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations hardly change the labels
                classifier = self.classifier().fit(logged[train], codes)
            return self.probabilities(classifier, logged[test])

        return with_absent_classes(codes, n_classes, len(test), trained)
