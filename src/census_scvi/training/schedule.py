"""Check before training whether the settings give enough optimiser steps, and propose settings that do."""

from __future__ import annotations

from typing import Any

from census_scvi.training.settings import TrainSection

# In the trainings of docs/publishing.md, those with 1,000 steps or more had converged, shorter ones had not.
LEAST_STEPS = 1000
_BATCH_SIZE = 128  # default of scvi-tools
_KL_WARMUP_EPOCHS = 400  # default of scvi-tools


def warnings_before(settings: TrainSection, plan: dict[str, Any], n_train: int, processes: int) -> list[str]:
    """Reasons why the model may not converge, each with settings that help; empty if there are none.

    Parameters
    ----------
    settings, plan
        The section `train`, and the arguments of the training plan (`plans.plan_arguments`).
    n_train
        Number of training cells.
    processes
        Number of processes, each with its own minibatches.
    """
    trainer = settings.trainer or {}
    an_epoch = -(-n_train // (settings.batch_size * processes * trainer.get("accumulate_grad_batches", 1)))
    steps = an_epoch * settings.max_epochs
    if trainer.get("max_steps", -1) > 0:
        steps = min(steps, trainer["max_steps"])
    found = []
    if steps < LEAST_STEPS:
        batch_size = min(settings.batch_size, _BATCH_SIZE)
        epochs = proposed_epochs(n_train, batch_size * processes)
        found.append(
            f"{n_train:,} training cells in minibatches of {settings.batch_size:,} for {settings.max_epochs} epochs are"
            f" {steps:,} optimiser steps, but a model needs at least {LEAST_STEPS:,}; try train.batch_size={batch_size}"
            f" train.max_epochs={epochs} (configs/small.yaml has settings for few cells)"
        )
    warm_up, of, unit = plan.get("n_epochs_kl_warmup", _KL_WARMUP_EPOCHS), settings.max_epochs, "epochs"
    if plan.get("n_steps_kl_warmup"):
        warm_up, of, unit = plan["n_steps_kl_warmup"], steps, "steps"
    if warm_up and warm_up > of:
        found.append(
            f"the KL divergence reaches its full weight after {warm_up:,} {unit}, but training ends after {of:,}, at"
            f" {of / warm_up:.0%} of it; try training_plan.n_{unit}_kl_warmup={max(of // 4, 1)}"
        )
    return found


def proposed_epochs(n_train: int, cells_a_step: int) -> int:
    """Number of epochs by scvi-tools' rule (400 up to 20,000 cells, then fewer), but enough for `LEAST_STEPS`."""
    rule = min(round(20_000 / n_train * 400), 400)
    return max(rule, -(-LEAST_STEPS // -(-n_train // cells_a_step)))
