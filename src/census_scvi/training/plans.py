"""The training plan of each kind of model: scvi-tools' own, and this project's fast one for SCVI."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning
import scvi
import torch
from scvi.train import AdversarialTrainingPlan, SemiSupervisedTrainingPlan, TrainingPlan

from census_scvi.config.library_arguments import OF_EVERY_PLAN
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.minibatch import LABELLED, Minibatch
from census_scvi.model.families import SCANVI, SCVI, TOTALVI, family_of
from census_scvi.training.fast.plan import FastTrainingPlan
from census_scvi.training.fast.step import reason_against
from census_scvi.training.settings import TrainSection

log = logging.getLogger(__name__)


class LabelledTrainingPlan(SemiSupervisedTrainingPlan):
    """scvi-tools' plan of SCANVI, for minibatches whose labelled cells are under `"labelled"`, if there are any.

    The accuracy on validation cells is measured on those of their own that have a label.
    """

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> torch.Tensor:
        """Loss of a minibatch and of its labelled cells, if there are any."""
        cells = _without_labelled(minibatch)
        loss: torch.Tensor = super().training_step([cells, minibatch.get(LABELLED)], batch_idx)
        return loss

    def validation_step(self, minibatch: Minibatch, batch_idx: int) -> None:
        """Log the metrics of a minibatch."""
        cells = _without_labelled(minibatch)
        known = cells["labels"].squeeze(1) < self.n_classes
        labelled = {name: value[known] for name, value in cells.items()} if known.any() else None
        super().validation_step([cells, labelled], batch_idx)


def _without_labelled(minibatch: Minibatch) -> Minibatch:
    return {name: value for name, value in minibatch.items() if name != LABELLED}


def make_plan(
    settings: TrainSection, model: scvi.model.SCVI, data: PreparedDataModule, arguments: dict[str, Any]
) -> TrainingPlan:
    """The training plan of `train.engine`; scvi-tools' plan if the fast one does not support the model.

    Also sets `data.sparse`: the fast plan takes sparse minibatches, scvi-tools' plans dense ones.
    """
    kind, reason = type(model).__name__, reason_against(model.module)
    if arguments.get("compile"):
        reason = "training_plan.compile is on"
    elif settings.accelerator != "cpu" and torch.backends.mps.is_available():
        reason = "it has not been tested on this kind of GPU, mps"
    if settings.engine == "fast" and reason:
        log.info("train.engine fast does not support this model (%s): scvi-tools' own steps are used", reason)
    data.sparse = settings.engine == "fast" and not reason
    plan: TrainingPlan
    if data.sparse:
        plan = FastTrainingPlan(model.module, **plan_arguments(arguments, SCVI, data.cells.n_cells))
    else:
        plan = library_plan(model, plan_arguments(arguments, kind, data.cells.n_cells))
    plan.n_obs_training, plan.n_obs_validation = data.n_train, data.n_val
    return plan


def library_plan(model: scvi.model.SCVI, arguments: dict[str, Any]) -> TrainingPlan:
    """scvi-tools' training plan of a model, with the defaults of the model's `train`.

    Parameters
    ----------
    model
        The model, of any kind.
    arguments
        Result of `plan_arguments`.
    """
    kind = type(model).__name__
    if kind not in (SCANVI, TOTALVI):
        return TrainingPlan(model.module, **arguments)
    attributes = {name: arguments.pop(name) for name in OF_EVERY_PLAN if name in arguments}
    plan: TrainingPlan
    if kind == SCANVI:
        plan = LabelledTrainingPlan(model.module, n_classes=model.n_labels, **arguments)
    else:
        arguments.setdefault("adversarial_classifier", model.module.protein_batch_mask is not None)
        plan = AdversarialTrainingPlan(model.module, **arguments)
    for name, value in attributes.items():  # inherited from TrainingPlan, but not arguments of these plans
        setattr(plan, name, value)
    return plan


def unfused_if_clipped(plan: TrainingPlan, trainer: lightning.Trainer) -> None:
    """In reduced precision, Lightning cannot clip the gradients of a fused optimiser, which unscales them itself."""
    if trainer.gradient_clip_val and trainer.precision != "32-true":
        plan.fused_optimizer = False  # of scvi-tools 1.5 and newer, and of our own plan


def plan_arguments(settings: dict[str, Any], kind: str, n_cells: int) -> dict[str, Any]:
    """Arguments of the training plan for the section `training_plan` and a number of cells: a new copy."""
    arguments = dict(family_of(kind).plan_defaults) | copy.deepcopy(settings)
    if kind == TOTALVI and not arguments.get("n_epochs_kl_warmup"):
        arguments.setdefault("n_steps_kl_warmup", int(0.75 * n_cells))  # default of TOTALVI's `train`
    if arguments.get("n_steps_kl_warmup"):
        arguments.setdefault("n_epochs_kl_warmup", None)  # its default of 400 epochs would override the steps
    return arguments
