"""Baselines without the model: cell labels predicted from the counts alone."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from census_scvi.annotation.label_shares import label_shares
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.neighbors.log_pca import fit_pca, log_normalized

PCA_NEIGHBORS, REGRESSION = "pca", "logistic_regression"
_PENALTY, _ITERATIONS = 0.1, 300

Labels = npt.NDArray[np.object_]
Named = tuple[Labels, npt.NDArray[np.float32]]


class Baselines:
    """Nearest neighbors in a PCA, and logistic regression, both on log-normalised counts.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts of the reference.
    labels
        (cells,): label of each cell; at least two different labels.
    genes
        bool (genes,): genes to use. Genes that the query did not measure would only separate studies.
    n_neighbors
        Neighbors per cell.
    seed
        Seed of the PCA.
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
        self._codes, self._n_neighbors = np.unique(names, return_inverse=True)[1], n_neighbors
        self._pca, positions = fit_pca(logged, seed=seed)
        self._index = NeighborIndex(positions, exact_cells=len(positions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations hardly change the labels
            self._regression = LogisticRegression(C=_PENALTY, max_iter=_ITERATIONS).fit(logged, names)

    def predict(self, counts: sp.csr_matrix) -> dict[str, Named]:
        """Most likely label and its probability, (cells,) each, for raw counts (cells, genes), by each baseline."""
        logged = self._log(counts)
        shares = {
            PCA_NEIGHBORS: self._of_neighbors(logged),
            REGRESSION: self._regression.predict_proba(logged),
        }
        classes = self._regression.classes_.astype(object)
        return {
            name: (classes[share.argmax(axis=1)], share.max(axis=1).astype(np.float32))
            for name, share in shares.items()
        }

    def _log(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        return log_normalized(sp.csr_matrix(counts[:, self._genes], dtype=np.float64))

    def _of_neighbors(self, logged: sp.csr_matrix) -> npt.NDArray[np.float64]:
        """Label shares, neighbors weighted by 1 / distance; if neighbors have distance 0, only these count."""
        distances, positions = self._index.query(self._pca.transform(logged), self._n_neighbors)
        same = distances == 0
        weights = np.where(same.any(axis=1, keepdims=True), same, 1 / np.where(same, 1, distances.astype(np.float64)))
        return label_shares(weights, self._codes[positions], len(self._regression.classes_))
