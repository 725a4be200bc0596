"""The model from which a fine-tuning starts, and what the fine-tuning changed of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scvi

from census_scvi.config.random_streams import draw
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.fine_tuning.settings import NEW_BATCHES, RETRAIN, FineTuneSection
from census_scvi.metrics.distances import distances
from census_scvi.model.build import init_arguments
from census_scvi.model.encode import Encoder, extend_batches
from census_scvi.model.families import SCVI
from census_scvi.model.published import load_described
from census_scvi.model.safe import ModelDescription, weights_digest
from census_scvi.model.settings import ModelSection
from census_scvi.model.typical import typical_cells
from census_scvi.query.surgery.movement import TOLERANCE, ReferenceSample, movement
from census_scvi.query.surgery.requirements import no_effect, require_extendable
from census_scvi.query.surgery.settings import JOINT
from census_scvi.query.surgery.train import extend_for_training

_MOST_CELLS = 1024


@dataclass(frozen=True)
class FineTuned:
    """A model that is fine-tuned.

    Attributes
    ----------
    before, before_description
        The model as it is.
    model, description
        The model with the new batches, whose weights are the mean of those of its own batches.
    untrained
        Why no training is needed; "" if the model is trained.
    """

    before: scvi.model.SCVI
    before_description: ModelDescription
    model: scvi.model.SCVI
    description: ModelDescription
    untrained: str


def load_for_fine_tuning(
    settings: FineTuneSection, model: ModelSection, organism: str, batch_key: list[str]
) -> tuple[scvi.model.SCVI, ModelDescription]:
    """The model `fine_tune.model`; UserError if it is of another kind, organism, batch key or size than the config."""
    place = str(settings.model)
    trained, description = load_described(place)
    shown = f"fine_tune.model {without_credentials(place)}"
    if description.model != SCVI:
        raise UserError(
            f"{shown} is a {description.model} model, and only SCVI can be fine-tuned: the labels or proteins of the"
            " new cells would need weights of their own, too; train the model again on the cells of both releases"
        )
    if model.kind != SCVI:
        raise UserError(f"{shown} is an SCVI model, and model.kind is {model.kind}; set it to SCVI")
    if description.organism != organism:
        raise UserError(
            f"{shown} was trained on {description.organism}, and census.organism is {organism}; give a model of"
            f" {organism}"
        )
    if description.batch_key != batch_key:
        raise UserError(
            f"{shown} has the batches of anndata.batch_key {description.batch_key}, and the config has {batch_key}; set"
            " it to the same"
        )
    own = init_arguments(model)
    for name, value in description.arguments.items():
        if own.get(name) != value:
            raise UserError(
                f"{shown} has {name} {value}, and the section model of this config {own.get(name)}; fine-tuning changes"
                " no sizes: set it to the same"
            )
    return trained, description


def start_from(
    settings: FineTuneSection, before: tuple[scvi.model.SCVI, ModelDescription], cells: PreparedCells, seed: int
) -> FineTuned:
    """The model that a fine-tuning trains.

    Parameters
    ----------
    settings
        The section `fine_tune`.
    before
        Result of `load_for_fine_tuning`.
    cells
        The prepared cells; their batches are those of the model, then others.
    seed
        Seed of weights that have no mean to start from.

    Raises
    ------
    UserError
        The prepared cells have other genes, or mode new_batches cannot extend the model.
    """
    trained, description = before
    if cells.genes != description.genes:
        shared = len(set(cells.genes) & set(description.genes))
        raise UserError(
            f"{cells.path} has {len(cells.genes):,} genes, and fine_tune.model {len(description.genes):,}; {shared:,}"
            " are in both: all must be equal; run scvi-fine-tune.py --force"
        )
    new = cells.batches[len(description.batches) :]
    extension = replace(description, batches=cells.batches, n_cells=cells.n_cells, scvi_tools=scvi.__version__)
    extension = replace(extension, lineage=list(description.lineage))
    untrained, starts = "", extend_batches(trained, description.genes, new)
    if settings.mode == NEW_BATCHES:
        require_extendable(trained, description, new)
        untrained = _untrained(settings, trained, new)
    if settings.mode == RETRAIN:
        return FineTuned(trained, description, extension.build(), extension, "")
    if settings.mode == NEW_BATCHES and not untrained:
        model = extend_for_training(trained, extension, cells=cells, seed=seed)
    else:
        model = extension.build()
    model.module.load_state_dict(starts.module.state_dict())
    return FineTuned(trained, description, model, extension, untrained)


def _untrained(settings: FineTuneSection, model: scvi.model.SCVI, new: list[str]) -> str:
    """Why mode new_batches does not train; "" if it does."""
    if settings.decoder and not model.module.encode_covariates:
        return ""
    if not model.module.encode_covariates:
        return (
            "the encoder does not use the batch (encode_covariates: false), so the embedding of every cell is that of"
            f" {without_credentials(str(settings.model))}, with and without training; fine_tune.decoder=true trains the"
            " decoder's weights of the new batches"
        )
    return no_effect(model, new, JOINT)


def changed(
    tuned: FineTuned, after: scvi.model.SCVI, settings: FineTuneSection, cells: PreparedCells
) -> dict[str, Any]:
    """What the fine-tuning changed of the embedding of the model's own cells.

    Parameters
    ----------
    tuned, after
        The fine-tuning, and the trained model, on the CPU.
    settings
        The section `fine_tune`.
    cells
        The prepared cells, which are compared if none of the model's own cells are available.

    Returns
    -------
    `cells` and `source` of the sample, the `mean` and `largest` distance, and `scale`, the mean distance of cells from
    their center.

    Raises
    ------
    UserError
        The embedding moved although the mode is new_batches.
    """
    sample = _sample(str(settings.model), tuned.before_description, cells)
    found = movement(tuned.before, after, sample)
    if settings.mode == NEW_BATCHES and not found.latent <= TOLERANCE:
        raise UserError(
            f"fine_tune.mode new_batches moved the embedding of {found.cells:,} cells of the {found.source} by up to"
            f" {found.latent:.2g}, at most {TOLERANCE:g} is allowed (weights of the encoder by {found.weights:.2g});"
            " nothing was written. Remove weight_decay and the like from training_plan"
        )
    latents = [Encoder(model)(sample.counts, sample.codes).mean for model in (tuned.before, after)]
    moved = distances(*latents)
    return {
        "cells": found.cells,
        "source": found.source,
        "mean": moved.mean,
        "largest": moved.largest,
        "scale": moved.scale,
    }


def _sample(place: str, description: ModelDescription, cells: PreparedCells) -> ReferenceSample:
    """Cells of the model in its batches; without any, prepared cells."""
    known = {label: code for code, label in enumerate(description.batches)}
    typical = typical_cells(place, description.genes)
    if typical is not None:
        chosen = draw(len(typical.batches), _MOST_CELLS, np.random.default_rng(0))
        labels = enumerate(typical.batches[chosen])
        codes = np.array([known.get(label, number % len(known)) for number, label in labels], np.int64)
        return ReferenceSample(typical.counts[chosen], codes, "model")
    rows = cells.read([(0, min(_MOST_CELLS, cells.n_cells))])
    codes = np.where(rows.batch_codes < len(known), rows.batch_codes, np.arange(len(rows)) % len(known))
    return ReferenceSample(rows.csr(cells.n_genes), codes, "prepared cells")


def lineage_record(
    settings: FineTuneSection, before: tuple[scvi.model.SCVI, ModelDescription], origins: list[dict[str, Any]]
) -> dict[str, Any]:
    """The record of a fine-tuning in `ModelDescription.lineage`, before its training."""
    return {
        "fine_tuned_from": without_credentials(str(settings.model)),
        "weights_sha256": weights_digest(before[0]),
        "batches_before": len(before[1].batches),
        "mode": settings.mode,
        "cells_of_model": without_credentials(origins),
    }
