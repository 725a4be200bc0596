"""LightningDataModule of the prepared file: training and validation cells, divided among the processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import numpy.typing as npt
import torch

from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.counts.kept_cells import EveryCell, KeptCells, bytes_in_memory, worth_keeping
from census_scvi.counts.loader import KeptMinibatches, LabelledMinibatches, MinibatchLoader
from census_scvi.counts.matching_rows import matching_rows
from census_scvi.counts.minibatch import DenseMinibatches, Minibatch, densify, each_value
from census_scvi.counts.order import CellOrder, training_mask, validation_mask
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

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
    held_out
        Value filter of the cells for validation; None: a random share of the cells.
    split_seed
        Seed of the random choice of validation and training cells; None: `seed`.
    max_cells
        Number of training cells, drawn at random; None: all.
    workers
        Number of threads that read and decode ahead.
    labels
        Whether minibatches have labels. Those for training then have a minibatch of labelled cells, too, under
        `"labelled"`.
    proteins
        Whether minibatches have proteins.
    require_labels
        Whether training without a labelled cell is refused.
    n_samples_per_label
        Number of labelled cells of each label that are drawn for each epoch, or all of a label that has fewer; None:
        all labelled cells.

    Attributes
    ----------
    sparse
        Whether X of a minibatch is `SparseCounts`; default False: a dense X.
    in_memory
        Whether all cells are decoded once, before the first minibatch, and kept in memory (see `EveryCell`); default
        False.
    validation, training
        bool (cells,): cells for validation, and for training.
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
        n_samples_per_label: int | None = None,
        held_out: str | None = None,
        split_seed: int | None = None,
        max_cells: int | None = None,
    ) -> None:
        super().__init__()
        self.cells = PreparedCells(path, labels=labels, proteins=proteins)
        self._labels, self._require_labels = labels, require_labels
        self._n_samples_per_label = n_samples_per_label
        self._of_epoch: tuple[int | None, npt.NDArray[np.bool_]] | None = None
        self._kept: tuple[int | None, KeptCells] | None = None
        self.in_memory = False
        self._every: EveryCell | None = None
        self.sparse = False
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._dense = DenseMinibatches(self.cells.n_genes)
        split_seed = seed if split_seed is None else split_seed
        self.validation = (
            validation_mask(self.cells.n_cells, train_size, split_seed)
            if held_out is None
            else self._matching(held_out)
        )
        self.training = training_mask(self.validation, max_cells, split_seed)
        self.n_val, self.n_train = int(self.validation.sum()), int(self.training.sum())

    def _matching(self, held_out: str) -> npt.NDArray[np.bool_]:
        """Bool (cells,): cells that match `train.held_out`."""
        setting, path = "train.held_out", str(self.cells.path)
        return matching_rows(held_out, lambda name: self.cells.obs([name], setting)[name], setting, path)

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Bool (cells,): training cells with a label."""
        return self.training & (self.cells.label_codes < len(self.cells.labels) - 1)

    def labelled_of_epoch(self, epoch: int | None) -> npt.NDArray[np.bool_]:
        """Bool (cells,): the labelled cells that are drawn for an epoch; None: all of them."""
        if epoch is None or self._n_samples_per_label is None:
            return self.labelled
        numbers = generator(self._seed, Stream.LABELLED_CELLS, epoch)
        found = np.zeros(self.cells.n_cells, dtype=bool)
        for code in range(len(self.cells.labels) - 1):
            of_label = np.flatnonzero(self.training & (self.cells.label_codes == code))
            found[of_label[draw(len(of_label), self._n_samples_per_label, numbers)]] = True
        return found

    def train_dataloader(self) -> MinibatchLoader | LabelledMinibatches:
        """Training cells, in a new order each epoch; UserError if there are fewer than 2 cells per rank."""
        rank, world_size = self._rank()
        if self.n_train < 2 * world_size:
            raise UserError(f"{self.n_train} training cells are too few for {world_size} processes; 2 each are needed")
        order = CellOrder(self.training, self._seed, rank, world_size)
        every = self._loader(order, self._epoch)
        if not self._labels or not (self._require_labels or self.labelled.any()):
            return every
        if (n_labelled := int(self.labelled.sum())) < 2 * world_size:
            raise UserError(
                f"{n_labelled} training cells have a label, and {2 * world_size} or more are needed: set"
                " anndata.labels_key to a column with labels, or model.kind to SCVI"
            )
        if (n_drawn := int(self.labelled_of_epoch(0).sum())) < 2 * world_size:
            raise UserError(
                f"train.n_samples_per_label is {self._n_samples_per_label}, which draws {n_drawn} labelled cells for"
                f" {world_size} processes, and {2 * world_size} or more are needed: set it to a higher number"
            )
        sampled = self._n_samples_per_label is not None
        return LabelledMinibatches(every, self._labelled_pass, self._epoch, sampled=sampled)

    def _labelled_pass(self, number: int) -> MinibatchLoader:
        epoch = None if self._n_samples_per_label is None else self._epoch()
        if self._of_epoch is None or self._of_epoch[0] != epoch:
            self._of_epoch = epoch, self.labelled_of_epoch(epoch)
        wanted = self._of_epoch[1]
        order = CellOrder(wanted, self._seed, *self._rank())
        return self._loader(order, lambda: _FIRST_LABELLED_PASS + number, lambda: self._kept_cells(epoch, wanted))

    def _every_cell(self) -> EveryCell | None:
        """All cells in memory, if they are to be kept there."""
        if self.in_memory and self._every is None:
            started = time.monotonic()
            self._every = EveryCell(self.cells, self._workers)
            taken = f"{bytes_in_memory(self.cells) / 1e6:,.0f} MB, {time.monotonic() - started:.1f} s"
            log.info("%s cells decoded into memory: %s", f"{self.cells.n_cells:,}", taken)
        return self._every

    def _kept_cells(self, epoch: int | None, wanted: npt.NDArray[np.bool_]) -> KeptCells | EveryCell | None:
        """The labelled cells of an epoch (None: of all epochs) in memory, if they are worth it."""
        if every := self._every_cell():
            return every
        if not worth_keeping(self.cells, wanted):
            return None
        if self._kept is None or self._kept[0] != epoch:
            self._kept = None  # those of the last epoch are not needed while others are read
            self._kept = epoch, KeptCells(self.cells, wanted)
        return self._kept[1]

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

    def _loader(
        self,
        order: CellOrder,
        epoch: Callable[[], int],
        kept: Callable[[], KeptCells | EveryCell | None] | None = None,
    ) -> MinibatchLoader:
        return MinibatchLoader(
            self.cells,
            order,
            self._batch_size,
            self._workers,
            epoch,
            device=self._device,
            sparse=lambda: self.sparse,
            dense=self._dense,
            kept=kept or self._every_cell,
        )

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
