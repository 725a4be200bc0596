"""Extend a model by batches as scvi-tools does, and train their weights on the query's cells."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch

from census_scvi.config.run_names import CHECKPOINT
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of, remove, write_json
from census_scvi.files.json_file import read_json
from census_scvi.model.build import EMPIRICAL_PRIOR, skeleton, without_training
from census_scvi.model.encode import batch_labels, without_protein_priors
from census_scvi.model.safe import ModelDescription, load_safe, save_for_scvi_tools, save_safe
from census_scvi.model.seeded import seeded
from census_scvi.query.surgery.cells import TrainingCells
from census_scvi.query.surgery.movement import Movement, ReferenceSample, movement, require_unmoved
from census_scvi.query.surgery.settings import SurgeryTraining
from census_scvi.training.callbacks import LearningCurves
from census_scvi.training.cells_in_memory import keeps_cells
from census_scvi.training.finite_loss import Named
from census_scvi.training.fit import fit, loader_threads
from census_scvi.training.initial import set_protein_priors
from census_scvi.training.settings import TrainSection

log = logging.getLogger(__name__)

MODEL, FACTS = "model", "training.json"
_NAMED = Named(
    "lower query.surgery_training.lr", "the query's cells of this training", "correct the counts of the query"
)


@dataclass(frozen=True)
class Training:
    """Facts of the training of one extension.

    Attributes
    ----------
    batches
        The batches that were added.
    cells, epochs, steps
        Number of training cells, epochs and optimiser steps.
    seconds
        Time of the training; of a resumed one, since it resumed.
    elbo_first, elbo_last
        Negative evidence lower bound of the training cells in the first and in the last epoch.
    moved
        What changed of the model that was extended.
    """

    batches: list[str]
    cells: int
    epochs: int
    steps: int
    seconds: float
    elbo_first: float
    elbo_last: float
    moved: Movement

    def as_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ExtendedModel:
    """A model that was extended and trained.

    Attributes
    ----------
    model, description
        The model, with the batches of reference and query.
    training
        Facts of its training.
    folder
        Folder with its safe form and model.pt.
    """

    model: scvi.model.SCVI
    description: ModelDescription
    training: Training
    folder: Path


def extend_for_training(
    model: scvi.model.SCVI,
    extension: ModelDescription,
    *,
    cells: PreparedCells | None = None,
    seed: int,
    options: dict[str, bool] | None = None,
) -> scvi.model.SCVI:
    """The model as scvi-tools' `load_query_data` extends it: new weights drawn at random, only they are trainable.

    Parameters
    ----------
    model
        The trained model.
    extension
        The extended model: its first batches are those of the model.
    cells
        Cells of the new batches, from which TOTALVI takes the initial prior of their protein background; None: random.
    seed
        Seed of the new weights.
    options
        Options of `load_query_data`, such as `freeze_dropout`.
    """
    some = skeleton(extension.genes, extension.batches, extension.of_labels, extension.of_proteins)
    with seeded(seed), without_training(), without_protein_priors(model):
        extended: scvi.model.SCVI = type(model).load_query_data(some, model, accelerator="cpu", **(options or {}))
        if extension.proteins and cells is not None:
            _set_new_protein_priors(model, extended, extension, cells)
    if (found := batch_labels(extended)) != extension.batches:
        raise RuntimeError(f"scvi-tools has the batches in the order {found}, expected {extension.batches}")
    if extension.labels and (options or {}).get("freeze_classifier", True):
        _freeze_classifier(extended.module.classifier)
    return extended


def _freeze_classifier(classifier: torch.nn.Module) -> None:
    """Freeze BatchNorm, too, which scvi-tools trains: its running statistics, and the weights of its first layer."""
    classifier.requires_grad_(False)
    for layer in classifier.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.momentum = 0.0


def _set_new_protein_priors(
    model: scvi.model.TOTALVI, extended: scvi.model.TOTALVI, extension: ModelDescription, cells: PreparedCells
) -> None:
    """Set the initial prior of the protein background of the new batches from their cells, as scvi-tools does."""
    arguments = extended.init_params_["non_kwargs"]
    arguments[EMPIRICAL_PRIOR] = extension.arguments.get(EMPIRICAL_PRIOR)
    set_protein_priors(extended, cells, extension)
    n_trained = len(batch_labels(model))
    for name in ("background_pro_alpha", "background_pro_log_beta"):
        getattr(extended.module, name).data[:, :n_trained] = getattr(model.module, name).data


def train_extension(
    reference: tuple[scvi.model.SCVI, ModelDescription],
    cells: TrainingCells,
    settings: SurgeryTraining,
    sample: ReferenceSample,
    folder: Path,
    *,
    lineage: dict[str, Any],
    seed: int,
    accelerator: str = "auto",
) -> ExtendedModel:
    """Extend a model, train the new weights, check that the model's own cells did not move, and save the result.

    Parameters
    ----------
    reference
        The model to extend, and its description.
    cells
        The query's cells.
    settings
        Settings of the training.
    sample
        Cells of the reference.
    folder
        Folder for checkpoints and result; an interrupted training continues, and a finished one is read from it.
    lineage
        What the description of the extended model records of its origin.
    seed
        Seed of the new weights and of the training.
    accelerator
        As `train.accelerator`.

    Raises
    ------
    UserError
        The reference moved, the loss is not finite, or a batch has no training cells.
    """
    if not (folder / MODEL).exists():
        _train(reference, cells, settings, sample, folder, lineage=lineage, seed=seed, accelerator=accelerator)
    model, description = load_safe(folder / MODEL)
    facts = read_json(folder / MODEL / FACTS)
    training = Training(**{**facts, "moved": Movement(**facts["moved"])})
    return ExtendedModel(model, description, training, folder / MODEL)


def _train(
    reference: tuple[scvi.model.SCVI, ModelDescription],
    cells: TrainingCells,
    settings: SurgeryTraining,
    sample: ReferenceSample,
    folder: Path,
    *,
    lineage: dict[str, Any],
    seed: int,
    accelerator: str,
) -> None:
    before, description = reference
    train = train_section(settings, accelerator)
    data = training_data(cells.file, description, train, seed)
    _require_training_cells(data, cells)
    extension = _extension(description, cells, data.cells)
    extended = extend_for_training(before, extension, cells=data.cells, seed=seed, options=settings.options)
    started = time.monotonic()
    curves = fit(
        extended,
        data,
        train,
        settings.plan,
        seed=seed,
        checkpoint=folder / CHECKPOINT,
        tensorboard=folder / "tb_logs",
        named=_NAMED,
    )
    seconds = curves.earlier[0] + time.monotonic() - started
    steps = len(data.train_dataloader()) * len(curves.curves["elbo_train"])
    data.cells.close()
    moved = movement(before, extended, sample)
    require_unmoved(moved)
    elbo = curves.curves["elbo_train"]
    training = Training(cells.batches, data.n_train, len(elbo), steps, round(seconds, 3), elbo[0], elbo[-1], moved)
    record = {**lineage, **training.as_dict()}
    _save(extended, replace(extension, lineage=[*extension.lineage, record]), training, curves, folder)


def train_section(settings: SurgeryTraining, accelerator: str) -> TrainSection:
    """The settings as those of a training of the model."""
    return TrainSection(
        max_epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        train_size=settings.share,
        early_stopping=settings.early_stopping,
        accelerator=accelerator,  # type: ignore[arg-type]  # pydantic checks it
        trainer=settings.stopping or None,
    )


def training_data(file: Path, description: ModelDescription, train: TrainSection, seed: int) -> PreparedDataModule:
    """Minibatches of a file of training cells."""
    data = PreparedDataModule(
        file,
        batch_size=train.batch_size,
        train_size=train.train_size,
        seed=seed,
        workers=loader_threads(train),
        labels=bool(description.labels),
        proteins=bool(description.proteins),
        require_labels=False,
    )
    data.in_memory = keeps_cells(train, data.cells)
    return data


def _extension(description: ModelDescription, part: TrainingCells, cells: PreparedCells) -> ModelDescription:
    """Description of the model with more batches."""
    missing = dict(description.missing_proteins)
    if description.proteins:
        found = cells.missing_proteins()
        missing |= {label: found[label] for label in part.batches if label in found}
    return replace(
        description,
        batches=part.categories,
        n_cells=description.n_cells + cells.n_cells,
        missing_proteins=missing,
        scvi_tools=scvi.__version__,
    )


def _require_training_cells(data: PreparedDataModule, cells: TrainingCells) -> None:
    """UserError if a batch has only validation cells: its weights would stay random."""
    trained = set(np.unique(data.cells.batch_codes[~data.validation]).tolist())
    for label in cells.batches:
        if cells.categories.index(label) not in trained:
            raise UserError(
                f"batch {label!r} has so few cells that all are for validation; set"
                " query.surgery_training.train_size=1.0 (without early_stopping)"
            )


def _save(
    trained: scvi.model.SCVI,
    description: ModelDescription,
    training: Training,
    curves: LearningCurves,
    folder: Path,
) -> None:
    """Write the safe form, model.pt and the facts; the folder appears when it is complete."""
    model = description.build()
    model.module.load_state_dict(trained.module.state_dict())
    model.module.eval()
    model.is_trained_ = True
    model.history_ = {
        name: pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))
        for name, values in curves.curves.items()
    }
    partial = partial_of(folder / MODEL)
    remove(partial)
    partial.mkdir()
    save_for_scvi_tools(model, partial)
    save_safe(model, description, partial)
    write_json(partial / FACTS, training.as_dict())
    partial.replace(folder / MODEL)
    remove(folder / CHECKPOINT)
