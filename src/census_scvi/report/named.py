"""Which embeddings are evaluated, and where the report goes."""

from __future__ import annotations

from pathlib import Path

from census_scvi.report.settings import EvaluateSection
from census_scvi.workspace import Workspace


def embeddings_of(settings: EvaluateSection, directory: Path) -> dict[str, str]:
    """Name in the report, and place, of each embedding: those named, or that of the run directory.

    UserError where none is named and nothing was run.
    """
    if settings.embeddings:
        return dict(settings.embeddings)
    way_out = (
        "give the run in output.directory, or embeddings in evaluate.embeddings, for example"
        " {published: scvi} for obsm['scvi'] of the Census"
    )
    Workspace(directory).require_run(way_out)
    return {"scVI": str(directory)}


def evaluation_setting(settings: EvaluateSection) -> str:
    """The setting that says where the report goes."""
    return "evaluate.folder" if settings.folder else "output.directory"
