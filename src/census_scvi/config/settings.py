"""Every setting of the YAML file: typed, documented and checked once, before anything heavy is imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from census_scvi.config import run_names
from census_scvi.config.file import read_settings, typed
from census_scvi.config.messages import describe_errors
from census_scvi.config.names import check_trainer, check_training_plan, listed
from census_scvi.config.section import USUAL, Changes, Expected, Section, stages_changed
from census_scvi.config.types import Columns, FileName, LocalPath, MemberName, Name, ObsFilter, PathName, Share
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument


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


StoppingGate = Literal[
    "cells", "finite", "variance", "duplicate_dimensions", "effective_rank", "genes", "counts", "architecture",
    "re_embedding", "order", "active_units", "overfitting",
]  # fmt: skip
Devices = int | list[int] | Literal["auto"]
_READ_THE_CENSUS = ("prepare", "create-latent-update", "evaluate", "publish", "map-query")


class CensusSection(Section):
    """Which Census to read, and which of its cells."""

    changes: ClassVar[tuple[str, ...]] = _READ_THE_CENSUS
    organism: Annotated[Name, Changes(*_READ_THE_CENSUS, "train"), USUAL] = "homo_sapiens"
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
    obs_query: Annotated[ObsFilter | None, Changes("prepare", "create-latent-update", "publish"), USUAL] = None
    """SOMA value filter: the cells to embed; null: all cells."""
    obs_query_model: Annotated[ObsFilter | None, Changes("prepare", "create-latent-update", "publish"), USUAL] = None
    """SOMA value filter: the cells, within `obs_query`, for gene selection and training; null: all of them."""


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


class AnndataSection(Section):
    """The file of cells that the model is trained on."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "train")
    batch_key: Annotated[Columns, Changes("prepare", "train", "create-latent-update", "evaluate", "publish"), USUAL] = (
        Field(default_factory=lambda: ["dataset_id", "assay", "suspension_type", "donor_id"])
    )
    """obs columns whose combination is the batch."""
    model_filename: FileName = "anndata_model.h5ad"
    """Name of the file of training cells in the run directory."""
    obs_columns: Columns | None = None
    """obs columns to keep in that file, in addition to soma_joinid and batch; null: all."""
    compression: Literal["gzip", "none"] = "gzip"
    """Compression of the counts. `none` needs four times the disk space and a third less CPU time to read."""


class GenesSection(Section):
    """Which genes are used."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "create-latent-update", "publish")
    min_cells: Annotated[int, Field(ge=0)] = 0
    """Minimum number of training cells in which a gene is detected, to be considered for selection."""
    min_share: Annotated[Share, Changes("create-latent-update", "publish", "map-query")] = 0.98
    """Minimum fraction of the model's genes that a Census must have for its cells to be embedded."""


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


class TrainSection(Section):
    """Training."""

    changes: ClassVar[tuple[str, ...]] = ("train",)
    max_epochs: Annotated[int, Field(ge=1), USUAL] = 100
    """Maximum number of epochs."""
    batch_size: Annotated[int, Field(ge=2), USUAL] = 1024
    """Cells per minibatch and device."""
    train_size: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Fraction of the cells to train on; the others are for validation."""
    early_stopping: Annotated[bool, USUAL] = False
    """Stop when elbo_validation no longer improves (patience and others: `train.trainer`)."""
    multi_gpu: Annotated[bool, USUAL] = False
    """Train on several `devices` (Lightning DDP)."""
    num_workers: Annotated[int, Field(ge=0), Changes()] = 1
    """Workers that read minibatches ahead; 0: read between training steps."""
    devices: Annotated[
        Devices, Expected("a number of devices, a list of device indices such as [0, 1], or auto"), USUAL
    ] = "auto"
    """With `multi_gpu`: number or indices of the devices; otherwise one device is used."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], Changes()] = "auto"
    """Type of device."""
    engine: Annotated[Literal["fast", "scvi-tools"], Changes()] = "fast"
    """Implementation of the training step: `fast` computes the same loss and gradients as `scvi-tools` in a fraction
    of the time.
    """
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of matrix products. `bf16` and `fp16` are faster on hardware that supports them, and change the
    numbers.
    """
    checkpoint_minutes: Annotated[float, Field(ge=0.0), Changes()] = 10.0
    """Minutes between checkpoints within an epoch, from which a killed training resumes; each epoch ends with one."""
    trainer: dict[str, Any] | None = None
    """More arguments of Lightning's Trainer, e.g. gradient_clip_val."""


class LatentSection(Section):
    """Embedding of all cells."""

    changes: ClassVar[tuple[str, ...]] = ("create-latent-update",)
    block_size: Annotated[int, Field(ge=1)] = 4096
    """Cells that are read, embedded and written at a time."""
    minified: Annotated[Literal["all", "sample", "none"], USUAL] = "all"
    """Cells in final_scvi_optimized: all, a random sample, or no such folder."""
    sample_size: Annotated[int, Field(ge=1)] = 10000
    """Cells in that sample."""


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
    replace: bool = False
    """Whether to replace an embedding of that name."""
    model_uri: PathName | None = None
    """Folder or URL (any that fsspec can write to) for the model; null: `published` in the run directory."""
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


class QuerySection(Section):
    """Your own cells (map-query)."""

    changes: ClassVar[tuple[str, ...]] = ("map-query",)
    file: Annotated[LocalPath | None, USUAL] = None
    """Your cells: an .h5ad file with raw counts, genes by Ensembl id or symbol."""
    output: Annotated[LocalPath | None, Changes(), USUAL] = None
    """The .h5ad to write: your cells with embedding, UMAP and predicted labels; null: `<file>-mapped.h5ad`."""
    model: Annotated[PathName | None, USUAL] = None
    """Published model: a folder or URL; null: the model in the run directory."""
    embedding: PathName | None = None
    """Embedding of the reference cells: a name in the obsm of the Census, a run directory or an Experiment; null:
    `scvi`, or the run's.
    """
    counts: Name | None = None
    """Where the raw counts are: X, raw or layers/<name>; null: detected, and an error where several places may hold
    them.
    """
    min_share: Share = 0.8
    """Minimum fraction of the model's genes that your file must have; fewer are accepted where the others have few
    counts.
    """
    labels: Annotated[Columns, USUAL] = Field(default_factory=lambda: ["cell_type"])
    """obs columns of the Census to predict; empty: none."""
    obs_filter: ObsFilter | None = None
    """SOMA value filter of the reference cells; null: all."""
    reference_cells: Annotated[int, Field(ge=100)] = 200_000
    """Maximum number of reference cells; of more, this number is drawn at random."""
    method: Literal["neighbors", "random_forest", "logistic_regression"] = "neighbors"
    """Classifier that predicts labels from the embedding."""
    n_neighbors: Annotated[int, Field(ge=1)] = 15
    """Nearest reference cells that vote on the label of a cell (`neighbors`)."""
    baseline_cells: Annotated[int, Field(ge=0)] = 10_000
    """Reference cells for a baseline annotation from counts alone, to compare with; 0: no baseline."""
    umap_cells: Annotated[int, Field(ge=0)] = 20_000
    """Reference cells in the UMAP; 0: no UMAP."""


class EvaluateSection(Section):
    """Metrics of embeddings (evaluate)."""

    changes: ClassVar[tuple[str, ...]] = ("evaluate",)
    embeddings: Annotated[dict[Name, PathName], USUAL] = Field(default_factory=dict)
    """Embeddings to evaluate. Name in the report: a name in the obsm of the Census, a run directory or an Experiment;
    {}: the run's.
    """
    obs_filter: ObsFilter | None = "is_primary_data == True"
    """SOMA value filter of the cells to evaluate on; null: all."""
    labels: Annotated[Columns, USUAL] = Field(default_factory=lambda: ["cell_type"])
    """obs columns that the embedding should preserve; cell_class and cell_subclass are derived with the Cell Ontology.
    """
    batches: Annotated[Columns, USUAL] = Field(default_factory=lambda: ["dataset_id", "assay", "batch"])
    """obs columns that should be mixed; batch: those of `anndata.batch_key` combined."""
    donors: Name | None = "donor_id"
    """obs column whose groups are held out and resampled (for confidence intervals) as a whole; null: single cells
    are.
    """
    mode: Literal["sound", "legacy"] = "sound"
    """`sound`, or `legacy`: the metrics as the published script computes them."""
    max_cells: Annotated[int, Field(ge=100)] = 100_000
    """Maximum number of cells; of more, this number is drawn at random."""
    measured_cells: Annotated[int, Field(ge=100)] = 10_000
    """Cells for the metrics and maps; entropy uses neighbors among all `max_cells`."""
    baseline: bool = True
    """Whether to evaluate a PCA of log-normalized counts, too."""
    folder: Annotated[LocalPath | None, Changes()] = None
    """Folder for metrics.json and report.html; null: `evaluation` in the run directory."""


class OutputSection(Section):
    """Where the results are written."""

    changes: ClassVar[tuple[str, ...]] = ()
    directory: Annotated[LocalPath, USUAL] = "run"
    """Run directory; a relative path starts at the current folder."""


class Config(Section):
    """The whole file; docs/settings.md lists the settings."""

    census: CensusSection = CensusSection()
    hvg: HvgSection = HvgSection()
    anndata: AnndataSection = AnndataSection()
    genes: GenesSection = GenesSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    training_plan: Annotated[dict[str, Any], Changes("train"), USUAL] = Field(default_factory=dict)
    """Arguments of scvi-tools' TrainingPlan and of the model's loss: lr, n_epochs_kl_warmup, max_kl_weight, ..."""
    latent: LatentSection = LatentSection()
    gates: GatesSection = GatesSection()
    publish: PublishSection = PublishSection()
    query: QuerySection = QuerySection()
    evaluate: EvaluateSection = EvaluateSection()
    output: OutputSection = OutputSection()
    seed: Annotated[int, Field(ge=0, lt=2**32), Changes(*_READ_THE_CENSUS, "train"), USUAL] = 0
    """Seed of all random numbers: validation split, order of cells, weights, dropout, samples."""

    @model_validator(mode="before")
    @classmethod
    def _empty_plan(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("training_plan", {}) is None:
            return {**values, "training_plan": {}}
        return values

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        train = self.train
        if not self.anndata.batch_key:
            raise ValueError("anndata.batch_key is empty; name at least one obs column, for instance [dataset_id]")
        if train.early_stopping and train.train_size == 1.0:
            raise ValueError(
                "train.early_stopping needs validation cells and train.train_size is 1.0;"
                " set train.train_size below 1 or train.early_stopping to false"
            )
        names = (self.anndata.model_filename, self.model.filename)
        if run_names.same_name(names[0]) == run_names.same_name(names[1]):
            both = f"are both {names[0]!r}" if names[0] == names[1] else f"are the same name, {names[0]!r}"
            raise ValueError(f"anndata.model_filename and model.filename {both}")
        run_names.check_places(
            self.output.directory,
            names,
            census=self.census.uri,
            experiment=self.publish.experiment_uri,
            evaluation=self.evaluate.folder,
            mapped=self.query.output,
            published=self.publish.model_uri,
        )
        check_trainer(train.trainer or {}, listed())
        check_training_plan(self.training_plan, listed())
        return self

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output.directory)

    @property
    def evaluation_folder(self) -> Path:
        """Where scvi-evaluate.py writes."""
        return Path(self.evaluate.folder) if self.evaluate.folder else self.directory / run_names.EVALUATION

    def of_stage(self, stage: str) -> dict[str, Any]:
        """Values of all settings that change the result of a stage, flat, as `select` gives them."""
        return self.select(tuple(key for key, stages in stages_changed(type(self)) if stage in stages))

    def select(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Values of dotted keys or whole sections, flat: `{"hvg.top_n_hvg": 8000, ...}`."""
        flat = flatten(self.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if any(k == key or k.startswith(key + ".") for key in keys)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping as dotted keys; an empty mapping stays a value, so that it differs from an absent one."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(values: Any) -> str:
    """SHA-256 of any JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read and check a YAML file.

    Parameters
    ----------
    path
        The YAML file.
    overrides
        `section.key=value` strings that win over the file; values are YAML.

    Raises
    ------
    UserError
        Missing or malformed file, unknown key, wrong type or contradiction: file, key and nearest right name.
    """
    written = read_settings(Path(expand_argument(path, "--config")), overrides)
    try:
        return Config.model_validate(typed(written.values, Config))
    except ValidationError as error:
        raise UserError(describe_errors(error, Config, written.origin)) from None
