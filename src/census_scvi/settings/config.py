"""The whole config file: the sections of all packages, validated before any slow import."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from census_scvi.annotation.settings import AnnotateSection
from census_scvi.census.settings import READ_THE_CENSUS, CensusSection, GenesSection, HvgSection
from census_scvi.cluster.settings import ClusterSection
from census_scvi.config import run_names
from census_scvi.config.file import read_settings, typed
from census_scvi.config.flat import flatten
from census_scvi.config.library_arguments import check_training_plan, listed
from census_scvi.config.messages import describe_errors
from census_scvi.config.section import USUAL, Changes, Section, stages_changed
from census_scvi.config.stages import STAGES
from census_scvi.counts.settings import AnndataSection
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
from census_scvi.fine_tuning.settings import CostSection, FineTuneSection
from census_scvi.model.settings import ImportEmbeddingSection, ImportSection, LatentSection, ModelSection
from census_scvi.neighbors.settings import IndexSection
from census_scvi.publication.settings import GatesSection, PublishSection
from census_scvi.query.settings import QuerySection
from census_scvi.releases.settings import CompareReleasesSection
from census_scvi.report.settings import EvaluateSection
from census_scvi.search.settings import SearchSection
from census_scvi.training.settings import PlanArguments, TrainSection
from census_scvi.workspace import Artifacts
from census_scvi.workspace.settings import OutputSection


class Config(Section):
    """The whole file; docs/settings.md lists the settings."""

    census: CensusSection = CensusSection()
    hvg: HvgSection = HvgSection()
    anndata: AnndataSection = AnndataSection()
    genes: GenesSection = GenesSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    training_plan: Annotated[PlanArguments, Changes("train"), USUAL] = Field(default_factory=dict)
    """Arguments of scvi-tools' training plan and of the model's loss: lr, n_epochs_kl_warmup, max_kl_weight, ..."""
    fine_tune: FineTuneSection = FineTuneSection()
    cost: CostSection = CostSection()
    latent: LatentSection = LatentSection()
    import_model: ImportSection = ImportSection()
    import_embedding: ImportEmbeddingSection = ImportEmbeddingSection()
    gates: GatesSection = GatesSection()
    publish: PublishSection = PublishSection()
    index: IndexSection = IndexSection()
    query: QuerySection = QuerySection()
    annotate: AnnotateSection = AnnotateSection()
    evaluate: EvaluateSection = EvaluateSection()
    compare_releases: CompareReleasesSection = CompareReleasesSection()
    search: SearchSection = SearchSection()
    cluster: ClusterSection = ClusterSection()
    output: OutputSection = OutputSection()
    seed: Annotated[
        int, Field(ge=0, lt=2**32), Changes(*READ_THE_CENSUS, "train", "index", "compare-releases"), USUAL
    ] = 0
    """Seed of all random numbers: validation split, order of cells, weights, dropout, samples."""

    @field_validator("training_plan")
    @classmethod
    def _plan_of_kind(cls, arguments: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "model" in info.data:  # else the model section has an error of its own
            check_training_plan(arguments, listed(), info.data["model"].kind)
        return arguments

    @model_validator(mode="after")
    def _inputs_of_kind(self) -> Self:
        if self.model.kind == "SCANVI" and self.anndata.labels_key is None:
            raise ValueError("model.kind is SCANVI, which learns labels: set anndata.labels_key, e.g. to cell_type")
        if self.model.kind == "TOTALVI" and self.anndata.protein_measurement is None:
            raise ValueError(
                "model.kind is TOTALVI, which learns proteins: set anndata.protein_measurement to the measurement of"
                " the Census that has them, e.g. protein"
            )
        if self.model.kind != "SCANVI" and self.train.n_samples_per_label is not None:
            raise ValueError(
                f"train.n_samples_per_label is used only by SCANVI, and model.kind is {self.model.kind}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
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
            comparison=self.compare_releases.folder,
            mapped=self.query.output,
            published=self.publish.model_uri,
        )
        return self

    @cached_property
    def file(self) -> Path | None:
        """The file that it was read from, which is no part of its value; None if it was not read from a file."""
        return None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.output.directory)

    @property
    def artifacts(self) -> Artifacts:
        """Names of files and folders in the run directory."""
        return Artifacts(prepared=self.anndata.model_filename, model=self.model.filename)

    @property
    def training_filter(self) -> str | None:
        """Value filter of the training cells: `(obs_query) and (obs_query_model)`, and the minimum number of genes."""
        parts = [self.census.obs_query, self.census.obs_query_model]
        if self.hvg.min_genes:
            parts.append(f"nnz >= {self.hvg.min_genes}")
        return " and ".join(f"({part})" for part in parts if part) or None

    @property
    def tuned(self) -> Config:
        """With `fine_tune.model`, this config with the settings of its training; else the config itself."""
        if self.fine_tune.model is None:
            return self
        train, plan = self.fine_tune.training(self.train, self.training_plan)
        return self.model_copy(update={"train": train, "training_plan": plan})

    @property
    def evaluation_folder(self) -> Path:
        """Output folder of scvi-evaluate.py."""
        return Path(self.evaluate.folder) if self.evaluate.folder else self.directory / run_names.EVALUATION

    @property
    def comparison_folder(self) -> Path:
        """Output folder of scvi-compare-releases.py."""
        own = self.compare_releases.folder
        return Path(own) if own else self.directory / run_names.COMPARISON

    def of_stage(self, stage: str) -> dict[str, Any]:
        """Values of all settings that change the result of a stage, flat as in `select`."""
        runs = {stage, *(STAGES[stage].runs if stage in STAGES else ())}
        return self.select(tuple(key for key, stages in stages_changed(type(self)) if runs & {*stages}))

    def select(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Values of dotted keys or whole sections, flat: `{"hvg.top_n_hvg": 8000, ...}`."""
        flat = flatten(self.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if any(k == key or k.startswith(key + ".") for key in keys)}


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read and check a YAML file.

    Parameters
    ----------
    path
        The YAML file.
    overrides
        `section.key=value` strings that override the file; values are YAML.

    Raises
    ------
    UserError
        Missing or malformed file, unknown key, wrong type or contradictory values. The message names file and key, and
        suggests the most similar valid name.
    """
    file = Path(expand_argument(path, "--config"))
    written = read_settings(file, overrides)
    try:
        config = Config.model_validate(typed(written.values, Config))
    except ValidationError as error:
        raise UserError(describe_errors(error, Config, written.origin)) from None
    config.__dict__["file"] = file
    return config
