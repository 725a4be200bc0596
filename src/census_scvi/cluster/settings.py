"""Settings: processes that share the work of a stage."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from census_scvi.config.section import Kind, Section

# A process on another machine may live on for so long after the command that started it: 30 s until Ray notices the end
# of a command that came by ray://, 90 s until NFS releases the locks of a machine that is gone.
_LEFTOVER_SECONDS = 120.0

# Defaults: a part of fewer cells would take little longer than its start.
_CELLS_A_PART, _MOST_PARTS_A_WORKER = 100_000, 4

LOCAL, AUTO = "local", "auto"


def _address(text: str) -> str:
    if text not in (LOCAL, AUTO) and not re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", text):
        raise PydanticCustomError("address", "expected auto, local, host:port or ray://host:port")
    return text


Address = Annotated[str, AfterValidator(_address), Kind("auto, local, host:port or ray://host:port")]


class ClusterSection(Section):
    """Several processes for one stage (prepare, create-latent-update)."""

    changes: ClassVar[tuple[str, ...]] = ()
    workers: Annotated[int, Field(ge=1)] = 1
    """Parts of the work that are done at the same time; 1 without an address: the command does it alone."""
    parts_per_worker: Annotated[int, Field(ge=1)] | None = None
    """Parts for each of these processes: with more parts, a slow one delays the end less, but each has a start. `null`:
    four, or fewer if a part would have less than 100,000 cells of the Census."""
    address: Address | None = None
    """Ray cluster that does the parts: `auto` (one that this machine is part of), `host:port`, `ray://host:port`, or
    `local`: Ray is started on this machine. `null`: processes of this machine, without Ray."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """On Ray: cores, and threads, of a part."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """On Ray: GPUs of a part, for example 1 or 0.25. 0: parts use no GPU."""
    part_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which a part that has not ended is done again, on another machine if there is one."""

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if self.address is not None and self.workers == self.parts_per_worker == 1:
            raise ValueError(
                "address is set, and workers times parts_per_worker is one part, which the command does alone"
            )
        return self

    @property
    def divides(self) -> bool:
        """Whether the work is divided into parts; else the command does it alone."""
        return self.address is not None or self.workers > 1

    def n_parts(self, n_cells: int) -> int:
        """Number of parts of work on a Census with this number of cells."""
        if self.parts_per_worker is not None:
            return self.workers * self.parts_per_worker
        return min(max(n_cells // _CELLS_A_PART, self.workers, 2), self.workers * _MOST_PARTS_A_WORKER)

    @property
    def patience(self) -> float:
        """Seconds to wait for locks of processes that a killed command left behind."""
        return 0.0 if self.address is None else _LEFTOVER_SECONDS
