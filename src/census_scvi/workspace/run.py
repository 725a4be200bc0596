"""A stage's way through the run directory: skip when done, refuse when something changed, resume, commit whole.

A stage writes into `.partial/<stage>/`. To commit, its record is put into the manifest as `committing`, with the
identities of its outputs; then each output is renamed into place; then the record becomes `done`. Whoever opens the
directory next carries an interrupted commit to its end, so a kill at any moment leaves the old artifacts or the new.
A finished stage that runs again with --force is noted as `redoing` until it commits: other stages refuse to read what
it wrote before, and the same command without --force resumes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from census_scvi.config import Config, digest
from census_scvi.config.commands import script_of
from census_scvi.config.renamed import translate_record
from census_scvi.config.run_names import FINGERPRINT, LOCK, MANIFEST, STAGING
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, sync, sync_tree, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import directory_lock
from census_scvi.files.uri import leaves_folder, without_credentials
from census_scvi.workspace import provenance
from census_scvi.workspace.identity import Identity, damage, identities
from census_scvi.workspace.manifest import incomplete

log = logging.getLogger(__name__)

_LARGE = 5_000_000_000  # bytes from which hashing takes long enough to be announced


@dataclass
class Workspace:
    """A run directory and its manifest."""

    directory: Path

    @contextmanager
    def locked(self, stage: str, *, new: bool = False) -> Iterator[Workspace]:
        """Hold the directory for a stage; finishes a commit that a killed run left open.

        Parameters
        ----------
        stage
            Who holds it.
        new
            Make the directory where it does not exist, as the first stage does; for another there is nothing to hold
            then, and `require` says what is missing.
        """
        if "::" in str(self.directory.absolute()):
            raise UserError(
                f"output.directory {self.directory.absolute()}: Lightning takes '::' in a path for a chain of file"
                " systems; choose another folder"
            )
        if not new and not self.directory.exists():
            yield self
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output.directory {self.directory} cannot be made: {error.strerror}") from None
        with directory_lock(self.directory / LOCK, script_of(stage)):
            self._finish_commits()
            yield self

    def manifest(self) -> dict[str, Any]:
        """`{"stages": {stage: record}}`; empty where nothing has run."""
        path = self.directory / MANIFEST
        if not path.exists():
            return {"stages": {}}
        try:
            manifest = dict(read_json(path))
            if not isinstance(manifest.get("redoing", {}), dict):
                raise TypeError("redoing is no mapping of stages")
            names = [
                name
                for records in (manifest["stages"], manifest.get("committing", {}))
                for stage, record in records.items()
                for name in (stage, *record["artifacts"], *record["outputs"])
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it, or move the run directory away") from None
        if outside := [name for name in names if leaves_folder(str(name))]:
            raise UserError(f"{path} names {outside[0]!r}, which lies outside the run directory; do not trust it")
        records = [*manifest["stages"].items(), *manifest.get("committing", {}).items()]
        for stage, record in records:
            self._require_whole(stage, incomplete(record))
        return manifest

    def record(self, stage: str) -> dict[str, Any] | None:
        """Record of a finished stage."""
        return self.manifest()["stages"].get(stage)

    def whole_record(self, stage: str) -> dict[str, Any] | None:
        """Record of a finished stage, with all that this stage itself writes into it; UserError where some is gone."""
        record = self.record(stage)
        if record is not None:
            self._require_whole(stage, incomplete(record, stage))
        return record

    def _require_whole(self, stage: str, gap: str | None) -> None:
        if gap is not None:
            raise UserError(
                f"{self.directory / MANIFEST} is damaged ({stage}: {gap}); restore it, or run"
                f" {script_of(stage)} in another output.directory"
            )

    def require(self, stage: str, names: Sequence[str]) -> dict[str, Identity]:
        """Identities of files that a finished stage wrote, checked against their contents.

        Raises
        ------
        UserError
            The stage has not run or was interrupted while it ran again, or a file is missing or not what it wrote.
        """
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.directory / names[0]} does not exist; run {script_of(stage)} first")
        if stage in self.manifest().get("redoing", {}):
            raise UserError(
                f"{script_of(stage)} --force did not finish in {self.directory}, and {names[0]} there is older than"
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
        """UserError where a file that a finished stage wrote is missing, or is not what it wrote.

        For those who read a run without changing it: large files are hashed once, and then remembered by size and
        times; a file that the stage did not write is passed over.
        """
        record = self.record(stage)
        for name in names:
            if record is not None and name in record["outputs"]:
                self._require_sound(stage, name, record["outputs"][name], remember=True)

    def require_run(self, way_out: str) -> None:
        """UserError where nothing was run in the directory; `way_out` says what to do instead."""
        if not self.directory.is_dir():
            raise UserError(f"run directory {self.directory} does not exist; {way_out}")
        if not (self.directory / MANIFEST).exists():
            raise UserError(f"run directory {self.directory} has no {MANIFEST}, nothing was run in it; {way_out}")

    def begin(
        self,
        stage: str,
        config: Config,
        keys: tuple[str, ...],
        inputs: dict[str, Any],
        *,
        force: bool,
        progress: str | None = None,
    ) -> StageRun:
        """Decide whether a stage is done, resumes, starts, or must be refused.

        Parameters
        ----------
        stage
            Name of the stage.
        config
            The whole config, recorded in the manifest.
        keys
            Dotted settings and sections whose values change what the stage writes.
        inputs
            Identity of everything the stage reads.
        force
            Start again even if the stage is done.
        progress
            File in staging whose presence means that there is work to resume; None for a stage that starts over.

        Raises
        ------
        UserError
            The directory holds a finished or unfinished stage of another fingerprint: names the setting or the input.
        """
        fingerprint = without_credentials({"config": config.select(keys), "inputs": inputs})
        run = StageRun(self, stage, config, fingerprint)
        record = self.record(stage)
        if force and record is not None:
            self._note_redoing(stage, digest(fingerprint))
        if force or progress is None or not run.path(progress).exists():
            remove(run.staging)
        if run.resumes:
            run.resumed = True
            return run
        redoing = self.manifest().get("redoing", {}).get(stage)
        if record is not None and redoing != digest(fingerprint):
            self._refuse_changes(stage, "a finished", record["fingerprint"], fingerprint)
            for name, identity in record["outputs"].items():
                self._require_sound(stage, name, identity)
            self._note_redoing(stage, None)
            run.done = True
            return run
        if (unfinished := run.staged_fingerprint) is not None:
            self._refuse_changes(stage, "an unfinished", unfinished, run.fingerprint)
        run.open()
        return run

    def _note_redoing(self, stage: str, fingerprint: str | None) -> None:
        """Note that a finished stage runs again, so that what it wrote before is not taken for its result; None: no."""
        manifest = self.manifest()
        redoing = manifest.pop("redoing", {})
        if redoing.get(stage) == fingerprint:
            return
        redoing.pop(stage, None)
        redoing |= {stage: fingerprint} if fingerprint else {}
        write_json(self.directory / MANIFEST, manifest | ({"redoing": redoing} if redoing else {}))

    def _refuse_changes(self, stage: str, state: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        if changes := _changes(_in_settings_of(now, before), now):
            raise UserError(
                f"{self.directory} holds {state} {stage} for other settings: {changes};"
                " set it back, use another output.directory, or --force to run it again"
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
            if target.is_dir():  # a folder cannot be replaced in one step: the old one steps aside first
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


def _in_settings_of(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint that an earlier version wrote, by the names of today: a newer setting did what is its default."""
    config = Config().select(tuple(now["config"])) | translate_record(before["config"])
    return {**before, "config": config}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings and inputs that differ, in words; empty where none does."""
    words = []
    old, new = before["config"], now["config"]
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            words.append(f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}")
    old, new = before["inputs"], now["inputs"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            words.append(f"the input {name} is another one than before")
    return "; ".join(words)


@dataclass
class StageRun:
    """One run of a stage: where it writes, whether it resumes earlier work, how it ends."""

    workspace: Workspace
    stage: str
    config: Config
    fingerprint: dict[str, Any]
    done: bool = False
    resumed: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _clock: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    @property
    def staging(self) -> Path:
        """Folder for unfinished output; survives a kill."""
        return self.workspace.directory / STAGING / self.stage

    @property
    def staged_fingerprint(self) -> dict[str, Any] | None:
        """Fingerprint of the unfinished work in `staging`, if there is any."""
        path = self.staging / FINGERPRINT
        if not path.exists():
            return None
        try:
            fingerprint = dict(read_json(path))
            dict(fingerprint["config"]), dict(fingerprint["inputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); --force does {self.stage} again") from None
        return fingerprint

    @property
    def resumes(self) -> bool:
        """Whether `staging` holds earlier work for the same fingerprint."""
        staged = self.staged_fingerprint
        return staged is not None and _in_settings_of(self.fingerprint, staged) == self.fingerprint

    def open(self) -> None:
        """Make an empty `staging`."""
        remove(self.staging)
        self.staging.mkdir(parents=True)
        write_json(self.staging / FINGERPRINT, self.fingerprint)

    def path(self, name: str) -> Path:
        """Where to write an output before it is committed."""
        return self.staging / name

    def commit(self, artifacts: Sequence[str], counts: dict[str, Any], **details: Any) -> None:
        """Put the outputs in place and record the stage as done.

        Parameters
        ----------
        artifacts
            Names of files and folders in `staging` to publish, relative to the run directory.
        counts
            What the stage counted: cells, genes, ...
        details
            More JSON-able facts for the record.
        """
        sync_tree(self.staging)
        record = {
            "stage": self.stage,
            "artifacts": list(artifacts),
            "fingerprint": self.fingerprint,
            "config": without_credentials(self.config.model_dump(mode="json")),
            "outputs": identities(self.staging, artifacts),
            "counts": counts,
            "resumed": self.resumed,
            "seed": self.config.seed,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "packages": provenance.package_versions(),
            "code": provenance.code_state(),
            "hardware": provenance.hardware(),
            **details,
        }
        manifest = self.workspace.manifest()
        manifest.setdefault("committing", {})[self.stage] = record
        write_json(self.workspace.directory / MANIFEST, manifest)
        self.workspace.finish_commit(self.stage, record)
