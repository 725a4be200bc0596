"""What a model is worth on held-out cells: ELBO, label transfer, and how far it moved the cells that it knew."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scvi
import torch

from census_scvi.fine_tuning.held_out import Group, HeldOut
from census_scvi.metrics.agreement import LabelTransfer, accuracy_gain, neighbor_overlap
from census_scvi.metrics.distances import distances
from census_scvi.model.encode import Encoder, batch_labels, extend_batches
from census_scvi.model.safe import ModelDescription

_MINIBATCH = 512
_SECONDS_PER_HOUR = 3600.0

Points = npt.NDArray[np.float32]
Names = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Measured:
    """A model on the held-out cells.

    Attributes
    ----------
    elbo_new, elbo_old
        Mean negative ELBO per cell of the new and of the old held-out cells; of batches that the model does not have
        with the mean of its batches' weights.
    new, old
        float32 (cells, dimensions): their embedding.
    predicted
        object (new cells,): the label that each gets from the reference cells.
    seconds_per_cell
        Time of the forward pass.
    """

    elbo_new: float
    elbo_old: float
    new: Points
    old: Points
    predicted: Names
    seconds_per_cell: float


def measure(model: scvi.model.SCVI, description: ModelDescription, cells: HeldOut, seed: int) -> Measured:
    """Measure a model on the held-out cells.

    Parameters
    ----------
    model, description
        The model.
    cells
        The cells.
    seed
        Seed of the latent samples of the ELBO.
    """
    groups = (cells.new, cells.old, cells.reference)
    extended = extend_batches(
        model, description.genes, sorted({str(label) for each in groups for label in each.batches})
    )
    position = {label: code for code, label in enumerate(batch_labels(extended))}
    codes = [np.array([position[label] for label in each.batches], np.int64) for each in groups]
    encode = Encoder(extended)
    started = time.monotonic()
    new, old, reference = (encode(each.counts, code).mean for each, code in zip(groups, codes, strict=True))
    seconds = (time.monotonic() - started) / sum(map(len, groups))
    known = np.array([label is not None for label in cells.reference.labels], dtype=bool)
    predicted = np.full(len(new), None, dtype=object)
    if known.any():
        transfer = LabelTransfer(reference[known], cells.reference.labels[known], ["neighbors"], seed=seed)
        predicted = transfer(new)["neighbors"]
    elbos = [elbo(extended, each, code, seed) for each, code in zip(groups[:2], codes[:2], strict=True)]
    return Measured(elbos[0], elbos[1], new, old, predicted, seconds)


@torch.inference_mode()
def elbo(model: scvi.model.SCVI, cells: Group, codes: npt.NDArray[np.int64], seed: int) -> float:
    """Mean negative evidence lower bound per cell, with one latent sample per cell, as scvi-tools computes it."""
    module, total = model.module.eval(), 0.0
    torch.manual_seed(seed)
    for start in range(0, len(cells), _MINIBATCH):
        rows = slice(start, start + _MINIBATCH)
        batch = torch.from_numpy(codes[rows]).unsqueeze(1)
        tensors = {
            "X": torch.from_numpy(cells.counts[rows].toarray()),
            "batch": batch,
            "labels": torch.zeros_like(batch),
        }
        *_, losses = module(tensors, loss_kwargs={"kl_weight": 1.0})
        total += float(losses.reconstruction_loss_sum) + float(losses.kl_local_sum)
    return total / len(cells)


def compared(found: Measured, keep: Measured, cells: HeldOut, new_donors: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The row of a model in the table of the decision, compared with the model as it is.

    Parameters
    ----------
    found, keep
        The model, and the model as it is.
    cells
        The held-out cells.
    new_donors
        bool (new cells,): cells of donors and batches that the model as it is does not know.
    """
    known = set(cells.reference.labels) - {None}
    asked = new_donors & np.array([label in known for label in cells.new.labels], dtype=bool)
    truth = cells.new.labels[asked]
    gain, error = accuracy_gain(truth, found.predicted[asked], keep.predicted[asked])
    same_space = found.old.shape == keep.old.shape
    moved = distances(keep.old, found.old) if same_space else None
    return {
        "elbo_new": found.elbo_new,
        "elbo_old": found.elbo_old,
        "transfer": float((found.predicted[asked] == truth).mean()) if asked.any() else float("nan"),
        "transfer_cells": int(asked.sum()),
        "transfer_gain": gain,
        "transfer_error": error,
        "moved": moved.mean / moved.scale if moved else float("nan"),
        "neighbor_overlap": neighbor_overlap(keep.old, found.old),
    }


def costs(train_seconds: float, embed_seconds: float, per_hour: float | None) -> dict[str, float]:
    """Hours and price of a training and of embedding cells."""
    hours = {"train_hours": train_seconds / _SECONDS_PER_HOUR, "embed_hours": embed_seconds / _SECONDS_PER_HOUR}
    hours["hours"] = sum(hours.values())
    return hours | ({} if per_hour is None else {"price": hours["hours"] * per_hour})
