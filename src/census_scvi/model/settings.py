"""Settings: the model, and the embedding of all cells with it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import FileName


class ModelSection(Section):
    """The scVI model."""

    changes: ClassVar[tuple[str, ...]] = ("train", "publish")
    filename: Annotated[FileName, Changes("train", "create-latent-update", "publish")] = "scvi.model"
    """Name of the folder of the trained model in the run directory."""
    n_hidden: Annotated[int, Field(ge=1), USUAL] = 128
    """Hidden units per layer."""
    n_latent: Annotated[int, Field(ge=1), USUAL] = 10
    """Dimensions of the latent space."""
    n_layers: Annotated[int, Field(ge=1), USUAL] = 1
    """Hidden layers of encoder and decoder."""
    dropout_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout rate of the encoder."""
    gene_likelihood: Literal["nb", "zinb", "poisson"] = "nb"
    """Distribution of the counts."""
    encode_covariates: bool = False
    """Whether the encoder gets the batch. With `false`, cells of any batch can be embedded."""


class LatentSection(Section):
    """Embedding of all cells."""

    changes: ClassVar[tuple[str, ...]] = ("create-latent-update",)
    block_size: Annotated[int, Field(ge=1)] = 4096
    """Cells that are read, embedded and written at a time."""
    minified: Annotated[Literal["all", "sample", "none"], USUAL] = "all"
    """Cells in final_scvi_optimized: all, a random sample, or no such folder."""
    sample_size: Annotated[int, Field(ge=1)] = 10000
    """Cells in that sample."""
