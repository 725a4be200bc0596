"""scNym's method, trained on the labelled cells and the cells to annotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.annotators.present_classes import with_absent_classes
from census_scvi.annotation.protocol import Cells
from census_scvi.annotation.scnym import training
from census_scvi.annotation.scnym.cells import InMemory
from census_scvi.annotation.scnym.settings import NO_NEW_IDENTITY, hyperparameters


class ScNym:
    """scNym (Kimmel and Kelley 2021): MixMatch and a domain adversary; each `predict` trains a classifier.

    Parameters
    ----------
    n_neighbors
        Not used; all annotators have the same arguments.
    preset, overrides
        Hyper-parameters (`hyperparameters`).
    seed
        Random seed.
    """

    name: ClassVar[str] = "scnym"
    refits: ClassVar[bool] = True
    space: None = None

    def __init__(
        self,
        *,
        n_neighbors: int = NEIGHBORS,
        preset: str = NO_NEW_IDENTITY,
        overrides: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        del n_neighbors
        self._settings, self._seed = hyperparameters(preset, overrides), seed
        self._cells: Cells | None = None

    def fit(self, cells: Cells) -> None:
        """Keep the cells: all training needs labels."""
        self._cells = cells

    def predict(
        self,
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Probabilities by a classifier of the training cells, to which the test cells are the target; see `Annotator`.

        Every batch is a domain. Whole batches of the training cells are held out for early stopping where that is
        possible.
        """
        cells = self._cells
        assert cells is not None, "fit comes first"
        rows = np.concatenate([train, test])
        labels = np.full(len(rows), training.UNLABELLED, dtype=object)
        labels[: len(train)] = codes.astype(str)

        def trained(present: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            counts, batch = sp.csr_matrix(cells.counts, dtype=np.float32)[rows], cells.batch[rows]
            classifier = training.train(
                InMemory(counts), cells.genes, labels, self._settings, domains=batch, donors=batch, seed=self._seed
            ).classifier
            predicted = classifier.predict(InMemory(counts[len(train) :]), cells.genes).probability
            return predicted[:, [classifier.classes.index(str(code)) for code in present]]

        return with_absent_classes(codes, n_classes, len(test), trained)
