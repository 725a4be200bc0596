"""Nearest neighbors in a PCA of reference and query, with batch effects removed by Harmony."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.embedded import Embedded
from census_scvi.annotation.protocol import Cells
from census_scvi.model.build import quiet
from census_scvi.neighbors.log_pca import log_pca


class Harmony(Embedded):
    """Harmony (Korsunsky et al. 2019) on the PCA; it needs the batches of the query."""

    name = "harmony"

    def embed(self, cells: Cells) -> npt.NDArray[np.float32]:
        """The corrected components; those of the PCA if all cells are of one batch."""
        return correct(log_pca(cells.counts, seed=self._seed), cells.batch, self._seed)


def correct(
    components: npt.NDArray[np.float32], batch: npt.NDArray[np.object_], seed: int = 0
) -> npt.NDArray[np.float32]:
    """Components (cells, components) without the effects of the batches."""
    if len(set(batch)) < 2 or components.shape[1] < 2:
        return components
    import harmonypy  # its import takes seconds
    import pandas as pd

    with quiet("harmonypy"):
        found = harmonypy.run_harmony(
            components.astype(np.float64),
            pd.DataFrame({"batch": batch.astype(str)}),
            "batch",
            random_state=seed,
            verbose=False,
        )
    corrected = np.asarray(found.Z_corr, np.float32)
    return corrected if corrected.shape == components.shape else np.ascontiguousarray(corrected.T)
