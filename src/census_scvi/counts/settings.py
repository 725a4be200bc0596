"""Settings: the file of cells that the model is trained on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, FileName, Name


class AnndataSection(Section):
    """The file of cells that the model is trained on."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "train")
    batch_key: Annotated[Columns, Changes("prepare", "train", "create-latent-update", "evaluate", "publish"), USUAL] = (
        Field(default_factory=lambda: ["dataset_id", "assay", "suspension_type", "donor_id"])
    )
    """obs columns whose combination is the batch."""
    labels_key: Annotated[Name | None, Changes("prepare", "train"), USUAL] = None
    """obs column of the labels that SCANVI learns, e.g. cell_type; null: none."""
    unlabeled_category: Annotated[Name, Changes("prepare", "train")] = "unknown"
    """Label of the cells without a known label."""
    protein_measurement: Annotated[Name | None, Changes("prepare", "train", "create-latent-update")] = None
    """Measurement of the Census with the proteins that TOTALVI learns, e.g. protein; null: none."""
    model_filename: FileName = "anndata_model.h5ad"
    """Name of the file of training cells in the run directory."""
    obs_columns: Columns | None = None
    """obs columns to keep in that file, in addition to soma_joinid and batch; null: all."""
    compression: Literal["gzip", "none"] = "gzip"
    """Compression of the counts. `none` needs four times the disk space and a third less CPU time to read."""

    @model_validator(mode="after")
    def _some_batch(self) -> Self:
        if not self.batch_key:
            raise ValueError("anndata.batch_key is empty; name at least one obs column, for instance [dataset_id]")
        return self
