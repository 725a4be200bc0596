"""Settings: a user's own cells."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, LocalPath, Name, ObsFilter, PathName, ProteinPlace, Share
from census_scvi.query.surgery.settings import COMPARE, NONE, SEQUENTIAL, Surgery, SurgeryTraining


class QuerySection(Section):
    """Your own cells (map-query, annotate)."""

    changes: ClassVar[tuple[str, ...]] = ("map-query",)
    file: Annotated[LocalPath | None, Changes("map-query", "annotate"), USUAL] = None
    """Your cells: .h5ad, zarr, 10x .h5, folder with matrix.mtx, Loom, or CSV/TSV of cells x genes; genes by Ensembl id
    or symbol.
    """
    output: Annotated[LocalPath | None, Changes(), USUAL] = None
    """The .h5ad to write: your cells with embedding and predicted labels; null: `<file>-mapped.h5ad` (annotate:
    `<file>-annotated.h5ad`).
    """
    model: Annotated[PathName | None, Changes("map-query", "annotate"), USUAL] = None
    """Published model: a folder or URL; null: the model in the run directory."""
    embedding: PathName | None = None
    """Embedding of the reference cells: a name in the obsm of the Census, a run directory or an Experiment; null:
    `scvi`, or the run's.
    """
    vectors: Name | None = None
    """Member of obsm of your file that holds the vectors of your cells, by the model (of any kind) that made
    `embedding`: no model is loaded, and the nearest cells annotate; null: the model embeds your cells.
    """
    counts: Annotated[Name | None, Changes("map-query", "annotate")] = None
    """Where the raw counts are: X, raw or layers/<name>; null: detected, and an error where several places may hold
    them.
    """
    values: Annotated[Literal["counts", "log_normalized"], Changes("map-query", "annotate")] = "counts"
    """What the file holds: raw counts, or logarithms of normalised counts (log(CPM + 1), log1p(CP10k)), from which the
    counts are recovered.
    """
    proteins: ProteinPlace | None = None
    """Where the raw protein counts for a TOTALVI model are: obsm/<name>, features (type "Antibody Capture"), or none
    for cells without proteins, which the model imputes; null: detected, and an error where no or several places hold
    them.
    """
    min_share: Annotated[Share, Changes("map-query", "annotate")] = 0.8
    """Minimum fraction of the model's genes that your file must have; fewer are accepted where the others have few
    counts.
    """
    batch_key: Annotated[Columns | None, Changes("map-query", "annotate"), USUAL] = None
    """obs columns of your file whose combinations are the technical batches: sample, donor; null: not known.
    """
    surgery: Annotated[Surgery, USUAL] = "none"
    """Whether to adapt the model to the batches of your file before the cells are embedded: train one model for all
    batches, one model per batch, or one batch after another. The reference does not change. `compare` does all of
    these, writes a report of their differences, and embeds the cells as `joint` does.
    """
    surgery_training: SurgeryTraining = SurgeryTraining()
    labels: Annotated[Columns, Changes("map-query", "annotate"), USUAL] = Field(default_factory=lambda: ["cell_type"])
    """Labels to predict: obs columns of the Census; map-query: empty for none."""
    split_labels: Annotated[bool, Changes("map-query", "annotate")] = False
    """Whether a reference cell with several values ("influenza || pneumonia" in `disease`) counts for each of them."""
    obs_filter: ObsFilter | None = None
    """SOMA value filter of the reference cells; null: all."""
    reference_cells: Annotated[int, Field(ge=100)] = 200_000
    """Maximum number of reference cells; of more, this number is drawn at random."""
    baseline_cells: Annotated[int, Field(ge=0)] = 10_000
    """Reference cells whose counts are read, balanced by label; 0: none, and only `neighbors` is used."""
    umap_cells: Annotated[int, Field(ge=0)] = 20_000
    """Reference cells in the UMAP; 0: no UMAP."""

    @model_validator(mode="after")
    def _vectors_or_model(self) -> Self:
        if self.vectors is not None:
            for name, value, unset in (("model", self.model, None), ("surgery", self.surgery, NONE)):
                if value != unset:
                    raise ValueError(
                        f"query.vectors takes the vectors of your cells from obsm[{self.vectors!r}], and query.{name}"
                        f" ({value}) would make others; set one of them"
                    )
        return self

    @model_validator(mode="after")
    def _batches_of_surgery(self) -> Self:
        if self.surgery != NONE and not self.batch_key:
            raise ValueError(
                f"query.surgery is {self.surgery}, which needs the batches of your cells: set query.batch_key to the"
                " obs column (or columns) of the samples or donors"
            )
        if self.surgery_training.order is not None and self.surgery not in (NONE, SEQUENTIAL, COMPARE):
            raise ValueError(
                "query.surgery_training.order is only used by query.surgery: sequential and compare, and it is"
                f" {self.surgery}"
            )
        return self
