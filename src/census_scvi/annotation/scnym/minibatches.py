"""Labelled, unlabelled and validation cells of a training, and the minibatches of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from census_scvi.annotation.scnym.cells import CellSource, in_order, regrouped, to_tensor
from census_scvi.config.random_streams import Stream, generator

Minibatch = dict[str, Any]
_VALIDATION_CELLS = 1024
_PASSES = 2**16  # more than the passes over the unlabelled cells in an epoch
_LABELLED, _UNLABELLED, _DRAWN = range(3)


@dataclass(frozen=True)
class TrainingCells:
    """All cells of a training.

    Attributes
    ----------
    source
        Their counts.
    codes
        int64 (cells,): class of each labelled cell; -1: unlabelled.
    domains
        int64 (cells,): domain of each cell.
    training, validation, unlabelled
        bool (cells,): labelled cells to train on, labelled cells for early stopping, cells without a label.
    """

    source: CellSource
    codes: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64]
    training: npt.NDArray[np.bool_]
    validation: npt.NDArray[np.bool_]
    unlabelled: npt.NDArray[np.bool_]

    @property
    def n_domains(self) -> int:
        """Number of domains of the cells that are trained on."""
        return len(np.unique(self.domains[self.training | self.unlabelled]))

    def tensors(self, rows: npt.NDArray[np.int64], counts: sp.csr_matrix) -> Minibatch:
        """Counts, class and domain of some cells."""
        return {
            "counts": to_tensor(counts),
            "codes": torch.from_numpy(self.codes[rows]),
            "domains": torch.from_numpy(self.domains[rows]),
        }


class TrainingMinibatches:
    """Minibatches of an epoch: every labelled cell once, and as many unlabelled cells.

    No cell is dropped: minibatches have `batch_size` cells or a few more. Fewer cells make one minibatch. Unlabelled
    cells are repeated if there are fewer of them. The order depends on the seed and the epoch only, so that a resumed
    training sees the same cells.

    Parameters
    ----------
    cells
        The cells of the training.
    batch_size
        Labelled cells per minibatch.
    balanced
        Draw the classes equally often, with replacement; else every labelled cell occurs once per epoch.
    pseudolabelled
        Whether to yield unlabelled cells, too.
    seed
        Seed of the order.
    epoch
        Returns the number of the epoch.
    """

    def __init__(
        self,
        cells: TrainingCells,
        batch_size: int,
        *,
        balanced: bool,
        pseudolabelled: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self._cells, self._balanced, self._epoch = cells, balanced, epoch
        self._pseudolabelled = pseudolabelled
        n_labelled, n_unlabelled = int(cells.training.sum()), int(cells.unlabelled.sum())
        number = max(n_labelled // batch_size, 1)
        self._sizes = [len(part) for part in np.array_split(np.empty(n_labelled), number)]
        # Batch normalisation needs two cells.
        self._n_unlabelled = max(min(batch_size, n_unlabelled), 2)
        self._seeds = [int(generator(seed, Stream.CLASSIFIER_CELLS, part).integers(2**31)) for part in range(3)]
        codes = cells.codes[cells.training]
        self._share = np.bincount(codes, minlength=codes.max() + 1) / len(codes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield the minibatches of the current epoch."""
        epoch = self._epoch()
        labelled = in_order(self._cells.source, self._cells.training, self._seeds[_LABELLED], epoch)
        if self._balanced:
            labelled = self._drawn(labelled, epoch)
        minibatches = (self._cells.tensors(*part) for part in regrouped(labelled, self._sizes))
        if not self._pseudolabelled:
            yield from minibatches
            return
        passes = itertools.chain.from_iterable(
            in_order(self._cells.source, self._cells.unlabelled, self._seeds[_UNLABELLED], epoch * _PASSES + number)
            for number in itertools.count()
        )
        unlabelled = regrouped(passes, itertools.repeat(self._n_unlabelled, len(self._sizes)))
        for minibatch, others in zip(minibatches, unlabelled, strict=True):
            yield minibatch | {f"unlabelled_{name}": value for name, value in self._cells.tensors(*others).items()}

    def _drawn(
        self, parts: Iterator[tuple[npt.NDArray[np.int64], sp.csr_matrix]], epoch: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], sp.csr_matrix]]:
        """Draw the same number of cells of each part with replacement, all classes with the same probability."""
        numbers = generator(self._seeds[_DRAWN], Stream.CLASSIFIER_CELLS, epoch)
        for rows, counts in parts:
            weights = 1 / self._share[self._cells.codes[rows]]
            chosen = numbers.choice(len(rows), len(rows), p=weights / weights.sum())
            yield rows[chosen], counts[chosen]


class ValidationMinibatches:
    """The validation cells, in the order of the source."""

    def __init__(self, cells: TrainingCells) -> None:
        self._cells = cells
        n_cells = int(cells.validation.sum())
        self._sizes = [min(_VALIDATION_CELLS, n_cells - first) for first in range(0, n_cells, _VALIDATION_CELLS)]

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield all validation cells once."""
        parts = in_order(self._cells.source, self._cells.validation, None)
        return (self._cells.tensors(*part) for part in regrouped(parts, self._sizes))
