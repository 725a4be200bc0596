"""The plan of a stage, as printed by --dry-run."""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml
from pydantic import BaseModel

from census_scvi.files.uri import without_credentials


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of some work: peak memory and disk in bytes, time in seconds."""

    memory: float
    disk: float
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan(Cost):
    """Inputs, outputs and cost of a stage."""

    stage: str
    reads: list[str]
    writes: list[str]
    cells: int
    genes: int

    def text(self, config: BaseModel) -> str:
        """Text of the resolved config (without credentials) and the plan."""
        settings = without_credentials(config.model_dump(mode="json"))
        lines = [
            "# resolved config",
            yaml.safe_dump(settings, sort_keys=False, default_flow_style=None),
            f"# {self.stage} would",
            *(f"  read   {line}" for line in self.reads),
            *(f"  write  {line}" for line in self.writes),
            f"  with   {self.cells:,} cells x {self.genes:,} genes",
            f"  take   about {human_bytes(self.memory)} of memory, {human_bytes(self.disk)} of disk"
            f" and {human_time(self.seconds)} on this machine",
            *(f"  note   {line}" for line in self.notes),
        ]
        return "\n".join(lines)


def human_bytes(number: float) -> str:
    """Format bytes with a unit, e.g. 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def human_time(seconds: float) -> str:
    """Format seconds as s, min, h or days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
