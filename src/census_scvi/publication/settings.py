"""Settings: the gates, and where an embedding is published."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from census_scvi.config.section import USUAL, Section
from census_scvi.config.types import MemberName, Name, PathName, Precision, Share

StoppingGate = Literal[
    "cells", "finite", "variance", "duplicate_dimensions", "effective_rank", "genes", "counts", "architecture",
    "re_embedding", "order", "active_units", "overfitting", "drift",
]  # fmt: skip


class GatesSection(Section):
    """Checks that an embedding must pass before it is published."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    sample_size: Annotated[int, Field(ge=2)] = 2000
    """Random cells that are read again and embedded with scvi-tools; they are published with the model."""
    max_difference: Annotated[float, Field(gt=0.0)] = 1e-5
    """Maximum difference between a cell's embedding and scvi-tools', or that of an identical cell."""
    min_variance: Annotated[float, Field(gt=0.0)] = 1e-6
    """Minimum variance of a latent dimension across cells."""
    min_active_units: Share = 0.1
    """Minimum fraction of the dimensions whose posterior is narrower than the prior."""
    max_correlation: Share = 0.99
    """Maximum correlation of two dimensions."""
    min_effective_rank: Annotated[float, Field(ge=1.0)] = 2.0
    """Minimum effective rank of the latent space (exp of the entropy of the covariance's eigenvalues)."""
    max_elbo_fall: Annotated[float, Field(gt=0.0)] = 0.02
    """Maximum decrease of elbo_validation (a loss) over the last fifth of the epochs, as a fraction of it; more: not
    converged.
    """
    max_elbo_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """Maximum fraction by which elbo_validation exceeds elbo_train (losses); more: overfitting."""
    min_label_stability: Share = 0.8
    """Minimum label stability compared with the earlier release, where scvi-compare-releases.py measured it."""
    drift_stops: bool = False
    """Whether a lower label stability, or none that was measured, stops publishing; false: a warning."""
    label: Name = "cell_type"
    """obs column of the cell types, for warnings about their separation and the mixing of batches."""
    waived: dict[StoppingGate, Name] = Field(default_factory=dict)
    """Gates that may fail, each with the reason, which is published: `{order: copies were deduplicated}`."""

    @property
    def reasons(self) -> dict[str, str]:
        """`waived`, by plain names."""
        return {str(name): reason for name, reason in self.waived.items()}


class ContactSection(Section):
    """Whom to contact."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    name: str = ""
    """Name of the contact."""
    email: str = ""
    """Email address of the contact."""
    affiliation: str = ""
    """Institution of the contact."""


class PublishSection(Section):
    """Where and under which name the embedding is published."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    experiment_uri: PathName | None = None
    """SOMA Experiment to write to; null: that of the organism in the Census of the run, where that is a local one."""
    name: Annotated[MemberName, USUAL] = "scvi"
    """Name of the embedding in obsm."""
    form: Literal["obsm", "array", "both"] = "obsm"
    """Where the embedding is written: `obsm` of the Experiment; an `array` of its own (`array_uri`), the form in which
    CELLxGENE carries community embeddings, which needs no Experiment that you may write to; or both."""
    array_uri: PathName | None = None
    """Folder or URL of that array."""
    precision: Precision = "float32"
    """Precision of that array: bfloat16 keeps 7 bits of the mantissa, as CELLxGENE's arrays do, and takes less space;
    obsm has float32."""
    replace: bool = False
    """Whether to replace an embedding of that name."""
    model_uri: PathName | None = None
    """Folder or URL (any that fsspec can write to) for the model; null: `published` in the run directory."""
    predictive_cells: Annotated[int, Field(ge=0)] = 1000
    """Cells for training, and as many for validation, for posterior predictive checks: the card says how well counts
    that the model generates agree with the measured ones; 0: none."""
    title: Annotated[Name | None, USUAL] = None
    """Title; null: generated, for instance `scVI embedding of CELLxGENE Census`."""
    description: str = ""
    """Description for readers of a catalogue."""
    license: str = ""
    """License of embedding and model, e.g. CC-BY-4.0."""
    doi: str = ""
    """DOI of a paper or data set that describes the embedding."""
    contact: ContactSection = ContactSection()
    """Who publishes it, and whom to ask."""

    @property
    def in_obsm(self) -> bool:
        """Whether obsm is written."""
        return self.form != "array"

    @model_validator(mode="after")
    def _array(self) -> Self:
        if (self.form == "obsm") != (self.array_uri is None):
            raise ValueError(
                f"form is {self.form}, and array_uri is {self.array_uri or 'not set'}: an array of its own needs both"
                " form: array (or both) and array_uri"
            )
        return self
