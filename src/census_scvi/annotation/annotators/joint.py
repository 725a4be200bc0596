"""Nearest neighbors in the latent space of scVI, trained on reference and query together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotators.embedded import Embedded
from census_scvi.annotation.annotators.joint_model import STEPS, joint_latent, train_joint
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.protocol import Cells
from census_scvi.config.random_streams import draw

# Maximum number of query cells to train on: with more, the reference would be too small a part of the minibatches.
_TRAINED_QUERY = 20_000


class Joint(Embedded):
    """scVI trained without labels.

    Parameters
    ----------
    n_neighbors
        Neighbors per cell.
    steps
        Training steps.
    seed
        Random seed.
    """

    name = "joint"

    def __init__(self, *, n_neighbors: int = NEIGHBORS, steps: int = STEPS, seed: int = 0) -> None:
        super().__init__(n_neighbors=n_neighbors, seed=seed)
        self._steps = steps

    def embed(self, cells: Cells) -> npt.NDArray[np.float32]:
        """Train and embed; only a sample of a large query is used for training."""
        numbers = np.random.default_rng(self._seed)
        trained = np.append(cells.reference, cells.n_reference + draw(len(cells.query), _TRAINED_QUERY, numbers))
        model = train_joint(
            cells.counts[trained], cells.batch[trained], cells.genes, steps=self._steps, seed=self._seed
        )
        return joint_latent(model, cells.counts)
