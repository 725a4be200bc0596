"""Folders of trials: each is a run directory that shares the prepared file, and records how its training ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from census_scvi.config.run_names import MANIFEST, PROGRESS, STAGING
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, write_json, write_text
from census_scvi.files.json_file import read_json
from census_scvi.workspace import Workspace

TRIALS, CONFIG, LOG = "trials", "config.yaml", "log.txt"
_ABOUT, _OUTCOME, _MEASURED, _COST = "trial.json", "outcome.json", "measured.json", "cost.json"

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
SEARCHED, FINAL = "search", "final"


@dataclass(frozen=True)
class Trial:
    """One training with some settings and a seed.

    Attributes
    ----------
    folder
        Its run directory.
    settings
        Value of each searched setting by dotted name; empty for the config as it is.
    seed
        Its seed.
    part
        `search`, or `final` for those that decide between the best settings.
    """

    folder: Path
    settings: dict[str, Any]
    seed: int
    part: str

    @property
    def number(self) -> int:
        """Its number, from 1."""
        return int(self.folder.name)

    def prepare(self, prepared: Path, config: Mapping[str, Any]) -> None:
        """Write the folder, with links to the files of a run directory in which prepare ran.

        Parameters
        ----------
        prepared
            The run directory.
        config
            The config of the trial.
        """
        record = Workspace(prepared).record("prepare")
        if record is None:
            raise UserError(f"{prepared} has no prepared cells; run scvi-prepare.py first")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in record["artifacts"]:
            remove(self.folder / name)
            (self.folder / name).symlink_to(os.path.relpath((prepared / name).resolve(), self.folder.resolve()))
        if not (self.folder / MANIFEST).exists():
            write_json(self.folder / MANIFEST, {"stages": {"prepare": record}})
        write_text(self.folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        write_json(self.folder / _ABOUT, {"settings": self.settings, "seed": self.seed, "part": self.part})

    @property
    def status(self) -> str | None:
        """`finished`, `stopped` (by the scheduler) or `failed`; None: not ended."""
        return self._read(_OUTCOME).get("status")

    @property
    def error(self) -> str:
        """Why it failed, in one line; empty if it did not."""
        return str(self._read(_OUTCOME).get("error", ""))

    def end(self, status: str, error: str = "") -> None:
        """Record how it ended."""
        write_json(self.folder / _OUTCOME, {"status": status, "error": error})

    @property
    def curves(self) -> dict[str, list[float]]:
        """Metrics by epoch so far, `curves["elbo_validation"][epoch]`."""
        if record := self.record:
            return dict(record["learning_curves"])
        path = self.folder / STAGING / "train" / PROGRESS
        return dict(read_json(path)) if path.exists() else {}

    @property
    def record(self) -> dict[str, Any] | None:
        """Record of its training, once it is complete."""
        path = self.folder / MANIFEST
        return Workspace(self.folder).record("train") if path.exists() else None

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured on the validation cells; empty before."""
        return self._read(_MEASURED)

    def keep_measured(self, values: Mapping[str, Any]) -> None:
        """Keep what was measured."""
        write_json(self.folder / _MEASURED, dict(values))

    @property
    def cost(self) -> dict[str, float]:
        """`seconds`, `cpu_seconds` and `gpu_seconds` of all its processes, and the largest `memory_bytes`."""
        return self._read(_COST)

    def add_cost(self, seconds: float, cpu_seconds: float, gpu_seconds: float, memory_bytes: int) -> None:
        """Add the cost of one process."""
        before = self.cost
        write_json(
            self.folder / _COST,
            {
                "seconds": before.get("seconds", 0.0) + seconds,
                "cpu_seconds": before.get("cpu_seconds", 0.0) + cpu_seconds,
                "gpu_seconds": before.get("gpu_seconds", 0.0) + gpu_seconds,
                "memory_bytes": max(before.get("memory_bytes", 0), memory_bytes),
            },
        )

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return dict(read_json(path)) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove the folder {self.folder}") from None


def trials_of(search: Path) -> list[Trial]:
    """The trials in the folder of a search, by number; a folder that a killed search left incomplete is ignored."""
    folders = (search / TRIALS).iterdir() if (search / TRIALS).exists() else ()
    return [_opened(folder) for folder in sorted(folders) if (folder / _ABOUT).exists()]


def _opened(folder: Path) -> Trial:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return Trial(folder, dict(about["settings"]), int(about["seed"]), str(about["part"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _ABOUT} is damaged ({error}); remove the folder {folder}") from None


def new_trial(search: Path, settings: Mapping[str, Any], seed: int, part: str) -> Trial:
    """A trial with the next number; its folder is written by `prepare`."""
    number = max((trial.number for trial in trials_of(search)), default=0) + 1
    return Trial(search / TRIALS / f"{number:04d}", dict(settings), seed, part)
