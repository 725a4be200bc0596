"""Settings: which releases are compared."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, LocalPath, Name, PathName


class CompareReleasesSection(Section):
    """What changed between two releases (compare-releases)."""

    changes: ClassVar[tuple[str, ...]] = ("compare-releases",)
    old: Annotated[PathName | None, USUAL] = None
    """The earlier release: a run directory, or a published folder or its URL."""
    new: PathName | None = None
    """The later release; null: the run directory `output.directory`."""
    old_census: PathName | None = None
    """Census of the earlier release, a path, URL or version such as 2025-01-30; null: where its record says."""
    new_census: PathName | None = None
    """Census of the later release; null: where its record says."""
    label: Name = "cell_type"
    """obs column of the cell types: for the labels of neighbors, and to find cells with another label."""
    by: Columns = Field(default_factory=lambda: ["dataset_id", "tissue", "cell_type"])
    """obs columns whose values are compared, the most changed first."""
    sampled_cells: Annotated[int, Field(ge=100)] = 20_000
    """Random cells of both releases, among which neighbors are searched. The movement is measured on all cells."""
    folder: Annotated[LocalPath | None, Changes()] = None
    """Folder for comparison.json and report.html; null: `comparison` in the run directory."""
