"""Inputs and outputs of a kernel of the loss; `negative_binomial` has the names and the derivation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from census_scvi.counts.minibatch import SparseCounts


@dataclass(frozen=True)
class Decoded:
    """A minibatch behind the decoder.

    Attributes
    ----------
    logits
        float (cells, genes), contiguous; a kernel may overwrite them.
    theta
        Inverse dispersion, float (rows, genes): one row for all cells, or one a batch, label or cell.
    row_of_cell
        int64 (cells,): the row of theta that is a cell's.
    counts
        Counts of the cells.
    dropout
        Logits of dropout, like `logits`; None without zero inflation.
    """

    logits: torch.Tensor
    theta: torch.Tensor
    row_of_cell: torch.Tensor
    counts: SparseCounts
    dropout: torch.Tensor | None = None


class LossAndSlopes(NamedTuple):
    """Loss of each cell and the derivatives of their sum.

    `loss` (cells,); the derivatives by `logits` (cells, genes), `theta` (rows, genes) and `dropout` (cells, genes) are
    None if they are not needed, or without dropout.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None = None
    theta: torch.Tensor | None = None
    dropout: torch.Tensor | None = None
