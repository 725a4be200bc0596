"""Settings: the index for the search of nearest cells."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from census_scvi.config.section import Kind, Section
from census_scvi.config.types import Share

Metric = Literal["euclidean", "cosine"]


def _euclidean() -> list[Metric]:
    return ["euclidean"]


def _distinct(metrics: list[Metric]) -> list[Metric]:
    if not metrics or len(set(metrics)) < len(metrics):
        raise PydanticCustomError("metrics", "expected euclidean, cosine or both, each once")
    return metrics


class IndexSection(Section):
    """The index with which the nearest cells of all embedded cells are found."""

    changes: ClassVar[tuple[str, ...]] = ("index",)
    metrics: Annotated[list[Metric], AfterValidator(_distinct), Kind("list of euclidean and cosine")] = Field(
        default_factory=_euclidean
    )
    """Distances, each with an index of its own. `cosine`: of vectors that are scaled to length 1."""
    partitions: Annotated[int, Field(ge=1)] | None = None
    """Partitions that the cells are divided into (clusters of k-means); null: the square root of their number."""
    nprobe: Annotated[int, Field(ge=1)] = 100
    """Partitions that are searched for each query: more are slower and more accurate. It is also the default of
    `cellxgene_census`."""
    min_recall: Share = 0.95
    """Minimum recall at 10 with `nprobe`, compared with exact search; an index below it is not written."""
    measured_cells: Annotated[int, Field(ge=1)] = 1000
    """Random cells whose neighbors are searched to measure the recall; a cell is not its own neighbor."""
