"""Settings: processes that share the work of a stage."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from census_scvi.config.section import Section


class ClusterSection(Section):
    """Several processes for one stage (prepare, create-latent-update)."""

    changes: ClassVar[tuple[str, ...]] = ()
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes on this machine that do parts of the work at the same time; 1: the command does it alone."""
    parts_per_worker: Annotated[int, Field(ge=1)] = 4
    """Parts for each of these processes: with more parts, a slow one delays the end less."""
