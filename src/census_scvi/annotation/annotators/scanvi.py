"""scANVI, trained on reference and query with the labels of the reference."""

from __future__ import annotations

import logging
import warnings
from typing import ClassVar

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.annotation.annotators.joint_model import ARGUMENTS, STEPS, joint_latent, seeded, train_joint
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.annotators.present_classes import with_absent_classes
from census_scvi.annotation.protocol import Cells
from census_scvi.model.build import quiet

_UNLABELLED = "unlabelled"
# Training steps with labels, as a share of those without.
_SHARE, _MINIBATCH_CELLS = 0.5, 128


class Scanvi:
    """scANVI (Xu et al. 2021) of scvi-tools, started from the joint scVI model; each `predict` trains it again.

    Parameters
    ----------
    n_neighbors
        Not used; all annotators have the same arguments.
    steps
        Training steps without labels; half as many with labels follow.
    seed
        Random seed.
    """

    name: ClassVar[str] = "scanvi"
    refits: ClassVar[bool] = True

    def __init__(self, *, n_neighbors: int = NEIGHBORS, steps: int = STEPS, seed: int = 0) -> None:
        del n_neighbors
        self._steps, self._seed = steps, seed
        self.space: npt.NDArray[np.float32] | None = None

    def fit(self, cells: Cells) -> None:
        """Train scVI without labels."""
        self._cells = cells
        self._model = train_joint(cells.counts, cells.batch, cells.genes, steps=self._steps, seed=self._seed)
        self.space = joint_latent(self._model, cells.counts)

    def predict(
        self,
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Probabilities by scANVI's classifier; all other cells are trained on without their labels."""
        labels = np.full(len(self._cells), _UNLABELLED, dtype=object)
        labels[train] = [f"class {code}" for code in codes]

        def trained(present: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            with (
                quiet("scvi"),
                quiet("lightning.pytorch", logging.CRITICAL),
                warnings.catch_warnings(),
                seeded(self._seed),
            ):
                warnings.simplefilter("ignore")  # about numbers of workers, and small batches
                predicted = self._trained(labels).predict(self._table(labels)[test].copy(), soft=True)
            return np.asarray(predicted[[f"class {code}" for code in present]])

        found = with_absent_classes(codes, n_classes, len(test), trained)
        return found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)

    def _table(self, labels: npt.NDArray[np.object_]) -> ad.AnnData:
        cells = self._cells
        obs = pd.DataFrame({"batch": cells.batch.astype(str), "label": labels.astype(str)})
        obs.index = obs.index.astype(str)
        return ad.AnnData(cells.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=cells.genes))

    def _trained(self, labels: npt.NDArray[np.object_]) -> scvi.model.SCANVI:
        table = self._table(labels)
        model = scvi.model.SCANVI.from_scvi_model(
            self._start(table), unlabeled_category=_UNLABELLED, labels_key="label", adata=table
        )
        steps_per_epoch = max(len(table) // _MINIBATCH_CELLS, 1)
        model.train(
            max_epochs=max(round(_SHARE * self._steps / steps_per_epoch), 1),
            batch_size=_MINIBATCH_CELLS,
            train_size=1.0,
            shuffle_set_split=False,  # the shuffle would not be seeded
            accelerator="auto",
            devices=1,
            check_val_every_n_epoch=None,
            enable_progress_bar=False,
            logger=False,
            enable_checkpointing=False,
        )
        return model

    def _start(self, table: ad.AnnData) -> scvi.model.SCVI:
        """The joint scVI model, registered with these cells."""
        scvi.model.SCVI.setup_anndata(table, batch_key="batch")
        model = scvi.model.SCVI(table, **ARGUMENTS)
        model.module.load_state_dict(self._model.module.state_dict())
        model.is_trained = True
        return model
