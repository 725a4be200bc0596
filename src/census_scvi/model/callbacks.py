"""What happens beside the training steps: train mode, finite loss, learning curves, progress."""

from __future__ import annotations

import logging
import math
from typing import Any, TypeAlias

import lightning
import torch
from scvi.train._callbacks import LoudEarlyStopping
from tqdm import tqdm

from census_scvi.counts.minibatch import Minibatch
from census_scvi.errors import UserError
from census_scvi.progress import progress_bar

log = logging.getLogger(__name__)

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


class FiniteLoss(lightning.Callback):
    """Stop at the first step whose loss is not a finite number, and say where and why."""

    def __init__(self) -> None:
        self._minibatch: Minibatch = {}
        self._index = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plan, batch: Minibatch, batch_idx: int) -> None:
        """Remember the minibatch for the report."""
        self._minibatch, self._index = batch, batch_idx

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Plan, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Look at the loss of each step."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not torch.isfinite(loss):
            raise self.report(trainer, f"{loss.item()}")

    def report(self, trainer: Trainer, found: str) -> UserError:
        """The error: step, epoch, minibatch, cells, the likely cause and what to do."""
        x, rows = self._minibatch["X"], self._minibatch["row"].tolist()
        counts = x if isinstance(x, torch.Tensor) else x.dense()
        bad = torch.nonzero(~torch.isfinite(counts).all(dim=1)).flatten().tolist()
        if bad:
            cause = (
                f"the counts of row {rows[bad[0]]} of the prepared cells are not finite; run scvi-prepare.py --force"
            )
        else:
            row = rows[int(counts.amax(dim=1).argmax())]
            cause = (
                "lower training_plan.lr or set train.trainer.gradient_clip_val, and look at row"
                f" {row} of the prepared cells, which has the largest count, {counts.max().item():,.0f}"
            )
        return UserError(
            f"the loss is {found} at step {trainer.global_step} (epoch {trainer.current_epoch + 1}, minibatch"
            f" {self._index + 1} of {trainer.num_training_batches}, rows {min(rows)} to {max(rows)}): {cause}"
        )


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


class Progress(lightning.Callback):
    """A bar over all cells of all epochs with cells a second and ETA; in a log, a line an epoch."""

    def __init__(self, n_train: int) -> None:
        self._n_train = n_train
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Plan) -> None:
        """Show the bar, at the place where a resumed run goes on."""
        self._bar = progress_bar(
            self._n_train * (trainer.max_epochs or 1),
            "train",
            done=self._n_train * (trainer.fit_loop.total_batch_idx + 1) // trainer.num_training_batches,
            shown=trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Plan, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Advance by the cells of all ranks' minibatches."""
        if self._bar is not None:
            self._bar.update(len(batch["row"]) * trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Plan) -> None:
        """Show the losses of the epoch."""
        metrics = trainer.callback_metrics
        shown = {key: f"{metrics[key]:.1f}" for key in ("elbo_train", "elbo_validation") if key in metrics}
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(epoch)
            self._bar.set_postfix(shown)
        elif trainer.is_global_zero:
            log.info("%s  %s", epoch, "  ".join(f"{key} {value}" for key, value in shown.items()))

    def teardown(self, trainer: Trainer, pl_module: Plan, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
