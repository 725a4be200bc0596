"""Inputs and outputs of a loss kernel; `negative_binomial` explains the symbols and the derivation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from census_scvi.counts.minibatch import SparseCounts


@dataclass(frozen=True)
class Decoded:
    """Decoder outputs and counts of a minibatch.

    Attributes
    ----------
    logits
        float (cells, genes), contiguous; a kernel may overwrite them.
    theta
        Inverse dispersion, float (rows, genes): one row for all cells, or one row per batch, label or cell.
    row_of_cell
        int64 (cells,): the row of theta of each cell.
    counts
        Counts of the cells.
    dropout
        Logits of dropout, float (cells, genes), contiguous; a kernel may overwrite them. None without zero inflation.
    """

    logits: torch.Tensor
    theta: torch.Tensor
    row_of_cell: torch.Tensor
    counts: SparseCounts
    dropout: torch.Tensor | None = None


class LossAndSlopes(NamedTuple):
    """Loss of each cell, and the derivatives of the sum of these losses.

    `loss` is (cells,). The derivatives with respect to `logits` (cells, genes), `theta` (rows, genes) and `dropout`
    (cells, genes) are None if they are not requested; `dropout` is also None without zero inflation.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None = None
    theta: torch.Tensor | None = None
    dropout: torch.Tensor | None = None
