"""Settings: the model, and the embedding of all cells with it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from census_scvi.config.library_arguments import check_model_arguments, listed
from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import FileName, LocalPath, Name, PathName


class ModelSection(Section):
    """The model."""

    changes: ClassVar[tuple[str, ...]] = ("train", "publish")
    filename: Annotated[FileName, Changes("train", "create-latent-update", "publish")] = "scvi.model"
    """Name of the folder of the trained model in the run directory."""
    kind: Annotated[Literal["SCVI", "SCANVI", "TOTALVI"], USUAL] = "SCVI"
    """Model of scvi-tools: SCVI; SCANVI, which also learns labels (`anndata.labels_key`); TOTALVI, which also learns
    proteins (`anndata.protein_measurement`).
    """
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
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model in scvi-tools: use_layer_norm, use_batch_norm, deeply_inject_covariates, ..."""
    from_scvi_model: Annotated[PathName | None, Changes("train")] = None
    """Trained SCVI model from whose weights SCANVI starts (run directory, its model, published folder or URL); null:
    random weights.
    """

    @model_validator(mode="after")
    def _of_kind(self) -> Self:
        check_model_arguments(self.arguments, listed(), self.kind)
        if self.kind == "TOTALVI" and self.gene_likelihood == "poisson":
            raise ValueError("model.gene_likelihood is poisson, which TOTALVI does not have; set it to nb or zinb")
        if self.from_scvi_model is not None and self.kind != "SCANVI":
            raise ValueError(f"model.from_scvi_model is used only by SCANVI, and model.kind is {self.kind}; remove it")
        return self


class LatentSection(Section):
    """Embedding of all cells."""

    changes: ClassVar[tuple[str, ...]] = ("create-latent-update",)
    block_size: Annotated[int, Field(ge=1)] = 4096
    """Cells that are read, embedded and written at a time."""
    minified: Annotated[Literal["all", "sample", "none"], USUAL] = "all"
    """Cells in final_scvi_optimized: all, a random sample, or no such folder."""
    sample_size: Annotated[int, Field(ge=1)] = 10000
    """Cells in that sample."""


class ImportEmbeddingSection(Section):
    """Import of an embedding of any model (import-embedding)."""

    changes: ClassVar[tuple[str, ...]] = ("import-embedding",)
    vectors: Annotated[PathName | None, Changes()] = None
    """.npy file of floats (cells, dimensions), or a SOMA array, such as an embedding that CELLxGENE publishes."""
    joinids: Annotated[LocalPath | None, Changes()] = None
    """.npy file with the soma_joinid of each row of the vectors; not for a SOMA array."""
    method: Name = "embedding"
    """Name of the model for reports, e.g. TranscriptFormer."""

    @property
    def is_file(self) -> bool:
        """Whether the vectors are a .npy file."""
        return str(self.vectors).endswith(".npy")


class ImportSection(Section):
    """Import of a model that scvi-tools saved (import-model)."""

    changes: ClassVar[tuple[str, ...]] = ()
    folder: LocalPath | None = None
    """Folder in which `model.save` of scvi-tools wrote: SCVI, SCANVI or TOTALVI."""
    output: LocalPath | None = None
    """Folder to write the imported model to."""
    trust: bool = False
    """Whether to load the pickle in the folder, which executes any code that its author put into it."""
    gene_map: LocalPath | None = None
    """TSV of ensembl_id and symbol, as for build-census; null: the genes keep their names and have no symbols."""
