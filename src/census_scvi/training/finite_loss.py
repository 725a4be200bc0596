"""Stop training at the first loss or gradient that is not a finite number."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning
import torch

from census_scvi.counts.minibatch import Minibatch
from census_scvi.errors import UserError

Trainer: TypeAlias = lightning.Trainer
Module: TypeAlias = lightning.LightningModule

# Number of steps that a GPU may be ahead of the check of its losses. The GPU does not wait for the check, but each
# minibatch stays in memory until it is checked.
_STEPS_BEHIND = 4


@dataclass(frozen=True)
class _Step:
    """A step that is not checked yet."""

    number: int
    epoch: int
    index: int
    minibatch: Minibatch
    numbers: torch.Tensor  # float32 (2,) on the CPU: loss and a sum that is finite if the gradients are
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class Named:
    """Names for the report: the settings that may help, the cells, and how to correct their counts."""

    settings: str = "lower training_plan.lr or set train.trainer.gradient_clip_val"
    cells: str = "the prepared cells"
    correct: str = "run scvi-prepare.py --force"


OF_TRAIN = Named()


class FiniteLoss(lightning.Callback):
    """Stop at the first step whose loss or gradients are not finite numbers, and report the step and the likely cause.

    The check does not wait for a GPU: it reads the numbers a few steps later, and always before a checkpoint is saved.
    """

    def __init__(self, named: Named = OF_TRAIN) -> None:
        self._named = named
        self._minibatch: Minibatch = {}
        self._index = 0
        self._gradients: torch.Tensor | None = None
        self._waiting: deque[_Step] = deque()
        self._parameters: list[torch.nn.Parameter] = []

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Look up the parameters: a walk through all modules in each step takes as long as a launch of the step."""
        self._parameters = list(pl_module.parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Minibatch, batch_idx: int) -> None:
        """Remember the minibatch for the report."""
        self._minibatch, self._index, self._gradients = batch, batch_idx, None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Reduce the gradients to a number that is finite if they are."""
        if getattr(trainer.precision_plugin, "scaler", None) or getattr(pl_module, "checked", None) is not None:
            return  # the gradient scaler checks them itself, and skips a step that overflowed; or a graph has done it
        self._gradients = finite_if_all_are([value.grad for value in self._parameters if value.grad is not None])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Check the loss and gradients of each step."""
        numbers = getattr(pl_module, "checked", None)
        if numbers is None:
            loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
            gradients = torch.zeros_like(loss) if self._gradients is None else self._gradients
            numbers = torch.stack([loss.float(), gradients.float()])
        arrived = None
        if numbers.is_cuda:
            numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        step = _Step(trainer.global_step, trainer.current_epoch, batch_idx, batch, numbers, arrived)
        self._waiting.append(step)
        self._look(trainer, leave=_STEPS_BEHIND if arrived else 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Check the last steps."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Check all steps before the checkpoint is saved."""
        self._look(trainer)

    def _look(self, trainer: Trainer, leave: int = 0) -> None:
        while len(self._waiting) > leave:
            step = self._waiting.popleft()
            if step.arrived:
                step.arrived.synchronize()
            loss, gradients = step.numbers.tolist()
            if not math.isfinite(loss):
                raise _report(trainer, step, f"the loss is {loss}", self._named)
            if not math.isfinite(gradients):
                raise _report(trainer, step, f"the loss is {loss:.6g}, but its gradients are not finite", self._named)

    def report(self, trainer: Trainer, found: str) -> UserError:
        """The error for the current step."""
        nothing = torch.zeros(2)
        step = _Step(trainer.global_step + 1, trainer.current_epoch, self._index, self._minibatch, nothing, None)
        return _report(trainer, step, found, self._named)


def finite_if_all_are(gradients: list[torch.Tensor]) -> torch.Tensor:
    """A number () that is finite if all gradients are."""
    if gradients[0].is_cuda:  # one launch for all parameters; on a CPU it takes longer than the sums
        numbers = list(torch._foreach_norm(gradients, math.inf))
    else:
        numbers = [gradient.sum() for gradient in gradients]
    return torch.stack(numbers).sum()


def _report(trainer: Trainer, step: _Step, found: str, named: Named) -> UserError:
    """The error, with step, epoch, minibatch, cells, likely cause and what to do."""
    x, rows = step.minibatch["X"], step.minibatch["row"].tolist()
    counts = x if isinstance(x, torch.Tensor) else x.dense()
    bad = torch.nonzero(~torch.isfinite(counts).all(dim=1)).flatten().tolist()
    if bad:
        cause = f"the counts of row {rows[bad[0]]} of {named.cells} are not finite; {named.correct}"
    else:
        row = rows[int(counts.amax(dim=1).argmax())]
        cause = (
            f"{named.settings}, and check row {row} of {named.cells}, which has the largest count,"
            f" {counts.max().item():,.0f}"
        )
    return UserError(
        f"{found} at step {step.number} (epoch {step.epoch + 1}, minibatch {step.index + 1} of"
        f" {trainer.num_training_batches}, rows {min(rows)} to {max(rows)}): {cause}"
    )
