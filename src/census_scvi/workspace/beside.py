"""Results in a user's folder instead of a run directory: written completely, and recorded in their report.

They are written into the folder `<name>.partial` next to their places, which holds the lock while the stage runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from census_scvi.config.stages import script_of
from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of, sync, sync_tree, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.partial_folder import partial_folder
from census_scvi.workspace.identity import damage, identities
from census_scvi.workspace.record import RecordedRun, changes, fingerprint_of

RUN = "run"


@dataclass
class Beside:
    """The results of a stage: a file, and others next to it, among them a JSON report.

    Attributes
    ----------
    target
        The file; it takes its place last.
    report
        The report, which holds the stage's record as `run`.
    setting
        The setting that names the file.
    """

    target: Path
    report: Path
    setting: str

    def __str__(self) -> str:
        return str(self.target)

    @property
    def directory(self) -> Path:
        """Where the results lie."""
        return self.target.parent

    @contextmanager
    def locked(self, stage: str, *, new: bool = False) -> Iterator[Beside]:
        """Lock the place of the results; removes unfinished files at the end."""
        with partial_folder(self.target, script_of(stage)):
            yield self

    def record(self) -> dict[str, Any] | None:
        """The record of existing results; None if there is none."""
        try:
            record = read_json(self.report)[RUN]
            return record if isinstance(record["fingerprint"]["inputs"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        force: bool,
        progress: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> BesideRun:
        """Decide whether the results are there for these settings, are to be made, or must be refused.

        Raises
        ------
        UserError
            There are others, and `force` is not set: names the setting or the input that differs.
        """
        fingerprint = fingerprint_of(settings, inputs)
        run = BesideRun(stage=stage, fingerprint=fingerprint, forced=force, place=self)
        if force or not self.target.exists():
            return run
        record = self.record()
        way_out = f"name another {self.setting}, or replace it with --force"
        if record is None:
            raise UserError(f"{self.target} exists; {way_out}")
        if words := changes(record["fingerprint"], fingerprint, defaults or {}):
            raise UserError(f"{self.target} exists and was made with other settings: {words}; {way_out}")
        for name, identity in record["outputs"].items():
            if found := damage(self.directory / name, identity):
                raise UserError(f"{self.directory / name} {found} by {script_of(stage)}; {way_out}")
        run.done = True
        return run


@dataclass(kw_only=True)
class BesideRun(RecordedRun):
    """One run of such a stage."""

    place: Beside

    def start(self) -> None:
        """Nothing is to be noted: the folder is empty, and what is there stays until the end."""

    def discard(self) -> None:
        """Nothing is to be done: the folder goes with the lock."""

    def path(self, name: str) -> Path:
        """Where to write an output before it takes its place."""
        return partial_of(self.place.target) / name

    def commit(
        self, artifacts: Sequence[str], counts: dict[str, Any], *, config: dict[str, Any], seed: int, **details: Any
    ) -> None:
        """Put the files in place, the target last, and the record into the report.

        Parameters
        ----------
        artifacts
            Names of the files, the report and the target among them.
        counts, config, seed, details
            As `StageRun.commit` says.
        """
        staging = partial_of(self.place.target)
        report = staging / self.place.report.name
        outputs = identities(staging, [name for name in artifacts if name != report.name])
        record = self.record(artifacts, outputs, counts, config=config, seed=seed, **details)
        write_json(report, {**read_json(report), RUN: record})
        sync_tree(staging)
        for name in sorted(artifacts, key=lambda name: name == self.place.target.name):
            (staging / name).replace(self.place.directory / name)
        sync(self.place.directory)
