"""Labels of cells from their counts alone: what a model must do better than to be worth its while."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

PCA_NEIGHBORS, REGRESSION = "pca", "logistic_regression"
_COMPONENTS, _COUNTS_A_CELL = 50, 1e4
_PENALTY, _ITERATIONS = 0.1, 300

Labels = npt.NDArray[np.object_]
Named = tuple[Labels, npt.NDArray[np.float32]]


class Baselines:
    """Nearest neighbours in a PCA, and logistic regression, both on log-normalised counts.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts of the reference.
    labels
        (cells,): label of each; two at least.
    genes
        bool (genes,): those to look at. Genes that the query's study has not measured tell studies apart, nothing else.
    n_neighbors
        Neighbours a cell.
    seed
        Of the PCA.
    """

    def __init__(
        self,
        counts: sp.csr_matrix,
        labels: Labels,
        genes: npt.NDArray[np.bool_],
        *,
        n_neighbors: int = 15,
        seed: int = 0,
    ) -> None:
        self._genes = genes
        logged = self._log(counts)
        names = labels.astype(str)
        self._pca = PCA(min(_COMPONENTS, min(logged.shape) - 1), svd_solver="arpack", random_state=seed).fit(logged)
        neighbors = KNeighborsClassifier(min(n_neighbors, len(names)), weights="distance", algorithm="brute")
        self._neighbors = neighbors.fit(self._pca.transform(logged), names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what it names hardly changes any more
            self._regression = LogisticRegression(C=_PENALTY, max_iter=_ITERATIONS).fit(logged, names)

    def predict(self, counts: sp.csr_matrix) -> dict[str, Named]:
        """Likeliest label and its probability, (cells,) each, of raw counts (cells, genes), by each of the two."""
        logged = self._log(counts)
        shares = {
            PCA_NEIGHBORS: self._neighbors.predict_proba(self._pca.transform(logged)),
            REGRESSION: self._regression.predict_proba(logged),
        }
        classes = self._regression.classes_.astype(object)
        return {
            name: (classes[share.argmax(axis=1)], share.max(axis=1).astype(np.float32))
            for name, share in shares.items()
        }

    def _log(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """log1p of counts, 10,000 a cell."""
        chosen = sp.csr_matrix(counts[:, self._genes], dtype=np.float64)
        totals = np.asarray(chosen.sum(axis=1)).ravel()
        scale = sp.diags(_COUNTS_A_CELL / np.maximum(totals, 1))
        return (scale @ chosen).log1p().tocsr()
