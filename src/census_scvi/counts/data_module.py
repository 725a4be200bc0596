"""LightningDataModule of the prepared file: training and validation cells, divided among the processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import numpy.typing as npt
import torch

from census_scvi.counts.loader import KeptMinibatches, LabelledMinibatches, MinibatchLoader
from census_scvi.counts.minibatch import DenseMinibatches, Minibatch, densify, each_value
from census_scvi.counts.order import CellOrder, validation_mask
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError

# Passes over the labelled cells are numbered from here on: their orders differ from those of the epochs.
_FIRST_LABELLED_PASS = 2**31


class PreparedDataModule(lightning.LightningDataModule):
    """Training and validation minibatches of a prepared file, for one process or for each rank of DDP.

    Parameters
    ----------
    path
        The .h5ad that prepare wrote.
    batch_size
        Cells per minibatch and rank.
    train_size
        Share of the cells for training.
    seed
        Seed of the split and of the order of cells.
    workers
        Number of threads that read and decode ahead.
    labels
        Whether minibatches have labels. Those for training then have a minibatch of labelled cells, too, under
        `"labelled"`.
    proteins
        Whether minibatches have proteins.

    Attributes
    ----------
    sparse
        Whether X of a minibatch is `SparseCounts`; default False: a dense X.
    validation
        bool (cells,): cells for validation.
    """

    def __init__(
        self,
        path: Path,
        *,
        batch_size: int,
        train_size: float,
        seed: int,
        workers: int,
        labels: bool = False,
        proteins: bool = False,
        require_labels: bool = True,
    ) -> None:
        super().__init__()
        self.cells = PreparedCells(path, labels=labels, proteins=proteins)
        self._labels, self._require_labels = labels, require_labels
        self.sparse = False
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._dense = DenseMinibatches(self.cells.n_genes)
        self.validation = validation_mask(self.cells.n_cells, train_size, seed)
        self.n_val = int(self.validation.sum())
        self.n_train = self.cells.n_cells - self.n_val

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Bool (cells,): training cells with a label."""
        return ~self.validation & (self.cells.label_codes < len(self.cells.labels) - 1)

    def train_dataloader(self) -> MinibatchLoader | LabelledMinibatches:
        """Training cells, in a new order each epoch; UserError if there are fewer than 2 cells per rank."""
        rank, world_size = self._rank()
        if self.n_train < 2 * world_size:
            raise UserError(f"{self.n_train} training cells are too few for {world_size} processes; 2 each are needed")
        order = CellOrder(~self.validation, self._seed, rank, world_size)
        every = self._loader(order, self._epoch)
        if not self._labels or not (self._require_labels or self.labelled.any()):
            return every
        if (n_labelled := int(self.labelled.sum())) < 2 * world_size:
            raise UserError(
                f"{n_labelled} training cells have a label, and {2 * world_size} or more are needed: set"
                " anndata.labels_key to a column with labels, or model.kind to SCVI"
            )
        of_labelled = CellOrder(self.labelled, self._seed, rank, world_size)
        return LabelledMinibatches(
            every, lambda number: self._loader(of_labelled, lambda: _FIRST_LABELLED_PASS + number), self._epoch
        )

    def val_dataloader(self) -> KeptMinibatches | list[Minibatch]:
        """Validation cells, in the order of the file; an empty list if there are fewer than one per rank."""
        rank, world_size = self._rank()
        if self.n_val < world_size:
            return []
        order = CellOrder(self.validation, None, rank, world_size)
        return KeptMinibatches(self._loader(order, lambda: 0))

    def transfer_batch_to_device(self, batch: Minibatch, device: torch.device, dataloader_idx: int) -> Minibatch:
        """Move a minibatch, unless the training plan does it, which needs only some of it on the device."""
        if self.sparse and device.type == "cuda":
            return batch
        return each_value(batch, lambda value: value.to(device))

    def on_after_batch_transfer(self, batch: Minibatch, dataloader_idx: int) -> Minibatch:
        """Make a sparse minibatch dense on the device, unless `sparse` is set."""
        return batch if self.sparse or isinstance(batch["X"], torch.Tensor) else densify(batch)

    def give_back(self, minibatch: Minibatch) -> None:
        """Return a minibatch that is no longer used; its memory is reused for a later one (see `DenseMinibatches`)."""
        self._dense.give_back(minibatch)

    def _loader(self, order: CellOrder, epoch: Callable[[], int]) -> MinibatchLoader:
        return MinibatchLoader(
            self.cells,
            order,
            self._batch_size,
            self._workers,
            epoch,
            device=self._device,
            sparse=lambda: self.sparse,
            dense=self._dense,
        )

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
