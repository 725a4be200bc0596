"""Adapt a reference model to the batches of a query: checks, training cells, trainings, result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import scvi

from census_scvi.config.run_names import FINGERPRINT
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import directory_lock
from census_scvi.model.encode import labels_with
from census_scvi.model.safe import ModelDescription, weights_digest
from census_scvi.model.typical import TypicalCells
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.batches import required_batches
from census_scvi.query.surgery.adapted import Adapted, in_number, in_words, require_work_folder
from census_scvi.query.surgery.cells import TrainingCells, write_training_cells
from census_scvi.query.surgery.movement import ReferenceSample, reference_sample
from census_scvi.query.surgery.requirements import no_effect, require_extendable
from census_scvi.query.surgery.settings import JOINT, SEQUENTIAL, SurgeryTraining
from census_scvi.query.surgery.train import ExtendedModel, train_extension

log = logging.getLogger(__name__)

_CELLS, _LOCK = "cells.h5ad", "surgery.lock"


@dataclass(frozen=True)
class Reference:
    """The model to adapt.

    Attributes
    ----------
    model, description
        The trained model.
    cells
        Some of its cells, by which it is compared before and after; None if there are none.
    """

    model: scvi.model.SCVI
    description: ModelDescription
    cells: TypicalCells | None = None


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes
    ----------
    mode
        `joint`: one training with all batches; `per_batch`: one for each batch, all from the reference; `sequential`:
        one for each batch, each from the model that the training before extended.
    batches
        Batch labels of the query: `sequential` adds them in this order.
    training
        Settings of each training.
    epochs
        Maximum number of epochs of each training by its first batch, where it is not that of `training`.
    """

    mode: str
    batches: list[str]
    training: SurgeryTraining
    epochs: Mapping[str, int] = field(default_factory=dict)

    def groups(self) -> list[list[str]]:
        """Batches of each training."""
        return [self.batches] if self.mode == JOINT else [[label] for label in self.batches]

    def training_of(self, batches: list[str]) -> SurgeryTraining:
        """Settings of the training of some batches."""
        epochs = self.epochs.get(batches[0], self.training.max_epochs)
        return self.training.model_copy(update={"max_epochs": epochs})


def plan_surgery(reference: Reference, labels: Sequence[str], mode: str, training: SurgeryTraining) -> tuple[Plan, str]:
    """What a surgery would train, and why it would not change the embedding ("" if it would).

    Parameters
    ----------
    reference
        The model.
    labels
        Batch of each cell of the query.
    mode, training
        Settings.

    Raises
    ------
    UserError
        The model cannot be extended by these batches (`require_extendable`), or the order of the batches is wrong.
    """
    batches = [str(label) for label in dict.fromkeys(labels)]
    training.require_kind(reference.description.model)
    require_extendable(reference.model, reference.description, batches)
    if mode == SEQUENTIAL and training.order is not None:
        if sorted(training.order) != sorted(batches):
            raise UserError(
                f"query.surgery_training.order is {training.order}, and the batches of the query are {batches}; name"
                " each of them once"
            )
        batches = list(training.order)
    return Plan(mode, batches, training), no_effect(reference.model, batches, mode)


def adapt(
    reference: Reference,
    aligned: AlignedCells,
    batch_key: Sequence[str],
    mode: str,
    training: SurgeryTraining,
    work: Path,
    *,
    seed: int,
    accelerator: str = "auto",
    epochs: Mapping[str, int] | None = None,
) -> Adapted:
    """Extend a model by the batches of a query, train their weights, and check that the reference did not move.

    Parameters
    ----------
    reference
        The model.
    aligned
        The query's cells with the model's genes.
    batch_key
        obs columns whose combinations are the batches.
    mode
        `joint`, `per_batch` or `sequential` (`Plan.mode`).
    training
        Settings of the trainings.
    work
        Folder for unfinished work and the models. An interrupted surgery with the same model, cells and settings
        continues there; work of another one is replaced.
    seed
        Seed of new weights, order of cells, dropout and samples.
    accelerator
        As `train.accelerator`.
    epochs
        Maximum number of epochs of some trainings, see `Plan.epochs`.

    Raises
    ------
    UserError
        The model cannot be extended by these batches, a batch has too few cells, the loss is not finite, or the
        reference moved. No model is written then.
    """
    require_work_folder(work)
    labels = required_batches(aligned.obs, batch_key, "query.batch_key")
    plan, reason = plan_surgery(reference, list(labels), mode, training)
    plan = replace(plan, epochs=dict(epochs or {}))
    facts: dict[str, Any] = {"mode": mode, "batches": plan.batches, "reason": reason, "seed": seed}
    if reason:
        log.warning("query.surgery: %s is not done: %s", mode, reason)
        return Adapted(list(batch_key), plan.batches, [], facts)
    work.mkdir(parents=True, exist_ok=True)
    with directory_lock(work / _LOCK, "query.surgery"), _removed_if_refused(work):
        parts = _parts(plan, reference.description.batches, work)
        digest = write_training_cells(aligned, labels, reference.description, parts)
        origin = {
            "reference": weights_digest(reference.model),
            "query": {"name": aligned.name, "sha256": digest, "cells": len(aligned)},
            "mode": mode,
            "seed": seed,
            "scvi_tools": scvi.__version__,
        }
        _continue_or_clear(
            work, origin | {"batches": plan.batches, "training": training.model_dump(), "epochs": plan.epochs}
        )
        sample = reference_sample(reference.cells, reference.description, aligned)
        models = _train_all(reference, plan, parts, sample, origin, accelerator)
    facts |= origin | {"training": training.model_dump(), "trainings": [each.training.as_dict() for each in models]}
    used = models[-1:] if mode == SEQUENTIAL else models
    adapted = Adapted(
        list(batch_key),
        plan.batches,
        [(each.model, each.description) for each in used],
        facts,
        [each.folder for each in used],
    )
    log.info("%s", in_words(adapted.facts))
    return adapted


@contextmanager
def _removed_if_refused(work: Path) -> Iterator[None]:
    """Remove the folder after an error that the user can fix: work on the same cells would end in it again."""
    try:
        yield
    except UserError:
        remove(work)
        raise


def _parts(plan: Plan, trained: list[str], work: Path) -> list[TrainingCells]:
    """The cells of each training, in a folder for each."""
    parts = []
    known = trained
    for number, batches in enumerate(plan.groups()):
        categories = labels_with(known, batches)
        folder = work / f"training-{number:03}"
        folder.mkdir(exist_ok=True)
        parts.append(TrainingCells(batches, categories, folder / _CELLS))
        known = categories if plan.mode == SEQUENTIAL else trained
    return parts


def _continue_or_clear(work: Path, fingerprint: dict[str, Any]) -> None:
    """Keep unfinished work of the same surgery; remove that of another one."""
    path = work / FINGERPRINT
    try:
        same = read_json(path) == fingerprint
    except (OSError, ValueError):
        same = False
    if same:
        log.info("continuing the surgery in %s", work)
        return
    for folder in work.glob("training-*"):
        for left in folder.iterdir():
            if left.name != _CELLS:
                remove(left)
    write_json(path, fingerprint)


def _train_all(
    reference: Reference,
    plan: Plan,
    parts: list[TrainingCells],
    sample: ReferenceSample,
    lineage: dict[str, Any],
    accelerator: str,
) -> list[ExtendedModel]:
    """The extended model of each training; the files of cells are removed."""
    models: list[ExtendedModel] = []
    for part in parts:
        base = (reference.model, reference.description)
        if plan.mode == SEQUENTIAL and models:
            base = (models[-1].model, models[-1].description)
        log.info("surgery (%s): training %s", plan.mode, in_number(part.batches))
        models.append(
            train_extension(
                base,
                part,
                plan.training_of(part.batches),
                sample,
                part.file.parent,
                lineage=lineage,
                seed=int(lineage["seed"]),
                accelerator=accelerator,
            )
        )
    for part in parts:
        remove(part.file)
    return models
