"""Sums of the metrics over an epoch, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from scvi.module.base import LossOutput


class EpochSums:
    """Sums over the cells of an epoch; nothing waits for a GPU until they are read.

    Attributes
    ----------
    values
        float64 (3,): sums of the loss, the reconstruction loss and the KL divergence.
    cells
        Number of cells.
    """

    def __init__(self) -> None:
        self.values = torch.zeros(3, dtype=torch.float64)
        self.cells = 0

    def to(self, device: torch.device) -> None:
        """Move the sums to a device."""
        self.values = self.values.to(device)

    def add(self, output: LossOutput, n_cells: int) -> None:
        """Add the loss of a minibatch of n cells; the caller counts the cells."""
        loss = output.loss.detach() * n_cells
        self.values += torch.stack([loss, output.reconstruction_loss_sum.detach(), output.kl_local_sum.detach()])

    def reset(self) -> None:
        """Set all sums to 0, in their memory."""
        self.values.zero_()
        self.cells = 0

    def means(self, mode: str, reduce: Any) -> dict[str, torch.Tensor]:
        """The metrics per cell, by scvi-tools' names.

        Parameters
        ----------
        mode
            `train` or `validation`.
        reduce
            Sums a tensor over all processes.
        """
        *sums, cells = reduce(torch.cat([self.values, self.values.new_tensor([self.cells])])).unbind()
        loss, reconstruction, kl = (value / cells for value in sums)
        values = {
            f"{mode}_loss": loss,
            f"elbo_{mode}": reconstruction + kl,
            f"reconstruction_loss_{mode}": reconstruction,
            f"kl_local_{mode}": kl,
            f"kl_global_{mode}": torch.zeros_like(kl),
        }
        return {name: value.float() for name, value in values.items()}

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"values": self.values.clone(), "cells": self.cells}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue saved sums."""
        self.values.copy_(state["values"])
        self.cells = state["cells"]
