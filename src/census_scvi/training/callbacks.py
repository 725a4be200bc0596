"""Callbacks of the training: train mode, signals, learning curves, early stopping."""

from __future__ import annotations

import math
import signal
import threading
from typing import Any, TypeAlias

import lightning
from scvi.train._callbacks import LoudEarlyStopping

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.minibatch import Minibatch

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule


class TrainMode(lightning.Callback):
    """Train in training mode, whatever mode the module was left in.

    Lightning 2.2 and newer keep the mode that a module has when `fit` begins, and scvi-tools leaves a trained or loaded
    model in eval mode: its next training would run without dropout and with frozen BatchNorm.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Switch the module to training mode."""
        pl_module.train()


class Stoppable(lightning.Callback):
    """SIGTERM ends a training, in all of its processes, as it ends any other stage.

    Lightning's own handler of SIGTERM lets the process exit with 0, as after a complete training, and in several
    processes it waits for the others, which may wait for this one.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Take Lightning's handler away."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """End the other processes."""
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)


class GiveBack(lightning.Callback):
    """Returns each minibatch to the data module after its step, so that its memory is used again.

    The last of the callbacks that look at a minibatch: afterwards it has no X.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Return a minibatch of training cells."""
        self._data(trainer).give_back(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Return a minibatch of validation cells."""
        self._data(trainer).give_back(batch)

    @staticmethod
    def _data(trainer: Trainer) -> PreparedDataModule:
        data: PreparedDataModule = trainer.datamodule
        return data


class LearningCurves(lightning.Callback):
    """The metrics of every epoch, kept through a resume: `curves["elbo_train"][epoch]`.

    Parameters
    ----------
    engine
        The implementation that computes the steps, for the record.

    Attributes
    ----------
    libraries
        The libraries that multiplied float32 matrices, for the record.
    """

    def __init__(self, engine: str) -> None:
        self.curves: dict[str, list[float]] = {}
        self.engine = engine
        self.processes = 1
        self.libraries: dict[str, str] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Note how many processes train."""
        self.processes = trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Append this epoch's metrics."""
        for name, value in trainer.callback_metrics.items():
            series = self.curves.setdefault(name, [])
            # A metric that is not measured every epoch keeps its place.
            series.extend([math.nan] * (trainer.current_epoch - len(series)))
            series.append(float(value))

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue saved curves."""
        self.curves = state_dict["curves"]


class EarlyStopping(LoudEarlyStopping):
    """scvi-tools' early stopping, whose count of warm-up epochs survives a resume."""

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the number of checks so far."""
        return {**super().state_dict(), "checks": self._current_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of checks."""
        state = dict(state_dict)
        self._current_step = state.pop("checks")
        super().load_state_dict(state)


def early_stopping_callbacks(arguments: dict[str, Any], *, wanted: bool) -> list[lightning.Callback]:
    """The callback for `train.early_stopping`; takes its arguments out of the Trainer's.

    scvi-tools' Trainer would add it itself, but not with several devices.
    """
    defaults = {"monitor": "elbo_validation", "min_delta": 0.0, "patience": 45, "mode": "min", "warmup_epochs": 0}
    chosen = {key: arguments.pop(f"early_stopping_{key}", default) for key, default in defaults.items()}
    return [EarlyStopping(**chosen)] if wanted else []
