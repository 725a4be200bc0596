"""Train a classifier: early stopping, weights of the best epoch, checkpoints, progress, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from census_scvi.annotation.scnym.cells import CellSource, overview
from census_scvi.annotation.scnym.classifier import Classifier, device_of
from census_scvi.annotation.scnym.minibatches import TrainingCells, TrainingMinibatches, ValidationMinibatches
from census_scvi.annotation.scnym.module import VALIDATION_LOSS, ScNymModule
from census_scvi.annotation.scnym.network import CellTypeClassifier
from census_scvi.annotation.scnym.settings import Hyperparameters
from census_scvi.annotation.scnym.split import validation_cells
from census_scvi.errors import UserError
from census_scvi.model.build import quiet
from census_scvi.terminal.progress import progress_bar
from census_scvi.training.callbacks import Stoppable, TrainMode
from census_scvi.training.checkpoint import Checkpoint, StagedIO
from census_scvi.training.progress import EventLog
from census_scvi.training.threads import one_thread

log = logging.getLogger(__name__)

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule

UNLABELLED = "Unlabeled"  # the label that scNym gives to cells without a label
# Labels that look like those of unlabelled cells.
_VAGUE = ("unlabelled", "unlabeled", "unknown", "unassigned", "nan", "na", "none", "")
_CHECKPOINT, _TENSORBOARD = "checkpoint.ckpt", "tb_logs"


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes
    ----------
    classifier
        The classifier with the weights of the best epoch.
    history
        Losses, weights and accuracy of every epoch.
    best_epoch
        Number of the epoch whose weights were kept, from 0.
    validation
        bool (cells,): labelled cells that early stopping used.
    """

    classifier: Classifier
    history: pd.DataFrame
    best_epoch: int
    validation: npt.NDArray[np.bool_]


def train(
    source: CellSource,
    genes: list[str],
    labels: npt.NDArray[np.object_],
    settings: Hyperparameters,
    *,
    domains: npt.NDArray[np.object_] | None = None,
    donors: npt.NDArray[np.object_] | None = None,
    validation: npt.NDArray[np.bool_] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    accelerator: str = "auto",
) -> Trained:
    """Train a classifier on labelled and unlabelled cells.

    Parameters
    ----------
    source
        Raw counts of all cells, or values in the same ratios; cells without counts are not used.
    genes
        Names of the genes.
    labels
        (cells,): cell types; "Unlabeled" or a missing value: unlabelled.
    settings
        Hyper-parameters.
    domains
        (cells,): domain of each cell for the adversary; None: labelled and unlabelled cells are the two domains.
    donors
        (cells,): donor or study of each cell; whole ones are held out for early stopping where that is possible.
    validation
        bool (cells,): labelled cells for early stopping; None: chosen by `validation_cells`.
    seed
        Seed of everything that is random; the global random state is not changed.
    folder
        Folder of the checkpoint, from which a killed training resumes, and of the TensorBoard log; None: neither.
    accelerator
        auto, cpu or gpu.

    Raises
    ------
    UserError
        The labels cannot be used, the checkpoint is of another training, or there is no GPU.
    """
    cells, classes, profile = _cells(source, labels, domains, donors, validation, seed)
    _say(cells, classes)
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(seed)
        network = CellTypeClassifier(len(genes), len(classes), settings)
        module = ScNymModule(network, cells.n_domains, settings)
        same = SameTraining(_identity(genes, cells, classes, settings, seed))
        best, history = _fit(module, cells, settings, seed, folder, accelerator, same)
    network.load_state_dict(best.weights)
    log.info("weights of epoch %d of %d; validation loss %.4f", best.epoch + 1, len(history), best.loss)
    return Trained(Classifier(network, genes, classes, settings, profile), history, best.epoch, cells.validation)


def _cells(
    source: CellSource,
    labels: npt.NDArray[np.object_],
    domains: npt.NDArray[np.object_] | None,
    donors: npt.NDArray[np.object_] | None,
    validation: npt.NDArray[np.bool_] | None,
    seed: int,
) -> tuple[TrainingCells, list[str], npt.NDArray[np.float64]]:
    """The cells of a training, its classes, and the mean profile of the labelled cells."""
    for name, values in {"labels": labels, "domains": domains, "donors": donors, "validation": validation}.items():
        if values is not None and len(values) != source.shape[0]:
            raise UserError(f"there are {len(values):,} {name} of {source.shape[0]:,} cells; give one per cell")
    missing = pd.isna(labels)
    names = np.where(missing, UNLABELLED, labels.astype(str))
    if missing.any():
        log.info("%d cells have no label; they are used as unlabelled cells", missing.sum())
    labelled = names != UNLABELLED
    seen = overview(source, labelled)
    if not seen.filled.all():
        log.warning("%d of %d cells have no counts and are not used", (~seen.filled).sum(), len(seen.filled))
    labelled &= seen.filled
    classes = sorted(set(names[labelled].tolist()))
    if len(classes) < 2:
        raise UserError(
            f"the {labelled.sum():,} labelled cells have {len(classes)} label(s){f', {classes[0]}' if classes else ''};"
            f" two or more are needed, and {UNLABELLED!r} is none"
        )
    codes = np.full(len(names), -1)
    codes[labelled] = np.searchsorted(classes, names[labelled])
    if validation is None:
        validation = np.zeros(len(names), bool)
        some = None if donors is None else donors[labelled]
        validation[labelled] = validation_cells(codes[labelled], some, seed)
    validation = validation & labelled
    training = labelled & ~validation
    if absent := sorted({classes[code] for code in codes[labelled]} - {classes[code] for code in codes[training]}):
        raise UserError(f"all cells of {', '.join(absent[:5])} are for validation; leave some of them for training")
    unlabelled = seen.filled & ~labelled
    used = training | unlabelled
    domain_names = np.where(labelled, 0, 1) if domains is None else domains.astype(str)
    domain_codes = np.zeros(len(names), np.int64)
    domain_codes[used] = np.unique(domain_names[used], return_inverse=True)[1]
    cells = TrainingCells(source, codes, domain_codes, training, validation, unlabelled)
    return cells, classes, seen.profile


def _say(cells: TrainingCells, classes: list[str]) -> None:
    log.info(
        "%d classes; %d labelled cells for training, %d for validation; %d unlabelled cells; %d domain(s)",
        len(classes),
        cells.training.sum(),
        cells.validation.sum(),
        cells.unlabelled.sum(),
        cells.n_domains,
    )
    numbers = np.bincount(cells.codes[cells.training], minlength=len(classes))
    if few := [name for name, number in zip(classes, numbers, strict=True) if number == 1]:
        log.warning("only one cell to train on: %s; predictions of such classes cannot be trusted", ", ".join(few[:5]))
    if vague := [name for name in classes if name.casefold() in _VAGUE]:
        log.warning("%s is trained like a cell type; label such cells %r instead", ", ".join(vague), UNLABELLED)


def _fit(
    module: ScNymModule,
    cells: TrainingCells,
    settings: Hyperparameters,
    seed: int,
    folder: Path | None,
    accelerator: str,
    same: SameTraining,
) -> tuple[BestWeights, pd.DataFrame]:
    pseudolabelled = bool(cells.unlabelled.any()) and (settings.unsup_max_weight > 0 or module.adversary is not None)
    best, history = BestWeights(settings), History()
    callbacks: list[lightning.Callback] = [same, Stoppable(), TrainMode(), best, history, Epochs()]
    arguments: dict[str, Any] = {"logger": False}
    checkpoint = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / _CHECKPOINT
        callbacks.append(Checkpoint(checkpoint, math.inf))
        arguments = {
            "logger": EventLog(folder, name=_TENSORBOARD, version="", sub_dir=None),
            "plugins": StagedIO(),
            "default_root_dir": str(folder),
        }
    with (
        warnings.catch_warnings(),
        quiet("lightning.pytorch", logging.WARNING),
        quiet("lightning.fabric", logging.WARNING),
    ):
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        trainer = Trainer(
            accelerator=device_of(accelerator).type,
            devices=1,
            max_epochs=settings.n_epochs,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            callbacks=callbacks,
            **arguments,
        )
        minibatches = TrainingMinibatches(
            cells,
            settings.batch_size,
            balanced=settings.balanced_classes,
            pseudolabelled=pseudolabelled,
            seed=seed,
            epoch=lambda: trainer.current_epoch,
        )
        validation = ValidationMinibatches(cells) if cells.validation.any() else None
        resumed = checkpoint if checkpoint is not None and checkpoint.exists() else None
        if resumed is not None and not zipfile.is_zipfile(resumed):
            raise UserError(f"{resumed} is damaged; remove it to start again")
        trainer.fit(module, minibatches, validation, ckpt_path=resumed, weights_only=True)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return best, history.table()


_EXPECTED_WARNINGS = (
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "You defined a .validation_step. but have no .val_dataloader.",
    "Checkpoint directory .* exists",
    "Found .* in eval mode",
    ".isinstance.treespec, LeafSpec.. is deprecated",
)


def _identity(
    genes: list[str], cells: TrainingCells, classes: list[str], settings: Hyperparameters, seed: int
) -> dict[str, str]:
    """What a checkpoint and the training that resumes from it have in common."""
    values = {
        "genes": genes,
        "classes": classes,
        "hyper-parameters": settings.model_dump(),
        "seed": seed,
        "cells": [part.tobytes().hex() for part in (cells.codes, cells.domains, cells.training, cells.unlabelled)],
    }
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}


class SameTraining(lightning.Callback):
    """Refuses the checkpoint of another training."""

    def __init__(self, identity: dict[str, str]) -> None:
        self._identity = identity

    def state_dict(self) -> dict[str, Any]:
        """The identity of this training."""
        return dict(self._identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """UserError if a checkpoint is of another training."""
        differ = [name for name, value in self._identity.items() if state_dict.get(name) != value]
        if differ:
            raise UserError(
                f"the checkpoint in the folder is of a training with other {', '.join(differ)}; use another folder, or"
                f" remove {_CHECKPOINT}"
            )


class BestWeights(lightning.Callback):
    """Keeps the weights of the epoch with the lowest validation loss, and stops when it no longer falls.

    Epochs before `min_epochs` are neither kept nor waited for. Without validation cells, the last weights are kept.
    """

    def __init__(self, settings: Hyperparameters) -> None:
        self._first, self._patience = settings.first_kept_epoch, settings.patience
        self.epoch, self.loss = -1, math.inf
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Compare the validation loss of the epoch with the lowest so far."""
        epoch = trainer.current_epoch
        if VALIDATION_LOSS not in trainer.callback_metrics:
            if epoch + 1 == trainer.max_epochs:
                self._keep(epoch, math.nan, pl_module)
            return
        loss = float(trainer.callback_metrics[VALIDATION_LOSS])
        if not math.isfinite(loss):
            raise UserError(
                f"the validation loss is {loss} in epoch {epoch + 1}: lower lr in the overrides, and check that the"
                " values are counts"
            )
        if epoch >= self._first and loss < self.loss:
            self._keep(epoch, loss, pl_module)
        elif epoch >= self._first and epoch - self.epoch > self._patience:
            trainer.should_stop = True

    def _keep(self, epoch: int, loss: float, module: Module) -> None:
        self.epoch, self.loss = epoch, loss
        self.weights = {name: value.detach().cpu().clone() for name, value in module.network.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"epoch": self.epoch, "loss": self.loss, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.epoch, self.loss, self.weights = state_dict["epoch"], state_dict["loss"], state_dict["weights"]


class History(lightning.Callback):
    """The metrics of every epoch; a resumed training continues them."""

    def __init__(self) -> None:
        self._epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Append the metrics of the epoch."""
        self._epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def table(self) -> pd.DataFrame:
        """One row per epoch."""
        return pd.DataFrame(self._epochs)

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self._epochs = state_dict["epochs"]


class Epochs(lightning.Callback):
    """A progress bar over the epochs."""

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Show the bar."""
        self._bar = progress_bar(trainer.max_epochs or 1, "train", done=trainer.current_epoch, unit="epochs")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Show the losses of the epoch."""
        shown = ("train_loss", VALIDATION_LOSS, "validation_accuracy")
        metrics = trainer.callback_metrics
        self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown if name in metrics})
        self._bar.update(1)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Close the bar."""
        if hasattr(self, "_bar"):
            self._bar.close()
