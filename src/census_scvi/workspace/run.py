"""A stage in a run directory: skip if done, refuse if settings or inputs changed, resume, commit atomically.

A stage writes into `.partial/<stage>/`. A commit has three steps. First, the record is added to the manifest under
`committing`, with the identities of the outputs. Second, each output is renamed into place. Third, the record moves to
`stages`. The next process that opens the directory completes an interrupted commit. Therefore a kill at any moment
leaves either the old artifacts or the new ones. A finished stage that runs again with --force is recorded under
`redoing` until it commits: meanwhile other stages refuse to read its old outputs, and the same command without --force
resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from census_scvi.config.flat import digest
from census_scvi.config.run_names import COMMAND_LOCK, FINGERPRINT, LOCK, MANIFEST, PARTS, STAGING
from census_scvi.config.stages import script_of
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, sync, sync_tree, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import directory_lock
from census_scvi.files.parts import begun
from census_scvi.files.uri import leaves_folder
from census_scvi.workspace.identity import Identity, damage, identities
from census_scvi.workspace.manifest import incomplete
from census_scvi.workspace.record import RecordedRun, changes, fingerprint_of

log = logging.getLogger(__name__)

_LARGE = 5_000_000_000  # bytes; hashing of a larger file is slow and therefore logged


@dataclass
class Workspace:
    """A run directory and its manifest; messages refer to it by `setting`."""

    directory: Path
    setting: str = "output.directory"

    def __str__(self) -> str:
        return str(self.directory)

    @contextmanager
    def locked(self, stage: str, *, new: bool = False, shared: bool = False) -> Iterator[Workspace]:
        """Lock the directory for a stage, and finish a commit that a killed run left open.

        Parameters
        ----------
        stage
            The stage that holds the lock.
        new
            Create the directory if it does not exist, as the first stage does. Other stages do not lock a missing
            directory; `require` then reports the missing input.
        shared
            Lock it together with other processes that do the same; an open commit is refused.
        """
        if not self._exists(new=new):
            yield self
            return
        holder = f"{script_of(stage)}{' --part' * shared}"
        with directory_lock(self.directory / LOCK, holder, shared=shared):
            if not shared:
                self._finish_commits()
            elif unfinished := self.manifest().get("committing"):
                script = script_of(next(iter(unfinished)))
                raise UserError(f"{script} was stopped in {self} as it ended; run it again, which finishes it")
            yield self

    @contextmanager
    def dividing(self, stage: str, *, new: bool, patience: float) -> Iterator[None]:
        """Refuse a second command that divides a stage into parts: its parts lock the directory, not the command.

        Parameters
        ----------
        stage, new
            As for `locked`.
        patience
            Seconds to wait for parts that a killed command left behind.
        """
        if not self._exists(new=new):
            yield
            return
        holder = script_of(stage)
        with directory_lock(self.directory / COMMAND_LOCK, holder):
            with directory_lock(self.directory / LOCK, holder, patience=patience):
                pass
            yield

    def _exists(self, *, new: bool) -> bool:
        """Whether the directory exists, or is `new` and was created."""
        if "::" in str(self.directory.absolute()):
            raise UserError(
                f"{self.setting} {self.directory.absolute()}: Lightning interprets '::' in a path as a chain of file"
                " systems; choose another folder"
            )
        if not new and not self.directory.exists():
            return False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.setting} {self.directory} cannot be created: {error.strerror}") from None
        return True

    def manifest(self) -> dict[str, Any]:
        """Content of the manifest, `{"stages": {stage: record}}`; empty if no stage has run."""
        path = self.directory / MANIFEST
        if not path.exists():
            return {"stages": {}}
        try:
            manifest = dict(read_json(path))
            if not isinstance(manifest.get("redoing", {}), dict):
                raise TypeError("redoing is not a mapping of stages")
            names = [
                name
                for records in (manifest["stages"], manifest.get("committing", {}))
                for stage, record in records.items()
                for name in (stage, *record["artifacts"], *record["outputs"])
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it, or move the run directory away") from None
        if outside := [name for name in names if leaves_folder(str(name))]:
            raise UserError(f"{path} refers to {outside[0]!r}, which is outside the run directory; do not trust it")
        records = [*manifest["stages"].items(), *manifest.get("committing", {}).items()]
        for stage, record in records:
            self._require_whole(stage, incomplete(record))
        return manifest

    def record(self, stage: str) -> dict[str, Any] | None:
        """Record of a finished stage; None if there is none."""
        return self.manifest()["stages"].get(stage)

    def whole_record(self, stage: str) -> dict[str, Any] | None:
        """Record of a finished stage; UserError if a key specific to the stage is missing."""
        record = self.record(stage)
        if record is not None:
            self._require_whole(stage, incomplete(record, stage))
        return record

    def _require_whole(self, stage: str, gap: str | None) -> None:
        if gap is not None:
            raise UserError(
                f"{self.directory / MANIFEST} is damaged ({stage}: {gap}); restore it, or run"
                f" {script_of(stage)} in another {self.setting}"
            )

    def require(self, stage: str, names: Sequence[str]) -> dict[str, Identity]:
        """Identities of files that a finished stage wrote, checked against their contents.

        Raises
        ------
        UserError
            The stage has not run, a forced rerun was interrupted, or a file is missing or was changed.
        """
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.directory / names[0]} does not exist; run {script_of(stage)} first")
        if stage in self.manifest().get("redoing", {}):
            raise UserError(
                f"{script_of(stage)} --force did not finish in {self.directory}, and {names[0]} is older than"
                f" that; run {script_of(stage)} again (without --force it resumes)"
            )
        found = {}
        for name in names:
            if name not in record["outputs"]:
                raise UserError(
                    f"{self.directory / name} was not written by {script_of(stage)}; run it for these settings"
                )
            self._require_sound(stage, name, record["outputs"][name])
            found[name] = record["outputs"][name]
        return found

    def check(self, stage: str, names: Sequence[str]) -> None:
        """UserError if a file of a finished stage is missing or was changed.

        For readers that do not change the run. Large files are hashed once and then remembered by size and times.
        Files that the stage did not write are ignored.
        """
        record = self.record(stage)
        for name in names:
            if record is not None and name in record["outputs"]:
                self._require_sound(stage, name, record["outputs"][name], remember=True)

    def require_run(self, way_out: str) -> None:
        """UserError if no stage ran in the directory; `way_out` ends the message and says what to do."""
        if not self.directory.is_dir():
            raise UserError(f"run directory {self.directory} does not exist; {way_out}")
        if not (self.directory / MANIFEST).exists():
            raise UserError(f"run directory {self.directory} has no {MANIFEST}, so no stage ran in it; {way_out}")

    def begin(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        force: bool,
        progress: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> StageRun:
        """Decide if a stage is done, resumes, starts or must be refused; only leftovers of a done stage are removed.

        Parameters
        ----------
        stage
            Name of the stage.
        settings
            The settings that change what the stage writes, by dotted key.
        inputs
            Identity of everything the stage reads.
        force
            Start again even if the stage is done.
        progress
            File in staging (or in a part's staging) that exists if there is work to resume; None for a stage that
            always starts over.
        defaults
            Default values, used for settings that an earlier run did not have yet.

        Raises
        ------
        UserError
            The directory holds this stage with another fingerprint; the message names the setting or input.
        """
        fingerprint = fingerprint_of(settings, inputs)
        run = StageRun(stage=stage, fingerprint=fingerprint, forced=force, workspace=self)
        record, digest_now = self.record(stage), digest(fingerprint)
        if force:
            return run
        resumable = progress and (begun(run.path(progress)) or run.path(PARTS).exists())
        unfinished = run.staged_fingerprint if resumable else None
        if unfinished is not None and not changes(unfinished, fingerprint, defaults or {}):
            run.resumed = True
        elif record is not None and self.manifest().get("redoing", {}).get(stage) != digest_now:
            self._require_unchanged(stage, record, fingerprint, defaults or {})
            self.note_redoing(stage, None)
            if unfinished is None:  # a run with --force that was killed before there was anything to resume
                remove(run.staging)
            run.done = True
        elif unfinished is not None:
            self._refuse_changes(stage, "an unfinished", unfinished, fingerprint, defaults or {})
        return run

    def _require_unchanged(
        self, stage: str, record: dict[str, Any], fingerprint: dict[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """UserError if a finished stage had other settings or inputs, or its outputs are damaged."""
        self._refuse_changes(stage, "a finished", record["fingerprint"], fingerprint, defaults)
        for name, identity in record["outputs"].items():
            self._require_sound(stage, name, identity)

    def note_redoing(self, stage: str, fingerprint: str | None) -> None:
        """Record that a finished stage runs again, so that its old outputs are not used; None removes the record."""
        manifest = self.manifest()
        redoing = manifest.pop("redoing", {})
        if redoing.get(stage) == fingerprint:
            return
        redoing.pop(stage, None)
        redoing |= {stage: fingerprint} if fingerprint else {}
        write_json(self.directory / MANIFEST, manifest | ({"redoing": redoing} if redoing else {}))

    def _refuse_changes(
        self, stage: str, state: str, before: dict[str, Any], now: dict[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        if words := changes(before, now, defaults):
            raise UserError(
                f"{self.directory} holds {state} {stage} for other settings: {words};"
                f" set it back, use another {self.setting}, or --force to run it again"
            )

    def _require_sound(self, stage: str, name: str, identity: Identity, *, remember: bool = False) -> None:
        if identity["size"] > _LARGE:
            log.info("checking %s (%.0f GB)", self.directory / name, identity["size"] / 1e9)
        if found := damage(self.directory / name, identity, remember=remember):
            raise UserError(
                f"{self.directory / name} {found} by {script_of(stage)}; restore it, or run {script_of(stage)} --force"
            )

    def _finish_commits(self) -> None:
        for stage, record in self.manifest().get("committing", {}).items():
            log.info("finishing the interrupted commit of %s", stage)
            self.finish_commit(stage, record)

    def finish_commit(self, stage: str, record: dict[str, Any]) -> None:
        """Rename staged outputs into place and mark the stage done; may be repeated after a kill at any point."""
        staging = self.directory / STAGING / stage
        for name in record["artifacts"]:
            staged, target = staging / name, self.directory / name
            if not staged.exists():
                continue  # renamed before the kill
            if target.is_dir():  # a folder cannot be replaced in one step: move the old one first
                aside = staging / f"{name}.old"
                remove(aside)
                target.rename(aside)
            staged.replace(target)
        sync(self.directory)
        manifest = self.manifest()
        manifest["stages"][stage] = record
        for unfinished in ("committing", "redoing"):
            manifest.get(unfinished, {}).pop(stage, None)
        write_json(self.directory / MANIFEST, manifest)
        remove(staging)


@dataclass(kw_only=True)
class StageRun(RecordedRun):
    """One run of a stage in a run directory: start, staging, commit."""

    workspace: Workspace

    @property
    def staging(self) -> Path:
        """Folder for unfinished output; survives a kill."""
        return self.workspace.directory / STAGING / self.stage

    @property
    def staged_fingerprint(self) -> dict[str, Any] | None:
        """Fingerprint of the unfinished work in `staging`; None if there is none."""
        path = self.staging / FINGERPRINT
        if not path.exists():
            return None
        try:
            fingerprint = dict(read_json(path))
            dict(fingerprint["config"]), dict(fingerprint["inputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); --force does {self.stage} again") from None
        return fingerprint

    def start(self) -> None:
        """Record a forced rerun in the manifest, and create an empty `staging` unless the stage resumes."""
        if self.forced and self.workspace.record(self.stage) is not None:
            self.workspace.note_redoing(self.stage, digest(self.fingerprint))
        if not self.resumed:
            remove(self.staging)
            self.staging.mkdir(parents=True)
            write_json(self.staging / FINGERPRINT, self.fingerprint)

    def discard(self) -> None:
        """Remove unfinished work."""
        remove(self.staging)
        if self.staging.parent.exists() and not any(self.staging.parent.iterdir()):
            remove(self.staging.parent)

    def path(self, name: str) -> Path:
        """Path to write an output to before the commit."""
        return self.staging / name

    def commit(
        self, artifacts: Sequence[str], counts: dict[str, Any], *, config: dict[str, Any], seed: int, **details: Any
    ) -> None:
        """Move the outputs into place and record the stage as done.

        Parameters
        ----------
        artifacts
            Names of the files and folders in `staging` to move, relative to the run directory.
        counts
            Counts for the record: cells, genes, ...
        config
            The whole config, without credentials.
        seed
            The seed.
        details
            More JSON-serializable entries of the record.
        """
        sync_tree(self.staging)
        outputs = identities(self.staging, artifacts)
        record = self.record(artifacts, outputs, counts, config=config, seed=seed, **details)
        manifest = self.workspace.manifest()
        manifest.setdefault("committing", {})[self.stage] = record
        write_json(self.workspace.directory / MANIFEST, manifest)
        self.workspace.finish_commit(self.stage, record)
