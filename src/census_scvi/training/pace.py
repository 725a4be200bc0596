"""How fast a model trains here: a few steps of a real training, timed for --dry-run."""

from __future__ import annotations

import time
import warnings
from typing import TypeAlias

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from scvi.train import Trainer, TrainingPlan

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.minibatch import Minibatch
from census_scvi.model.build import quiet
from census_scvi.training.callbacks import GiveBack, TrainMode
from census_scvi.training.fast.step import unused_frozen
from census_scvi.training.fit import matmul_precision, trainer_arguments
from census_scvi.training.settings import TrainSection

Module: TypeAlias = lightning.LightningModule

# Steps before the first that is timed: they fill the first window, and record the graph of a step on a GPU.
_WARM_UP = 2
_ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def seconds_per_cell(
    plan: TrainingPlan, data: PreparedDataModule, settings: TrainSection, sample_seconds: float
) -> float:
    """Seconds per cell of training steps on one device, including reading; the model is changed.

    Parameters
    ----------
    plan, data
        The training.
    settings
        The `train` section.
    sample_seconds
        How long to train.
    """
    sample = _Sample(sample_seconds)
    arguments = trainer_arguments(settings, data) | _ONE_DEVICE | {"max_epochs": -1, "limit_val_batches": 0}
    with (
        warnings.catch_warnings(),
        quiet("lightning.pytorch"),
        quiet("lightning.fabric"),
        unused_frozen(plan.module),
        matmul_precision(settings),
    ):
        warnings.simplefilter("ignore")
        callbacks = [TrainMode(), sample, GiveBack()]
        trainer = Trainer(callbacks=callbacks, logger=DummyLogger(), plugins=LightningEnvironment(), **arguments)
        trainer.fit(plan, data)
    return sample.seconds / sample.cells


class _Sample(lightning.Callback):
    """Times steps, and stops the training after some seconds."""

    def __init__(self, at_most: float) -> None:
        self._at_most = at_most
        self._steps = 0
        self._started = self.seconds = 0.0
        self.cells = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Module, outputs: object, batch: Minibatch, batch_idx: int
    ) -> None:
        """Count the cells of a minibatch."""
        self._steps += 1
        if self._steps == _WARM_UP:
            self._started = _now(pl_module)
        elif self._steps > _WARM_UP:
            self.cells += len(batch["row"])
            if time.monotonic() - self._started >= self._at_most:
                self.seconds = _now(pl_module) - self._started
                trainer.should_stop = True


def _now(plan: Module) -> float:
    """Seconds, when a GPU has finished the steps so far."""
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    return time.monotonic()
