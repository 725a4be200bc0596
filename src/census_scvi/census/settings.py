"""Settings: which Census, which of its cells, which genes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, Name, ObsFilter, PathName, Share
from census_scvi.errors import UserError

# Stages that read the Census, whose result its settings change.
READ_THE_CENSUS = ("prepare", "create-latent-update", "evaluate", "publish", "map-query", "annotate")


def _tiledb(values: Any, prefix: str = "") -> Any:
    """Settings of TileDB as it takes them: dotted keys and text. The command line gives nested mappings."""
    # UserErrors, since pydantic's errors show the values, and one may be a secret.
    if values is not None and not isinstance(values, dict):
        raise UserError("census.tiledb: expected settings of TileDB and their values, as {vfs.s3.region: eu-west-1}")
    found: dict[str, Any] = {}
    for name, value in (values or {}).items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found |= _tiledb(value, f"{key}.")
        elif isinstance(value, list | None):
            raise UserError(f"census.tiledb: {key} has no single value; expected text, a number, true or false")
        else:
            found[key] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


class CensusSection(Section):
    """Which Census to read, and which of its cells."""

    changes: ClassVar[tuple[str, ...]] = READ_THE_CENSUS
    organism: Annotated[Name, Changes(*READ_THE_CENSUS, "train"), USUAL] = "homo_sapiens"
    """Organism: name of the Experiment in the Census."""
    uri: Annotated[PathName | None, USUAL] = None
    """Census to read: a local folder or s3://...; takes precedence over `version`."""
    version: Annotated[Name, USUAL] = "stable"
    """Release of CELLxGENE Census to read, e.g. 2025-11-08, stable or latest."""
    tiledb: Annotated[dict[str, str], BeforeValidator(lambda values: _tiledb(values)), Changes()] = Field(
        default_factory=dict, exclude=True, repr=False
    )
    """TileDB settings for reading the Census, e.g. {vfs.s3.region: eu-west-1}; they take precedence over AWS
    environment variables.
    """
    obs_query: Annotated[
        ObsFilter | None, Changes("prepare", "create-latent-update", "import-embedding", "publish"), USUAL
    ] = None
    """SOMA value filter: the cells to embed; null: all cells."""
    obs_query_model: Annotated[ObsFilter | None, Changes("prepare", "create-latent-update", "publish"), USUAL] = None
    """SOMA value filter: the cells, within `obs_query`, for gene selection and training; null: all of them."""


def census_named(place: str, organism: str) -> CensusSection:
    """The Census of a path or URL, or else of a release."""
    if "/" in place or Path(place).exists():
        return CensusSection(organism=organism, uri=place)
    return CensusSection(organism=organism, version=place)


class HvgSection(Section):
    """Selection of highly variable genes (seurat_v3)."""

    changes: ClassVar[tuple[str, ...]] = ("prepare",)
    top_n_hvg: Annotated[int, Field(ge=1), Changes("prepare", "evaluate"), USUAL] = 8000
    """Number of highly variable genes."""
    hvg_batch: Annotated[Columns, USUAL] = Field(default_factory=list)
    """obs columns whose combinations are the batches for gene selection; empty: one batch."""
    min_genes: Annotated[int, Field(ge=0)] = 0
    """Minimum number of genes detected in a cell (obs nnz) for gene selection and training. All cells are embedded."""
    engine: Literal["one-pass", "census"] = "one-pass"
    """Implementation: `one-pass` gives scanpy's result and reads the counts once, `census` is the code of the
    published pipeline.
    """


class GenesSection(Section):
    """Which genes are used."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "create-latent-update", "publish")
    min_cells: Annotated[int, Field(ge=0)] = 0
    """Minimum number of training cells in which a gene is detected, to be considered for selection."""
    min_share: Annotated[Share, Changes("create-latent-update", "publish", "map-query")] = 0.98
    """Minimum fraction of the model's genes that a Census must have for its cells to be embedded."""
