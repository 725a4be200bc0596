"""How long a surgery would take here: a few optimiser steps of the extended model, timed for --dry-run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.config.run_names import PROTEINS
from census_scvi.model.encode import labels_with
from census_scvi.query.surgery.adapt import Plan, Reference
from census_scvi.query.surgery.cells import TrainingCells, training_obs, training_writer
from census_scvi.query.surgery.requirements import no_effect
from census_scvi.query.surgery.settings import PER_BATCH, SurgeryTraining
from census_scvi.query.surgery.train import extend_for_training, train_section, training_data
from census_scvi.training.pace import seconds_per_cell
from census_scvi.training.plans import make_plan

# Counts of the simulated cells: share of the genes with counts, as in real cells; mean count.
_DENSITY, _MEAN = 0.1, 2.0
# Minibatches of an epoch of the sample: with one, the time between epochs would be counted as that of a step.
_MINIBATCHES = 8
_SAMPLE_SECONDS = 1.0
# Measured on one core for a small model: extending, checking and saving a model; logs and checkpoints of an epoch.
_TRAINING_SECONDS, _EPOCH_SECONDS = 0.5, 0.02


def plans_of_comparison(reference: Reference, labels: Sequence[str], joint: Plan) -> list[Plan]:
    """What `compare.map_in_all_ways` trains, for a plan of joint training: a sequence costs as much as per batch."""
    plans = [joint] * 3
    if len(joint.batches) == 1 or no_effect(reference.model, joint.batches, PER_BATCH):
        return plans
    training, sizes = joint.training, Counter(map(str, labels))
    steps = training.max_epochs * steps_per_epoch(sizes.total(), training)
    epochs = {label: max(round(steps / steps_per_epoch(sizes[label], training)), 1) for label in joint.batches}
    alone = Plan(PER_BATCH, joint.batches, training)
    return [*plans, alone, alone, alone, replace(alone, epochs=epochs)]


def surgery_seconds(reference: Reference, labels: Sequence[str], plans: Sequence[Plan], accelerator: str) -> float:
    """Seconds of the trainings of some surgeries, for the maximum number of epochs.

    Parameters
    ----------
    reference
        The model.
    labels
        Batch of each cell of the query.
    plans
        What would be trained.
    accelerator
        As `train.accelerator`.
    """
    sizes = Counter(map(str, labels))
    largest = max(sum(sizes[label] for label in group) for plan in plans for group in plan.groups())
    training = plans[0].training
    step = _seconds_per_step(reference, plans[0].batches[0], min(largest, training.batch_size), training, accelerator)
    seconds = 0.0
    for plan in plans:
        for group in plan.groups():
            settings = plan.training_of(group)
            steps = steps_per_epoch(sum(sizes[label] for label in group), settings)
            seconds += _TRAINING_SECONDS + settings.max_epochs * (_EPOCH_SECONDS + steps * step)
    return seconds


def steps_per_epoch(n_cells: int, training: SurgeryTraining) -> int:
    """Optimiser steps of an epoch of some cells."""
    return max(math.ceil(training.share * n_cells / training.batch_size), 1)


def _seconds_per_step(
    reference: Reference, batch: str, n_cells: int, training: SurgeryTraining, accelerator: str
) -> float:
    """Seconds of an optimiser step with a minibatch of simulated cells."""
    model, description = reference.model, reference.description
    n_cells = max(n_cells, 2)
    extension = replace(description, batches=labels_with(description.batches, [batch]))
    settings = training.model_copy(update={"train_size": 1.0, "early_stopping": False, "batch_size": n_cells})
    numbers = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        part = TrainingCells([batch], extension.batches, Path(folder) / "cells.h5ad")
        n_written = _MINIBATCHES * n_cells
        shape = (n_written, len(description.genes))
        filled = sp.random(*shape, _DENSITY, random_state=numbers, data_rvs=lambda n: 1 + numbers.poisson(_MEAN - 1, n))
        counts = sp.csr_matrix(filled).astype(np.float32)
        proteins = numbers.poisson(_MEAN, (n_written, len(description.proteins))).astype(np.float32)
        with training_writer(part.file, description) as writer:
            names = pd.RangeIndex(n_written).astype(str)
            obs = training_obs(np.full(n_written, batch, dtype=object), part, description, names)
            writer.append(obs, counts=counts, obsm={PROTEINS: proteins} if description.proteins else None)
        train = train_section(settings, accelerator)
        data = training_data(part.file, description, train, 0)
        extended = extend_for_training(model, extension, seed=0, options=training.options)
        plan = make_plan(train, extended, data, settings.plan)
        seconds = seconds_per_cell(plan, data, train, _SAMPLE_SECONDS)
        data.cells.close()
    return seconds * n_cells
