"""Progress of the training, on a progress bar or in the log, and in TensorBoard."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from census_scvi.counts.minibatch import Minibatch
from census_scvi.terminal.progress import progress_bar
from census_scvi.workspace.provenance import peak_memory_bytes

log = logging.getLogger(__name__)

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule

_SECONDS_BETWEEN_LINES = 600
_LONGEST = 10**12  # seconds that timedelta can represent


class EventLog(TensorBoardLogger):
    """TensorBoard logger that writes events but no hparams.yaml: manifest.json has the settings.

    Lightning's own `save` also imports every installed cloud file system to check its folder, which takes half a
    second.
    """

    @rank_zero_only
    def save(self) -> None:
        """Write buffered events to disk."""
        self.experiment.flush()


class Progress(lightning.Callback):
    """Cells/s, time left and memory, on a progress bar over all cells of all epochs, in the log and in TensorBoard.

    Without a progress bar, the log gets one line per epoch, and one every ten minutes within a longer epoch.
    """

    def __init__(self, n_train: int) -> None:
        self._n_train = n_train
        self._bar: tqdm | None = None
        self._done = self._total = 0
        self._shown: dict[str, str] = {}
        self._logged, self._said = _Pace(0), _Pace(0)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Show the bar; a resumed run starts it at the cells done so far."""
        self._total = self._n_train * (trainer.max_epochs or 1)
        self._done = self._n_train * (trainer.fit_loop.total_batch_idx + 1) // trainer.num_training_batches
        self._logged, self._said = _Pace(self._done), _Pace(self._done)
        self._bar = progress_bar(self._total, "train", done=self._done, shown=trainer.is_global_zero)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Advance the bar by the cells of the minibatch, times the number of processes."""
        cells = len(batch["row"]) * trainer.world_size
        self._done += cells
        if self._bar is not None:
            self._bar.update(cells)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)
        if self._said.seconds() > _SECONDS_BETWEEN_LINES:
            self._say(trainer, [f"{self._done / self._total:.1%}"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Show the losses of the epoch."""
        metrics = trainer.callback_metrics
        elbo = ("elbo_train", "elbo_validation")
        self._shown |= {key: f"{metrics[key]:.1f}" for key in elbo if key in metrics}
        self._log(trainer, pl_module)
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(_epoch(trainer))
        else:
            self._say(trainer, [f"{key} {value}" for key, value in self._shown.items()])

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _log(self, trainer: Trainer, pl_module: Module) -> None:
        """Log speed and memory to TensorBoard only, because they are not metrics of the model."""
        memory = _gpu_memory(pl_module.device)
        if memory:
            self._shown["GPU"] = f"{memory:.1f} GB"
        if self._bar is not None:
            self._bar.set_postfix(self._shown)
        speed = self._logged.cells_per_second(self._done)
        if speed and trainer.logger:
            numbers = {
                "cells_per_second": speed,
                "minutes_left": (self._total - self._done) / speed / 60,
                "process_memory_gb": peak_memory_bytes() / 1e9,
            }
            if memory:
                numbers["gpu_memory_gb"] = memory
            trainer.logger.log_metrics(numbers, step=trainer.global_step)
            self._logged = _Pace(self._done)

    def _say(self, trainer: Trainer, what: list[str]) -> None:
        """Write a line to the log if there is no progress bar."""
        if speed := self._said.cells_per_second(self._done):
            left = timedelta(seconds=min(round((self._total - self._done) / speed), _LONGEST))
            what = [*what, f"{speed:,.0f} cells/s"] + [f"{left} left"] * bool(left)
        self._said = _Pace(self._done)
        if trainer.is_global_zero and (self._bar is None or self._bar.disable):
            log.info("  ".join([_epoch(trainer), *what]))


class _Pace:
    """Cells per second since this object was created."""

    def __init__(self, done: int) -> None:
        self._done, self._at = done, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._at

    def cells_per_second(self, done: int) -> float:
        return (done - self._done) / max(self.seconds(), 1e-9)


def _epoch(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def _gpu_memory(device: torch.device) -> float:
    """Peak GPU memory reserved by torch, in GB; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0
