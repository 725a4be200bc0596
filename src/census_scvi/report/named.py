"""The embeddings to evaluate, and the folder of the report."""

from __future__ import annotations

from pathlib import Path

from census_scvi.config.run_names import METRICS, REPORT
from census_scvi.files.writable import require_writable_folder
from census_scvi.report.settings import PCA, EvaluateSection
from census_scvi.workspace import Workspace


def embeddings_of(settings: EvaluateSection, directory: Path) -> dict[str, str]:
    """Location of each embedding, by its name in the report: the configured ones, or that of the run directory.

    UserError if none is configured and no stage ran in the run directory.
    """
    if settings.embeddings:
        return dict(settings.embeddings)
    way_out = (
        "give the run in output.directory, or embeddings in evaluate.embeddings, for example"
        " {published: scvi} for obsm['scvi'] of the Census"
    )
    Workspace(directory).require_run(way_out)
    from census_scvi.model.families import SCVI, family_of  # imports scvi-tools, which takes seconds

    embedded = Workspace(directory).record("create-latent-update") or {}
    if "imported" in embedded:
        method = embedded["imported"]["method"]
        return {f"{method} (imported)" if method == PCA else method: str(directory)}
    trained = Workspace(directory).record("train") or {}
    kind = trained.get("config", {}).get("model", {}).get("kind", SCVI)
    return {family_of(kind).title: str(directory)}


def evaluation_place(settings: EvaluateSection, folder: Path) -> Workspace:
    """The folder of the report; UserError if it cannot be written."""
    setting = "evaluate.folder" if settings.folder else "output.directory"
    require_writable_folder(folder, [METRICS, REPORT], setting)
    return Workspace(folder, setting)
