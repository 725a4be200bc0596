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
from census_scvi.training.fast.epoch_sums import EpochSums
from census_scvi.training.fast.graph import StepGraph, StepGraphs
from census_scvi.training.fast.measure import faster_libraries, shape_of
from census_scvi.training.fast.negative_binomial import compiled_kernel
from census_scvi.training.fast.products import Libraries
from census_scvi.training.fast.recorded_update import RecordedUpdate, can_record
from census_scvi.training.fast.step import step
from census_scvi.training.finite_loss import finite_if_all_are

log = logging.getLogger(__name__)


class FastTrainingPlan(TrainingPlan):
    """Metrics, schedules and optimiser of scvi-tools, with the loss computed by `step` and a fused optimiser.

    scvi-tools logs seven metrics in each step, which takes longer than the step on a fast GPU. Here their sums are
    kept on the device, and a callback logs them at the end of the epoch.

    Attributes
    ----------
    libraries
        Libraries of the float32 matrix products on a CPU. They are measured when a training starts and saved in
        checkpoints, because the libraries round differently. None before the measurement, or if only torch's library
        is used.
    sums
        Sums of the metrics over an epoch, of training and validation cells.
    checked
        float32 (2,): loss of the last step, and a number that is finite if its gradients are, if a graph computed them;
        valid until the next step.
    fused_optimizer
        Whether the optimiser updates all parameters in one pass.

    Notes
    -----
    On one GPU, the graph of a step also has the optimiser's update. `training_step` then returns None, and Lightning
    skips its own backward pass; `optimizer_step` skips the update.
    """

    libraries: Libraries | None = None
    checked: torch.Tensor | None = None
    fused_optimizer: bool = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums = {"train": EpochSums(), "validation": EpochSums()}
        self._graphs = StepGraphs()
        # Numbers that the graphs read from the memory of the GPU.
        self._kl_weight = torch.zeros(())
        self._scale: torch.Tensor | None = None
        self._filled: float | None = None
        self._trained: list[torch.nn.Parameter] = []
        self._buffers_of_module: list[torch.Tensor] = []
        self._recorded_update: RecordedUpdate | None = None

    def on_fit_start(self) -> None:
        """Move the sums to the device, before Lightning tries some validation minibatches."""
        for sums in self.sums.values():
            sums.to(self.device)
        self._kl_weight = self._kl_weight.to(self.device)

    def on_train_start(self) -> None:
        """Choose the libraries: the same for all processes; a resumed training keeps its libraries."""
        self._trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._buffers_of_module = list(self.module.buffers())
        if self._has_graphs() and can_record(self.trainer):
            self._recorded_update = RecordedUpdate(self.trainer.optimizers[0], self.device)
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

    def on_train_end(self) -> None:
        """Free the memory of the graphs."""
        super().on_train_end()
        self._graphs.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the chosen libraries."""
        checkpoint["libraries"] = asdict(self.libraries) if self.libraries else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the chosen libraries; a checkpoint without this key is from a version that always used oneDNN."""
        saved = checkpoint.get("libraries", asdict(Libraries("onednn", "onednn", "onednn")))
        self.libraries = Libraries(**saved) if saved else None

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning sets this attribute at each hook; torch would check each time whether it is a parameter."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> torch.Tensor | None:
        """Loss of a minibatch, or None if a graph has made the whole step; its metrics are added to `sums`."""
        self.checked = None
        if self.on_step:  # metrics of each step are wanted
            loss: torch.Tensor = super().training_step(minibatch, batch_idx)
            return loss
        weight = self.kl_weight
        self.loss_kwargs["kl_weight"] = weight
        if self._logs_step():
            self.log("kl_weight", weight, on_step=True, on_epoch=False)
        self.sums["train"].cells += len(minibatch["X"])
        if graph := self._graph("train", minibatch):
            loss, self.checked = graph(minibatch)
            return None if self._recorded_update else loss
        return self._step("train", self._on_device(minibatch), weight)

    def validation_step(self, minibatch: Minibatch, batch_idx: int) -> None:
        """Add the metrics of a minibatch to `sums`."""
        if self.on_step:
            super().validation_step(minibatch, batch_idx)
            return
        self.sums["validation"].cells += len(minibatch["X"])
        if graph := self._graph("validation", minibatch):
            graph(minibatch)
        else:
            self._step("validation", self._on_device(minibatch), self.loss_kwargs["kl_weight"])

    def _step(self, mode: str, minibatch: Minibatch, weight: float | torch.Tensor) -> torch.Tensor:
        output = step(self.module, minibatch, weight)
        self.sums[mode].add(output, len(minibatch["X"]))
        return output.loss

    def _on_device(self, minibatch: Minibatch) -> Minibatch:
        """The minibatch on the device: the data module leaves it in page-locked memory for the graphs."""
        return {name: value.to(self.device) for name, value in minibatch.items()}

    def _logs_step(self) -> bool:
        every = self.trainer.log_every_n_steps
        return bool(every) and (self.global_step + 1) % every == 0

    def forward(self, minibatch: Minibatch, loss_kwargs: dict[str, Any]) -> tuple[None, None, LossOutput]:
        """Compute the loss; scvi-tools' training and validation steps call this."""
        return None, None, step(self.module, self._on_device(minibatch), loss_kwargs["kl_weight"])

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

    # --- the step as a CUDA graph

    def _graph(self, mode: str, minibatch: Minibatch) -> StepGraph | None:
        """The graph for a minibatch; None without graphs, or for a minibatch of another size."""
        if not self._has_graphs():
            return None
        self._fill()
        state = [self.sums[mode].values]
        if mode == "validation":
            return self._graphs.of(mode, minibatch, self._recorded_validation, (), state, self.device)
        state += self._buffers_of_module
        if self._recorded_update:
            state += [*self._trained, *self._recorded_update.state()]
        return self._graphs.of(mode, minibatch, self._recorded_training, self._trained, state, self.device)

    def _has_graphs(self) -> bool:
        """Whether steps are graphs: on a GPU, with one process, and each minibatch is a step."""
        if self.device.type != "cuda" or self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1:
            return False
        # Without the kernel, torch's operations need memory that depends on the number of non-zeros.
        return compiled_kernel("cuda") is not None

    def _fill(self) -> None:
        """Update the numbers in the GPU's memory: KL weight, learning rate, and scale of the loss (fp16)."""
        if self._recorded_update:
            self._recorded_update.fill()
        if self._filled != self.loss_kwargs["kl_weight"]:
            self._filled = self.loss_kwargs["kl_weight"]
            self._kl_weight.fill_(self._filled)
        if scaler := getattr(self.trainer.precision_plugin, "scaler", None):
            scale = scaler.scale(torch.ones((), device=self.device))
            self._scale = scale if self._scale is None else self._scale.copy_(scale)

    def _recorded_training(self, minibatch: Minibatch) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self._step("train", minibatch, self._kl_weight)
        with torch.autocast("cuda", enabled=False):  # as in Lightning, whose backward pass is outside of autocast
            loss.backward(self._scale)
        loss = loss.detach()
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        # In fp16 the gradient scaler checks the gradients, and skips a step that overflowed.
        check = finite_if_all_are(gradients) if self._scale is None else torch.zeros_like(loss)
        if self._recorded_update:
            self._recorded_update()
        return loss, torch.stack([loss.float(), check.float()])

    def _recorded_validation(self, minibatch: Minibatch) -> tuple[torch.Tensor, ...]:
        return (self._step("validation", minibatch, self._kl_weight),)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a graph has computed them together with the loss."""
        if self._graphs.used("train"):
            self._graphs.set_gradients("train")
        else:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Compute the gradients and update the parameters, unless a graph does both."""
        if self._recorded_update and optimizer_closure:
            loss = optimizer_closure()
            if self._graphs.used("train"):
                return
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Remove the gradients, unless a graph has just computed new ones in their place."""
        if not self._graphs.used("train"):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _optimizer_creator_fn(self, optimizer_cls: type[torch.optim.Adam]) -> Callable[..., torch.optim.Optimizer]:
        return lambda parameters: optimizer_cls(
            parameters, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, fused=self.fused_optimizer
        )
