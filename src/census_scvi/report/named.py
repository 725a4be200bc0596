"""Which embeddings are evaluated, and where the report goes."""

from __future__ import annotations

from census_scvi.config import Config
from census_scvi.workspace import Workspace


def embeddings_of(config: Config) -> dict[str, str]:
    """Name in the report, and place, of each embedding; UserError where none is named and there is no run."""
    if config.evaluate.embeddings:
        return dict(config.evaluate.embeddings)
    way_out = (
        "name the run in output.directory, or what to evaluate in evaluate.embeddings, for instance"
        f" {{published: {config.publish.name}}} for obsm['{config.publish.name}'] of the Census"
    )
    Workspace(config.directory).require_run(way_out)
    return {"scVI": str(config.directory)}


def evaluation_setting(config: Config) -> str:
    """The setting that says where the report goes."""
    return "evaluate.folder" if config.evaluate.folder else "output.directory"
