"""Save the complete state of a training, so that a killed training resumes as if it had not been interrupted."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils._pytree import tree_leaves, tree_map_only
from torchmetrics import Metric

from census_scvi.errors import UserError
from census_scvi.files.atomic import sync
from census_scvi.training.fast.plan import FastTrainingPlan

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule

# Several processes agree every this many minibatches whether a checkpoint is due; more often would slow down training.
_AGREED_EVERY = 16
# Share of the time of short epochs that their checkpoints may take.
_SHARE = 0.05


class StagedIO(TorchCheckpointIO):
    """Write a checkpoint to a file of its own, which replaces the old one when it is complete.

    Lightning would copy it in memory and in the temporary folder first. The checkpoint of a training on a GPU is copied
    to memory and written in a thread while the training goes on: writing takes as long as hundreds of steps.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a local file; an error of a thread is raised here or by `finish`."""
        self.finish()
        if _on_gpu(checkpoint):
            copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
            self._writing = self._thread.submit(_write, copied, Path(path))
        else:
            _write(checkpoint, Path(path))

    def finish(self) -> None:
        """Wait until the last checkpoint is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """End the thread."""
        self.finish()
        self._thread.shutdown()


def _on_gpu(checkpoint: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in tree_leaves(checkpoint))


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
    sync(partial)
    partial.replace(path)


class Checkpoint(lightning.Callback):
    """Write a checkpoint after each epoch and at intervals within an epoch; the file is replaced atomically.

    After epochs so short that writing would take more than 5 % of the time, only some of them write one.

    Lightning saves weights, optimiser and progress, and the loader saves its position. This callback adds the random
    state and the metrics of each process: their sums over the epoch so far, and the last logged values. It must run
    after the callbacks that have a state, so that the checkpoint has their state after the same step.

    Parameters
    ----------
    path
        The checkpoint file.
    minutes
        Minutes between checkpoints within an epoch; 0: after each minibatch, and after each epoch however short.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self._path = path
        self._seconds = 60 * minutes
        self._saved_at = time.monotonic()
        self._took = 0.0  # seconds to write the last checkpoint
        self._within_epoch = False
        self._restored: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """Restore the random state immediately before the first step of a resumed run."""
        trainer.callback_metrics.update(self._restored.pop("logged", {}))
        if isinstance(pl_module, FastTrainingPlan) and not pl_module.on_step:
            summed, sums = self._restored.pop("summed", None), self._restored.pop("sums", None)
            if state := summed or (sums and _summed(sums)):
                pl_module.sums["train"].restore(state)
        if random := self._restored.pop("random", None):
            torch.set_rng_state(random["cpu"].cpu())
            if "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"].cpu(), pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the saved sums to the metrics after the first step of a resumed run; write a checkpoint if one is due."""
        for name, sums in self._restored.pop("sums", {}).items():
            metric = _epoch_metrics(trainer)[name]
            for state, value in sums.items():
                setattr(metric, state, getattr(metric, state) + value.to(pl_module.device))
        last = batch_idx + 1 == trainer.num_training_batches  # saved at the end of the epoch
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches  # gradients are not saved
        if not last and not accumulating and self._due(trainer, batch_idx):
            self._within_epoch = True
            self._write(trainer)
            self._within_epoch = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Write a checkpoint, unless the last one is so recent that writing would take a large share of the time."""
        due = self._older_than(min(self._took / _SHARE, self._seconds))
        if due if trainer.world_size == 1 else trainer.strategy.broadcast(due):
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Add the state of each process."""
        random = {"cpu": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        metrics = _epoch_metrics(trainer) if self._within_epoch else {}
        mine = {
            "random": random,
            "sums": {name: dict(metric.metric_state) for name, metric in metrics.items()},
            "logged": dict(trainer.callback_metrics),
        }
        if self._within_epoch and isinstance(pl_module, FastTrainingPlan):
            mine["summed"] = pl_module.sums["train"].state()
        states: list[Any] = [mine]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Keep the saved state of this process until the first step."""
        states = checkpoint["processes"]
        if len(states) != trainer.world_size:
            raise UserError(
                f"{self._path} was written by {len(states)} process(es), and now there are {trainer.world_size};"
                " start as many as before, or start again with --force"
            )
        self._restored = dict(states[trainer.global_rank])

    def _due(self, trainer: Trainer, batch_idx: int) -> bool:
        due = self._older_than(self._seconds)
        if trainer.world_size == 1:
            return due
        return (batch_idx + 1) % _AGREED_EVERY == 0 and trainer.strategy.broadcast(due)

    def _older_than(self, seconds: float) -> bool:
        """Whether the last checkpoint was written that long ago."""
        return time.monotonic() - self._saved_at >= seconds

    def _write(self, trainer: Trainer) -> None:
        """Write the file; called in every process, because the states of all processes are gathered."""
        started = time.monotonic()
        trainer.save_checkpoint(self._path, weights_only=False)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started


def _summed(sums: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """State of `EpochSums` from the sums of an earlier version, which logged each metric in each step."""
    loss, reconstruction, kl = (
        sums[f"training_step.{name}"] for name in ("train_loss", "reconstruction_loss_train", "kl_local_train")
    )
    values = torch.stack([loss["value"], reconstruction["elbo_component"], kl["elbo_component"]])
    return {"values": values, "cells": int(reconstruction["n_obs"])}


def _epoch_metrics(trainer: Trainer) -> dict[str, Metric]:
    """Metrics summed over an epoch: Lightning's means of logged numbers, and scvi-tools' metrics."""
    results = trainer.fit_loop.epoch_loop._results  # Lightning has no public access to them
    return {
        name: result if result.is_tensor else result.value for name, result in results.items() if result.meta.on_epoch
    }
