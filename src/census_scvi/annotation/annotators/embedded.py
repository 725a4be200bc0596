"""Base of the annotators that vote among neighbors in an embedding of all cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS, neighbor_vote
from census_scvi.annotation.protocol import Cells


class Embedded(ABC):
    """An embedding that needs no labels, and a vote of the nearest neighbors in it.

    Parameters
    ----------
    n_neighbors
        Neighbors per cell.
    seed
        Random seed.
    """

    name: ClassVar[str]
    refits: ClassVar[bool] = False

    def __init__(self, *, n_neighbors: int = NEIGHBORS, seed: int = 0) -> None:
        self._n_neighbors, self._seed = n_neighbors, seed
        self.space: npt.NDArray[np.float32] | None = None

    @abstractmethod
    def embed(self, cells: Cells) -> npt.NDArray[np.float32]:
        """Embedding of all cells, float32 (cells, dimensions)."""

    def fit(self, cells: Cells) -> None:
        """Embed the cells."""
        self.space = self.embed(cells)

    def predict(
        self,
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Label shares of the neighbors; see `Annotator`."""
        assert self.space is not None, "fit comes first"
        return neighbor_vote(self.space, train, codes, n_classes, test, n_neighbors=self._n_neighbors, seed=self._seed)
