"""How fast a model trains here: a few optimiser steps, timed for --dry-run."""

from __future__ import annotations

import itertools
import time

import torch
from scvi.train import TrainingPlan

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.minibatch import LABELLED, Minibatch, each_value
from census_scvi.training.fast.step import unused_frozen


def seconds_per_cell(
    plan: TrainingPlan, data: PreparedDataModule, device: str, precision: str, sample_seconds: float
) -> float:
    """Seconds per cell of optimiser steps, including reading; the model is changed.

    Parameters
    ----------
    plan, data
        The training.
    device
        `cpu` or `cuda`.
    precision
        `float32`, `bf16` or `fp16`.
    sample_seconds
        How long to train.
    """
    module = plan.module.to(device).train()
    minibatches = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    reduced = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with unused_frozen(module), torch.autocast(device, reduced, enabled=reduced is not None):
        optimiser = plan.get_optimizer_creator()(filter(lambda parameter: parameter.requires_grad, module.parameters()))
        for minibatch in itertools.islice(minibatches, 2):  # warm-up; fills the first window
            _step(plan, optimiser, minibatch, device)
            data.give_back(minibatch)
        started, cells = time.monotonic(), 0
        while (elapsed := time.monotonic() - started) < sample_seconds:
            minibatch = next(minibatches)
            cells += _step(plan, optimiser, minibatch, device)
            data.give_back(minibatch)
    return elapsed / cells


def _step(plan: TrainingPlan, optimiser: torch.optim.Optimizer, minibatch: Minibatch, device: str) -> int:
    cells = each_value(minibatch, lambda value: value.to(device))
    labelled = {"labelled_tensors": cells.pop(LABELLED)} if LABELLED in cells else {}
    _, _, losses = plan(cells, loss_kwargs=plan.loss_kwargs | {"kl_weight": 1.0} | labelled)
    optimiser.zero_grad()
    losses.loss.backward()
    optimiser.step()
    return len(minibatch["row"])
