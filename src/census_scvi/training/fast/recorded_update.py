"""The optimiser's update as a part of a CUDA graph."""

from __future__ import annotations

import lightning
import torch


def can_record(trainer: lightning.Trainer) -> bool:
    """Whether the update of a training can be part of a graph.

    Gradients that are clipped, or scaled (fp16), pass through Lightning before the update.
    """
    if trainer.gradient_clip_val or getattr(trainer.precision_plugin, "scaler", None):
        return False
    return len(trainer.optimizers) == 1 and all(group.get("fused") for group in trainer.optimizers[0].param_groups)


class RecordedUpdate:
    """The update by a fused Adam, with learning rates that a graph reads from the GPU's memory.

    The optimiser itself is not changed: its checkpoints are those of a training without graphs, and schedulers set its
    learning rates as usual.

    Parameters
    ----------
    optimizer
        A fused Adam or AdamW, of parameters on the GPU.
    device
        The GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._filled: list[float] = []

    def state(self) -> list[torch.Tensor]:
        """Tensors that an update changes, other than parameters; none before the first update."""
        return [value for state in self._optimizer.state.values() for value in state.values()]

    def fill(self) -> None:
        """Copy changed learning rates to the GPU's memory."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if rates != self._filled:
            self._filled = rates
            for tensor, rate in zip(self._rates, rates, strict=True):
                tensor.copy_(torch.tensor(rate, dtype=torch.float64))  # inf, if it is too large for float32

    def __call__(self) -> None:
        """Update the parameters; for the recording of a graph."""
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "capturable")} for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group.update(lr=rate, capturable=True)
            self._optimizer.step()
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)
