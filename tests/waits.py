"""What would make a GPU stop, looked for on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_STOPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Operations for which a GPU stops to hand a number, or the size of a result, to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.name().removeprefix("aten::").partition(".")[0] in _STOPS:
            self.found.append(operation.name())
        return operation(*args, **(kwargs or {}))
