"""What happens beside the training steps: train mode, learning curves, early stopping."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import lightning
from scvi.train._callbacks import LoudEarlyStopping

Trainer: TypeAlias = lightning.Trainer
Plan: TypeAlias = lightning.LightningModule


class TrainMode(lightning.Callback):
    """Train in training mode, whatever mode the module was left in.

    Lightning 2.2 and newer keep the mode that a module has when `fit` begins, and scvi-tools leaves a trained or loaded
    model in eval mode: its next training would run without dropout and with frozen BatchNorm.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Plan) -> None:
        """Switch the module to training mode."""
        pl_module.train()


class LearningCurves(lightning.Callback):
    """The metrics of every epoch, kept through a resume: `curves["elbo_train"][epoch]`.

    Parameters
    ----------
    engine
        Who computes the steps, for the record.
    """

    def __init__(self, engine: str) -> None:
        self.curves: dict[str, list[float]] = {}
        self.engine = engine
        self.processes = 1

    def on_train_start(self, trainer: Trainer, pl_module: Plan) -> None:
        """Note how many processes train."""
        self.processes = trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Plan) -> None:
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
        """Go on with saved curves."""
        self.curves = state_dict["curves"]


class EarlyStopping(LoudEarlyStopping):
    """scvi-tools' early stopping, whose count of warm-up epochs survives a resume."""

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state and the number of checks so far."""
        return {**super().state_dict(), "checks": self._current_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        state = dict(state_dict)
        self._current_step = state.pop("checks")
        super().load_state_dict(state)
