"""scvi-tools' training plan with this project's training step instead of the module's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan
from scvi.train._trainingplans import _compute_kl_weight

from census_scvi.counts.minibatch import Minibatch
from census_scvi.training.fast import products
from census_scvi.training.fast.measure import faster_libraries, shape_of
from census_scvi.training.fast.products import Libraries
from census_scvi.training.fast.step import step

log = logging.getLogger(__name__)


class FastTrainingPlan(TrainingPlan):
    """Metrics, schedules and optimiser of scvi-tools, with the loss computed by `step` and a fused optimiser.

    Attributes
    ----------
    libraries
        Libraries of the float32 matrix products on a CPU. They are measured when a training starts and saved in
        checkpoints, because the libraries round differently. None before the measurement, or if only torch's library
        is used.
    """

    libraries: Libraries | None = None

    def on_train_start(self) -> None:
        """Choose the libraries: the same for all processes; a resumed training keeps its libraries."""
        if self.device.type != "cpu" or self.trainer.precision != "32-true":
            return
        if self.libraries is None:
            measured = faster_libraries(*shape_of(self.module), self.trainer.datamodule.cells.density)
            self.libraries = self.trainer.strategy.broadcast(measured)
            chosen = ", ".join(
                f"{kind.replace('_', ' ')} {library}" for kind, library in asdict(self.libraries).items()
            )
            log.info("libraries of the float32 matrix products (the faster ones here): %s", chosen)
        products.use(self.libraries)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the chosen libraries."""
        checkpoint["libraries"] = asdict(self.libraries) if self.libraries else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the chosen libraries; a checkpoint without this key is from a version that always used oneDNN."""
        saved = checkpoint.get("libraries", asdict(Libraries("onednn", "onednn", "onednn")))
        self.libraries = Libraries(**saved) if saved else None

    def forward(self, minibatch: Minibatch, loss_kwargs: dict[str, Any]) -> tuple[None, None, LossOutput]:
        """Compute the loss; scvi-tools' training and validation steps call this."""
        return None, None, step(self.module, minibatch, loss_kwargs["kl_weight"])

    @property
    def kl_weight(self) -> float:
        """The KL weight as a number: scvi-tools' tensor would be copied to the GPU in each step."""
        return float(
            _compute_kl_weight(
                self.current_epoch,
                self.global_step,
                self.n_epochs_kl_warmup,
                self.n_steps_kl_warmup,
                self.max_kl_weight,
                self.min_kl_weight,
            )
        )

    def _optimizer_creator_fn(self, optimizer_cls: type[torch.optim.Adam]) -> Callable[..., torch.optim.Optimizer]:
        trainer = self._trainer
        # In reduced precision, Lightning cannot clip the gradients of a fused optimiser, which unscales them itself.
        clipped = trainer is not None and bool(trainer.gradient_clip_val) and trainer.precision != "32-true"
        return lambda parameters: optimizer_cls(
            parameters, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, fused=not clipped
        )
