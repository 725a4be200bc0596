"""Parts of a stage in a run directory, which several processes do at once, on any machine that sees the directory.

All of them hold the lock of the directory together, and each the lock of its part. The stage itself, which joins the
parts, holds the lock of the directory alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from census_scvi.config.run_names import PART_DONE, PART_LOCK, PARTS, PARTS_LOCK
from census_scvi.config.stages import script_of
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import directory_lock, waiting_lock
from census_scvi.files.parts import Part, begun
from census_scvi.workspace.provenance import package_versions
from census_scvi.workspace.record import changes
from census_scvi.workspace.run import StageRun, Workspace


def begin_part(
    workspace: Workspace,
    stage: str,
    part: Part,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    progress: str,
    defaults: Mapping[str, Any],
) -> StageRun:
    """Prepare staging for a part: the first one creates it, the others must fit to it.

    Parameters
    ----------
    workspace, stage, part
        The run directory, which the process has locked together with others, the stage and its part.
    settings, inputs, progress, defaults
        As in `Workspace.begin`.

    Returns
    -------
    The run: done, or resumed.

    Raises
    ------
    UserError
        The stage was begun with other settings, inputs, package versions or number of parts; or not in parts.
    """
    with waiting_lock(workspace.directory / PARTS_LOCK):
        run = workspace.begin(stage, settings, inputs, force=False, defaults=defaults)  # decides if it is done
        if run.done:
            return run
        before = run.staged_fingerprint
        if before is None or not (run.path(PARTS).exists() or begun(run.path(progress))):
            divide(run, part.of)
        elif words := changes(before, run.fingerprint, defaults):
            raise UserError(
                f"{workspace} holds an unfinished {stage} for other settings than {part}: {words}; set it back, use"
                f" another {workspace.setting}, or run {script_of(stage)} --force without --part to start again"
            )
        else:
            _require_fits(run, part)
        run.resumed = True
    return run


def divide(run: StageRun, number: int) -> int:
    """Divide the work of a stage that this process has locked alone into parts; 1: it was begun undivided.

    Returns
    -------
    The number of parts: `number`, or that of the work that the run resumes.
    """
    if run.resumed:
        return number_of_parts(run)
    run.start()
    write_json(run.path(PARTS), {"of": number, "packages": package_versions()})
    return number


def number_of_parts(run: StageRun) -> int:
    """Number of parts that the work in staging is divided into; 1: it is not divided.

    UserError if the parts were done with other package versions than those of this process.
    """
    if not run.path(PARTS).exists():
        return 1
    record = _record(run)
    _require_packages(run, record, f"the parts of {run.stage} in {run.workspace}")
    return int(record["of"])


def done_mark(staging: Path, part: Part) -> Path:
    """File in the staging folder of a stage that exists when a part is done."""
    return staging / part.name(PART_DONE)


def part_lock(run: StageRun, part: Part, patience: float) -> AbstractContextManager[None]:
    """Lock of a part; UserError if another process does it, and goes on for this number of seconds."""
    return directory_lock(run.path(part.name(PART_LOCK)), f"another process that does {part}", patience=patience)


def _require_fits(run: StageRun, part: Part) -> None:
    script = script_of(run.stage)
    if not run.path(PARTS).exists():
        raise UserError(
            f"{run.workspace} holds an unfinished {run.stage} that is not divided into parts; run {script} without"
            " --part, which resumes it"
        )
    record = _record(run)
    if record["of"] != part.of:
        raise UserError(
            f"{run.workspace} holds a {run.stage} in {record['of']} parts, and this is {part}; run its parts 1 to"
            f" {record['of']}, or {script} without --part, which does what is missing"
        )
    _require_packages(run, record, f"other parts of {run.stage} in {run.workspace}")


def _require_packages(run: StageRun, record: dict[str, Any], what: str) -> None:
    own, theirs = package_versions(), record["packages"]
    different = [
        f"{name} {theirs.get(name)}, here {own.get(name)}"
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    if different:
        raise UserError(
            f"{what} were done with other versions: {'; '.join(different)}; install the same, or run"
            f" {script_of(run.stage)} --force without --part to start again"
        )


def _record(run: StageRun) -> dict[str, Any]:
    path = run.path(PARTS)
    try:
        record = dict(read_json(path))
        return {"of": int(record["of"]), "packages": dict(record["packages"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); --force without --part does {run.stage} again") from None
