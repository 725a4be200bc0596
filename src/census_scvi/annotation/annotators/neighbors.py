"""Nearest neighbors in the embedding by a trained model, which is not changed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.embedded import Embedded
from census_scvi.annotation.protocol import Cells
from census_scvi.errors import UserError


class Neighbors(Embedded):
    """Needs no counts and no training."""

    name = "neighbors"

    def embed(self, cells: Cells) -> npt.NDArray[np.float32]:
        """The embedding of the cells; UserError if there is none."""
        if cells.embedding is None:
            raise UserError("method 'neighbors' needs the embedding by a trained model, and there is none")
        return cells.embedding
