"""Nearest neighbors in a PCA of log-normalised counts of reference and query."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.embedded import Embedded
from census_scvi.annotation.protocol import Cells
from census_scvi.neighbors.log_pca import log_pca


class Pca(Embedded):
    """The usual embedding without a model and without a correction of batches."""

    name = "pca"

    def embed(self, cells: Cells) -> npt.NDArray[np.float32]:
        """50 components."""
        return log_pca(cells.counts, seed=self._seed)
