"""Results in a user's folder instead of a run directory: written completely or not at all, and recorded in a report.

The stage writes them to the folder `<name>.partial` next to the target. The lock is also in that folder.
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
from census_scvi.workspace.manifest import incomplete
from census_scvi.workspace.record import RecordedRun, changes, fingerprint_of

RUN = "run"


@dataclass
class ResultFiles:
    """Results of a stage: a target file and other files next to it, one of them a JSON report.

    Attributes
    ----------
    target
        The target file; it is moved into place last.
    report
        The report, which holds the stage's record as `run`.
    setting
        Name of the setting for the target.
    """

    target: Path
    report: Path
    setting: str

    def __str__(self) -> str:
        return str(self.target)

    @property
    def directory(self) -> Path:
        """Folder of the results."""
        return self.target.parent

    @contextmanager
    def locked(self, stage: str, *, new: bool = False) -> Iterator[ResultFiles]:
        """Lock the results; unfinished files are removed at the end."""
        with partial_folder(self.target, script_of(stage)):
            yield self

    def record(self) -> dict[str, Any] | None:
        """Record of existing results; None if there is none, or a damaged one."""
        try:
            record: dict[str, Any] = read_json(self.report)[RUN]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if incomplete(record) else record

    def begin(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        force: bool,
        progress: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> ResultFilesRun:
        """Decide if the results for these settings exist, must be computed, or must be refused.

        Raises
        ------
        UserError
            Other results exist and `force` is false; the message names the setting or input that differs.
        """
        fingerprint = fingerprint_of(settings, inputs)
        run = ResultFilesRun(stage=stage, fingerprint=fingerprint, forced=force, place=self)
        if force or not self.target.exists():
            return run
        record = self.record()
        way_out = f"set another {self.setting}, or replace it with --force"
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
class ResultFilesRun(RecordedRun):
    """One run of a stage with results in a user's folder."""

    place: ResultFiles

    def start(self) -> None:
        """Do nothing: the partial folder is empty, and existing results stay until the commit."""

    def discard(self) -> None:
        """Do nothing: the partial folder is removed with the lock."""

    def path(self, name: str) -> Path:
        """Path to write an output to before it is moved into place."""
        return partial_of(self.place.target) / name

    def commit(
        self, artifacts: Sequence[str], counts: dict[str, Any], *, config: dict[str, Any], seed: int, **details: Any
    ) -> None:
        """Add the record to the report and move the files into place, the target last.

        Parameters
        ----------
        artifacts
            Names of all files, including the report and the target.
        counts, config, seed, details
            See `StageRun.commit`.
        """
        staging = partial_of(self.place.target)
        report = staging / self.place.report.name
        outputs = identities(staging, [name for name in artifacts if name != report.name])
        record = self.record(artifacts, outputs, counts, config=config, seed=seed, **details)
        write_json(report, {**read_json(report), RUN: record})
        sync_tree(staging)
        for name in sorted(artifacts, key=lambda name: name == self.place.target.name):
            target = self.place.directory / name
            if target.is_dir():  # a folder cannot be replaced in one step
                target.rename(staging / f"{name}.old")
            (staging / name).replace(target)
        sync(self.place.directory)
