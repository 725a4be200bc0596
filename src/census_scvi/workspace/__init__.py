"""The run directory: names of artifacts, lock, identities, staging, commit, manifest."""

from census_scvi.workspace.artifacts import Artifacts
from census_scvi.workspace.run import StageRun, Workspace

__all__ = ["Artifacts", "StageRun", "Workspace"]
