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
from census_scvi.config.section import Changes, Expected, Section, stages_changed
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
    """Which Census, which cells."""

    changes: ClassVar[tuple[str, ...]] = _READ_THE_CENSUS
    organism: Annotated[Name, Changes(*_READ_THE_CENSUS, "train")] = "homo_sapiens"
    """Name of the Experiment in the Census."""
    uri: PathName | None = None
    """Any SOMA Census: a local folder or s3://...; wins over `version`."""
    version: Name = "stable"
    """Release of the CELLxGENE Census, e.g. 2025-11-08, stable or latest."""
    tiledb: Annotated[dict[str, str], BeforeValidator(lambda values: _tiledb(values)), Changes()] = Field(
        default_factory=dict, exclude=True, repr=False
    )
    """TileDB settings for reading it, e.g. {vfs.s3.region: eu-west-1}; they win over the AWS environment."""
    obs_query: Annotated[ObsFilter | None, Changes("prepare", "create-latent-update", "publish")] = None
    """SOMA value filter of the cells to embed, and with `obs_query_model` to train on; null: all."""
    obs_query_model: Annotated[ObsFilter | None, Changes("prepare", "create-latent-update", "publish")] = None
    """SOMA value filter of the cells fit for gene selection and training; null: all."""


class HvgSection(Section):
    """Selection of highly variable genes (seurat_v3)."""

    changes: ClassVar[tuple[str, ...]] = ("prepare",)
    top_n_hvg: Annotated[int, Field(ge=1), Changes("prepare", "evaluate")] = 8000
    """Genes to select."""
    hvg_batch: Columns = Field(default_factory=list)
    """obs columns within whose combinations the genes are ranked; empty: one ranking."""
    min_genes: Annotated[int, Field(ge=0)] = 0
    """Cells with fewer detected genes (obs nnz) are excluded from gene selection and training, never from embedding."""
    engine: Literal["one-pass", "census"] = "one-pass"
    """Implementation: one-pass equals scanpy's and reads the counts once; census is the published pipeline's."""


class AnndataSection(Section):
    """The prepared cells."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "train")
    batch_key: Annotated[Columns, Changes("prepare", "train", "create-latent-update", "evaluate", "publish")] = Field(
        default_factory=lambda: ["dataset_id", "assay", "suspension_type", "donor_id"]
    )
    """obs columns whose combination is the batch."""
    model_filename: FileName = "anndata_model.h5ad"
    """File of the prepared cells in the run directory."""
    obs_columns: Columns | None = None
    """obs columns to keep in that file, in addition to soma_joinid and batch; null: all."""
    compression: Literal["gzip", "none"] = "gzip"
    """Of the counts in that file: none takes four times the space and a third less CPU time to read."""


class GenesSection(Section):
    """Which genes may be selected, and how many of the model's a Census must have."""

    changes: ClassVar[tuple[str, ...]] = ("prepare", "create-latent-update", "publish")
    min_cells: Annotated[int, Field(ge=0)] = 0
    """Genes detected in fewer of the training cells are excluded before highly variable ones are selected."""
    min_share: Annotated[Share, Changes("create-latent-update", "publish", "map-query")] = 0.98
    """Least share of the model's genes that a Census must have for its cells to be embedded."""


class ModelSection(Section):
    """The scVI model."""

    changes: ClassVar[tuple[str, ...]] = ("train", "publish")
    filename: Annotated[FileName, Changes("train", "create-latent-update", "publish")] = "scvi.model"
    """Folder of the trained model in the run directory."""
    n_hidden: Annotated[int, Field(ge=1)] = 128
    """Hidden units per layer."""
    n_latent: Annotated[int, Field(ge=1)] = 10
    """Dimensions of the latent space."""
    n_layers: Annotated[int, Field(ge=1)] = 1
    """Hidden layers of encoder and decoder."""
    dropout_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout of the encoder."""
    gene_likelihood: Literal["nb", "zinb", "poisson"] = "nb"
    """Distribution of the counts."""
    encode_covariates: bool = False
    """Whether the encoder sees the batch; false: a cell of any batch can be embedded."""


class TrainSection(Section):
    """Training."""

    changes: ClassVar[tuple[str, ...]] = ("train",)
    max_epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the training cells."""
    batch_size: Annotated[int, Field(ge=2)] = 1024
    """Cells per minibatch (and device)."""
    train_size: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of cells trained on; the rest validates."""
    early_stopping: bool = False
    """Stop when elbo_validation no longer falls (patience and others: `train.trainer`)."""
    multi_gpu: bool = False
    """Train on several `devices` (Lightning DDP)."""
    num_workers: Annotated[int, Field(ge=0), Changes()] = 1
    """Read-ahead workers of the loader; 0: read between training steps."""
    devices: Annotated[Devices, Expected("a number of devices, a list of device indices such as [0, 1], or auto")] = (
        "auto"
    )
    """With `multi_gpu`: how many devices, or which; otherwise one device is used."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], Changes()] = "auto"
    """Kind of device."""
    engine: Annotated[Literal["fast", "scvi-tools"], Changes()] = "fast"
    """Implementation of the training step: `fast` computes the same loss and gradients in a fraction of the time."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the matrix products: bf16 and fp16 are faster where the hardware has them, and give other numbers."""
    checkpoint_minutes: Annotated[float, Field(ge=0.0), Changes()] = 10.0
    """Minutes between checkpoints within an epoch, to resume a killed training from; each epoch ends with one."""
    trainer: dict[str, Any] | None = None
    """More arguments of Lightning's Trainer, e.g. gradient_clip_val."""


class LatentSection(Section):
    """Embedding of all cells."""

    changes: ClassVar[tuple[str, ...]] = ("create-latent-update",)
    block_size: Annotated[int, Field(ge=1)] = 4096
    """Cells read, embedded and written at a time."""
    minified: Literal["all", "sample", "none"] = "all"
    """Cells in final_scvi_optimized: all, a random sample, or no such folder."""
    sample_size: Annotated[int, Field(ge=1)] = 10000
    """Cells of the sample."""


class GatesSection(Section):
    """What an embedding must show before it is published."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    sample_size: Annotated[int, Field(ge=2)] = 2000
    """Random cells that are read again and embedded by scvi-tools; the sealed sample."""
    max_difference: Annotated[float, Field(gt=0.0)] = 1e-5
    """Largest difference of an embedding from the same cell's, computed by scvi-tools or for a copy of it."""
    min_variance: Annotated[float, Field(gt=0.0)] = 1e-6
    """Least variance of a latent dimension over the cells."""
    min_active_units: Share = 0.1
    """Least share of the dimensions whose posterior is narrower than the prior."""
    max_correlation: Share = 0.99
    """Largest correlation of two dimensions."""
    min_effective_rank: Annotated[float, Field(ge=1.0)] = 2.0
    """Least number of dimensions that the cells fill (exp of the entropy of the covariance's eigenvalues)."""
    max_elbo_fall: Annotated[float, Field(gt=0.0)] = 0.02
    """Largest fall of the validation ELBO over the last fifth of the epochs, as a share of it, after training."""
    max_elbo_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """Largest share by which the ELBO of the validation cells exceeds that of the training cells."""
    label: Name = "cell_type"
    """obs column of the cell types, for the warnings."""
    waived: dict[StoppingGate, Name] = Field(default_factory=dict)
    """Gates that may fail, each with the reason, which is published: `{order: copies were deduplicated}`."""

    @property
    def reasons(self) -> dict[str, str]:
        """`waived`, by plain names."""
        return {str(name): reason for name, reason in self.waived.items()}


class ContactSection(Section):
    """Whom to ask."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    name: str = ""
    """Name."""
    email: str = ""
    """Mail address."""
    affiliation: str = ""
    """Institution."""


class PublishSection(Section):
    """Where and under which name the embedding is published."""

    changes: ClassVar[tuple[str, ...]] = ("publish",)
    experiment_uri: PathName | None = None
    """The SOMA Experiment; null: the organism's in the Census of this run, where that is a local one."""
    name: MemberName = "scvi"
    """Name of the embedding in obsm."""
    replace: bool = False
    """Whether an embedding of that name may be replaced."""
    model_uri: PathName | None = None
    """Folder or URL (any that fsspec writes to) for the model; null: `published` in the run directory."""
    title: Name | None = None
    """Title; null: made of what the data are, for instance `scVI embedding of CELLxGENE Census`."""
    description: str = ""
    """What it is, for the reader of a catalogue."""
    license: str = ""
    """Licence of embedding and model, e.g. CC-BY-4.0."""
    doi: str = ""
    """DOI of a paper or data set that describes it."""
    contact: ContactSection = ContactSection()
    """Who publishes it, and whom to ask."""


class QuerySection(Section):
    """A user's own cells, for scvi-map-query.py."""

    changes: ClassVar[tuple[str, ...]] = ("map-query",)
    file: LocalPath | None = None
    """The .h5ad with the cells: raw counts, genes by Ensembl id or symbol."""
    output: Annotated[LocalPath | None, Changes()] = None
    """The .h5ad to write: the same with embedding, map and predicted labels; null: `<file>-mapped.h5ad`."""
    model: PathName | None = None
    """Published folder or its URL; null: the run directory."""
    embedding: PathName | None = None
    """Of the Census' cells: a name in its obsm, a run directory or an Experiment; null: `scvi`, or the run's."""
    counts: Name | None = None
    """Where the raw counts are: X, raw or layers/<name>; null: found, and refused where several may be."""
    min_share: Share = 0.8
    """Least share of the model's genes that the file must have; fewer do where the others hardly hold counts."""
    labels: Columns = Field(default_factory=lambda: ["cell_type"])
    """obs columns of the Census to predict; empty: none."""
    obs_filter: ObsFilter | None = None
    """SOMA value filter of the cells to learn from; null: all."""
    reference_cells: Annotated[int, Field(ge=100)] = 200_000
    """Reference cells to learn from; of more, this number is drawn at random."""
    method: Literal["neighbors", "random_forest", "logistic_regression"] = "neighbors"
    """Classifier that predicts labels from the embedding."""
    n_neighbors: Annotated[int, Field(ge=1)] = 15
    """Nearest reference cells that vote on a cell's label."""
    baseline_cells: Annotated[int, Field(ge=0)] = 10_000
    """Reference cells whose counts train the baseline annotation, without the model; 0: no baseline."""
    umap_cells: Annotated[int, Field(ge=0)] = 20_000
    """Reference cells on the map; 0: no map."""


class EvaluateSection(Section):
    """What scvi-evaluate.py measures."""

    changes: ClassVar[tuple[str, ...]] = ("evaluate",)
    embeddings: dict[Name, PathName] = Field(default_factory=dict)
    """Name in the report, and a name in the Census' obsm, a run directory or an Experiment; {}: the run's."""
    obs_filter: ObsFilter | None = "is_primary_data == True"
    """SOMA value filter of the cells; null: all."""
    labels: Columns = Field(default_factory=lambda: ["cell_type"])
    """obs columns that should be kept; cell_class and cell_subclass are made with the Cell Ontology."""
    batches: Columns = Field(default_factory=lambda: ["dataset_id", "assay", "batch"])
    """obs columns that should be mixed; batch: those of `anndata.batch_key` together."""
    donors: Name | None = "donor_id"
    """obs column whose groups are held out and resampled (for intervals) as a whole; null: single cells are."""
    mode: Literal["sound", "legacy"] = "sound"
    """The metrics, or the published script's with their flaws."""
    max_cells: Annotated[int, Field(ge=100)] = 100_000
    """Cells of the slice; of more, this number is drawn at random."""
    measured_cells: Annotated[int, Field(ge=100)] = 10_000
    """Cells of the slice that are measured and drawn on the maps; entropy takes neighbours among all of it."""
    baseline: bool = True
    """Whether a PCA of log-normalised counts is evaluated, too."""
    folder: Annotated[LocalPath | None, Changes()] = None
    """Where metrics.json and report.html are written; null: `evaluation` in the run directory."""


class OutputSection(Section):
    """Where the run is written."""

    changes: ClassVar[tuple[str, ...]] = ()
    directory: LocalPath = "run"
    """The run directory; relative paths count from the current folder."""


class Config(Section):
    """The whole file; see `README.md` for the table of settings."""

    census: CensusSection = CensusSection()
    hvg: HvgSection = HvgSection()
    anndata: AnndataSection = AnndataSection()
    genes: GenesSection = GenesSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    training_plan: Annotated[dict[str, Any], Changes("train")] = Field(default_factory=dict)
    """Arguments of scvi-tools' TrainingPlan and of the model's loss: lr, n_epochs_kl_warmup, max_kl_weight, ..."""
    latent: LatentSection = LatentSection()
    gates: GatesSection = GatesSection()
    publish: PublishSection = PublishSection()
    query: QuerySection = QuerySection()
    evaluate: EvaluateSection = EvaluateSection()
    output: OutputSection = OutputSection()
    seed: Annotated[int, Field(ge=0, lt=2**32), Changes(*_READ_THE_CENSUS, "train")] = 0
    """Seed of everything random: split, order of cells, weights, dropout, sampling."""

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
