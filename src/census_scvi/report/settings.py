"""Settings: what is evaluated."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, LocalPath, Name, ObsFilter, PathName

# Stages that compute the metrics.
# Name of the PCA of the counts that is evaluated next to the embeddings.
PCA = "PCA"
_MEASURED = ("evaluate", "compare-releases", "search")


class EvaluateSection(Section):
    """Metrics of embeddings (evaluate)."""

    changes: ClassVar[tuple[str, ...]] = ("evaluate",)
    embeddings: Annotated[dict[Name, PathName], USUAL] = Field(default_factory=dict)
    """Embeddings to evaluate. Name in the report: a name in the obsm of the Census, a run directory or an Experiment;
    {}: the run's.
    """
    obs_filter: ObsFilter | None = "is_primary_data == True"
    """SOMA value filter of the cells to evaluate on; null: all."""
    labels: Annotated[Columns, Changes(*_MEASURED), USUAL] = Field(default_factory=lambda: ["cell_type"])
    """obs columns that the embedding should preserve; cell_class and cell_subclass are derived with the Cell Ontology.
    """
    batches: Annotated[Columns, Changes(*_MEASURED), USUAL] = Field(
        default_factory=lambda: ["dataset_id", "assay", "batch"]
    )
    """obs columns that should be mixed; batch: those of `anndata.batch_key` combined."""
    donors: Annotated[Name | None, Changes(*_MEASURED)] = "donor_id"
    """obs column whose groups are held out and resampled (for confidence intervals) as a whole; null: single cells
    are.
    """
    max_cells: Annotated[int, Field(ge=100)] = 100_000
    """Maximum number of cells; of more, this number is drawn at random."""
    measured_cells: Annotated[int, Field(ge=100), Changes(*_MEASURED)] = 10_000
    """Cells for the metrics and maps; entropy uses neighbors among all `max_cells`."""
    baseline: bool = True
    """Whether to evaluate a PCA of log-normalized counts, too."""
    folder: Annotated[LocalPath | None, Changes()] = None
    """Folder for metrics.json and report.html; null: `evaluation` in the run directory."""
