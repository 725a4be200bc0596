"""Locations of two releases and of their comparison. This module has no slow imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from census_scvi.config.run_names import COMPARISON_RECORD, REPORT
from census_scvi.config.stages import script_of
from census_scvi.errors import UserError
from census_scvi.files.writable import require_writable_folder
from census_scvi.model.source import Kind, Source
from census_scvi.releases.settings import CompareReleasesSection
from census_scvi.workspace import Artifacts, Workspace

STAGES = ("prepare", "train", "create-latent-update")
EMBED = STAGES[-1]


def places_of(settings: CompareReleasesSection, directory: Path) -> dict[str, str]:
    """Location of the old and of the new release, by the setting that names each.

    Raises
    ------
    UserError
        `compare_releases.old` is not set.
    """
    if settings.old is None:
        raise UserError(
            "compare_releases.old is not set; give the earlier release, a run directory or a published folder:"
            " compare_releases.old=run-of-last-release"
        )
    newer = "compare_releases.new" if settings.new else "output.directory"
    return {"compare_releases.old": settings.old, newer: settings.new or str(directory)}


def comparison_place(settings: CompareReleasesSection, folder: Path) -> Workspace:
    """The folder of the results; UserError if it cannot be written."""
    setting = "compare_releases.folder" if settings.folder else "output.directory"
    require_writable_folder(folder, [COMPARISON_RECORD, REPORT], setting)
    return Workspace(folder, setting)


def identities_of(places: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Identity of the embedding of each place, by setting.

    Raises
    ------
    UserError
        A place is no release, or both are the same one.
    """
    found = {setting: identity_of(place, setting) for setting, place in places.items()}
    (old, one), (new, other) = found.items()
    if one == other:
        raise UserError(f"{old} {places[old]} and {new} {places[new]} are the same embedding; give two releases")
    return found


def identity_of(place: str, setting: str) -> dict[str, Any]:
    """Identity of the embedding of a release; UserError, with the setting of the place, if it is none."""
    source = Source.at(place)
    if source.run is not None:
        return {"latent": stage_record(Workspace(source.run), EMBED)["outputs"][Artifacts.latent]}
    if not source.is_published:
        raise UserError(
            f"{setting} is {place}, which {'does not exist' if source.kind is Kind.MISSING else 'is not a release'};"
            " give a run directory with an embedding, or a folder that scvi-publish.py wrote"
        )
    from census_scvi.model.published import fetch, read_provenance  # imports scvi-tools, which takes seconds

    record = read_provenance(fetch(place))
    return {"publication": record["publication"], "embedding": record["embedding"]["sha256"]}


def stage_record(workspace: Workspace, stage: str) -> dict[str, Any]:
    """Record of a stage of a release; UserError if it has not run."""
    record = workspace.whole_record(stage)
    if record is None:
        raise UserError(f"{workspace.directory} is not a finished release; run {script_of(stage)} first")
    return record
