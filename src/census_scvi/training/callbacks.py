"""Callbacks of the training: training mode, signals, reuse of minibatches, learning curves, early stopping."""

from __future__ import annotations

import math
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import lightning
from scvi.train._callbacks import LoudEarlyStopping

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.minibatch import Minibatch
from census_scvi.files.atomic import write_json
from census_scvi.training.fast.plan import FastTrainingPlan

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule


class TrainMode(lightning.Callback):
    """Switch the module to training mode before training.

    Lightning 2.2 and newer keep the mode that a module has when `fit` starts, and scvi-tools leaves a trained or loaded
    model in eval mode: the next training would run without dropout and with frozen BatchNorm.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Switch the module to training mode."""
        pl_module.train()


class Stoppable(lightning.Callback):
    """Let SIGTERM stop all processes of a training, as it stops any other stage.

    With Lightning's own SIGTERM handler the process exits with 0, as after a complete training. With several processes
    the handler also waits for the others, which may wait for this process.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Replace Lightning's handler by the previous one."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Stop the other processes."""
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)


class GiveBack(lightning.Callback):
    """Return each minibatch to the data module after its step, so that its memory is used again.

    It must be the last of the callbacks that read a minibatch, because it removes X from it.
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


class EpochMetrics(lightning.Callback):
    """Log the metrics that a `FastTrainingPlan` has summed over an epoch, for curves, TensorBoard and early stopping.

    It must run before the callbacks that read metrics.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the sums of an epoch; a training that resumes within an epoch continues the saved ones."""
        self._reset(pl_module, "train")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Log the metrics of the training cells."""
        self._log(trainer, pl_module, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start the sums of the validation cells."""
        self._reset(pl_module, "validation")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Log the metrics of the validation cells."""
        self._log(trainer, pl_module, "validation")

    @staticmethod
    def _reset(plan: Module, mode: str) -> None:
        if isinstance(plan, FastTrainingPlan):
            plan.sums[mode].reset()

    @staticmethod
    def _log(trainer: Trainer, plan: Module, mode: str) -> None:
        if not isinstance(plan, FastTrainingPlan) or not plan.sums[mode].cells:
            return
        reduce = partial(trainer.strategy.reduce, reduce_op="sum")
        plan.log_dict(plan.sums[mode].means(mode, reduce))
        if mode == "train":
            plan.log("kl_weight", plan.loss_kwargs["kl_weight"])


class LearningCurves(lightning.Callback):
    """The metrics of every epoch, `curves["elbo_train"][epoch]`; a resumed run continues them.

    Parameters
    ----------
    engine
        The implementation of the training step, for the record.
    path
        JSON file to write the curves to after each epoch, for those who watch the training; None: no file.

    Attributes
    ----------
    libraries
        The libraries that multiplied float32 matrices, for the record.
    earlier
        Seconds, and CPU seconds of this process, that a resumed run had trained before its checkpoint; 0 otherwise.
    """

    def __init__(self, engine: str, path: Path | None = None) -> None:
        self._path = path
        self.curves: dict[str, list[float]] = {}
        self.engine = engine
        self.processes = 1
        self.libraries: dict[str, str] | None = None
        self.earlier = (0.0, 0.0)
        self._began = _now()

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Record the number of processes."""
        self.processes = trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Append this epoch's metrics."""
        for name, value in trainer.callback_metrics.items():
            series = self.curves.setdefault(name, [])
            # NaN for the epochs in which the metric was not measured.
            series.extend([math.nan] * (trainer.current_epoch - len(series)))
            series.append(float(value))
        if self._path is not None and trainer.is_global_zero:
            write_json(self._path, self.curves)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, and the time of training so far."""
        spent = [before + now - began for before, now, began in zip(self.earlier, _now(), self._began, strict=True)]
        return {"curves": self.curves, "spent": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue saved curves."""
        self.curves = state_dict["curves"]
        seconds, cpu_seconds = state_dict.get("spent", self.earlier)  # earlier versions did not save the time
        self.earlier = (seconds, cpu_seconds)


def _now() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process."""
    return time.monotonic(), time.process_time()


class EarlyStopping(LoudEarlyStopping):
    """scvi-tools' early stopping that also saves and restores its count of warm-up epochs."""

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the number of checks so far."""
        return {**super().state_dict(), "checks": self._current_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of checks."""
        state = dict(state_dict)
        self._current_step = state.pop("checks")
        super().load_state_dict(state)


def early_stopping_callbacks(arguments: dict[str, Any], *, wanted: bool) -> list[lightning.Callback]:
    """The callback for `train.early_stopping`; removes its arguments from the Trainer's `arguments`.

    scvi-tools' Trainer would add this callback itself, but not with several devices.
    """
    defaults = {"monitor": "elbo_validation", "min_delta": 0.0, "patience": 45, "mode": "min", "warmup_epochs": 0}
    chosen = {key: arguments.pop(f"early_stopping_{key}", default) for key, default in defaults.items()}
    return [EarlyStopping(**chosen)] if wanted else []
