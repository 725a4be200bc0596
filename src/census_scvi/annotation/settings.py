"""Settings: annotation of a user's cells."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Columns, LocalPath, Name, ObsFilter

Method = Literal[
    "consensus", "fast", "neighbors", "pca", "harmony", "joint", "logistic_regression", "linear_svm", "random_forest",
    "scanvi", "scnym", "model",
]  # fmt: skip
# Overrides of all methods but scnym, which has hyper-parameters of its own instead of `steps`.
NUMBERS = ("steps", "n_neighbors")
Preset = Literal["no_new_identity", "new_identity_discovery", "supervised", "default"]


def _columns(names: Any) -> Any:
    """A single name as a list."""
    return [names] if isinstance(names, str) else names


def _arguments(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, if the arguments of all methods are whole numbers."""
    for name in NUMBERS:
        value = overrides.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PydanticCustomError(
                "argument", "{name} is {value}; expected a whole number of 1 or more", {"name": name, "value": value}
            )
    return overrides


class ReferenceSection(Section):
    """The labelled cells."""

    changes: ClassVar[tuple[str, ...]] = ("annotate",)
    file: Annotated[LocalPath | None, USUAL] = None
    """Labelled cells, in any format of `query.file`; null: cells of the Census (`census.uri` or `census.version`). If
    it is `query.file`, its cells with a label are the reference, and those without ("Unlabeled", empty) are annotated.
    """
    labels: Annotated[Columns | None, BeforeValidator(_columns)] = None
    """obs columns of the labels in the reference, one for each in `query.labels`; null: the same names."""
    counts: Name | None = None
    """Where the raw counts of `file` are, as `query.counts`."""
    values: Literal["counts", "log_normalized"] = "counts"
    """What `file` holds, as `query.values`."""
    batch_key: Columns | None = None
    """obs columns whose combinations are the studies of the reference; each is held out once. null: dataset_id, or
    donor_id if there is one dataset.
    """
    obs_filter: Annotated[ObsFilter | None, USUAL] = None
    """Value filter of the labelled cells, e.g. tissue == 'blood' and is_primary_data == True; null: all."""
    cells_per_type: Annotated[int | None, Field(ge=2)] = None
    """Maximum number of cells of each label, drawn at random; null: 500 of the Census, and no maximum in a file."""
    max_cells: Annotated[int, Field(ge=100)] = 20_000
    """Maximum number of labelled cells; of more, this number is drawn, the same share of every label."""
    n_top_genes: Annotated[int | None, Field(ge=50)] = 2_000
    """Number of genes: the most variable ones of the labelled cells (seurat_v3, ranked by study), of those that both
    have; null: all.
    """


class BudgetSection(Section):
    """Limits of the training that a method needs."""

    changes: ClassVar[tuple[str, ...]] = ("annotate", "map-query")
    cpu_seconds: Annotated[int | None, Field(ge=1)] = None
    """CPU time for training, in seconds (about; without a GPU); null: the method's default."""
    epochs: Annotated[int | None, Field(ge=1)] = None
    """Passes over the cells in training; null: the method's default."""


class AnnotateSection(Section):
    """Annotation of your cells with the labels of a reference (annotate; method and budget also map-query)."""

    changes: ClassVar[tuple[str, ...]] = ("annotate",)
    action: Annotated[Literal["predict", "train", "interpret"], Changes()] = "predict"
    """What to do, also given as the first argument: annotate the cells; train and save a classifier (`scnym`); list the
    genes by which it recognises `target`.
    """
    method: Annotated[Method, Changes("annotate", "map-query"), USUAL] = "consensus"
    """Method: consensus (several methods, one of them trained), fast (without training), or a single method; only
    neighbors uses the model's embedding, and model the classifier of a SCANVI model.
    """
    preset: Annotated[Preset, Changes("annotate", "map-query")] = "no_new_identity"
    """Hyper-parameters of `scnym`: all cells are of known types, or some may be of new types, or supervised."""
    overrides: Annotated[dict[str, Any], AfterValidator(_arguments), Changes("annotate", "map-query")] = Field(
        default_factory=dict
    )
    """Arguments that replace the method's defaults: `n_neighbors` (10), `steps` of training (1000), and
    hyper-parameters of `scnym`.
    """
    budget: BudgetSection = BudgetSection()
    reference: ReferenceSection = ReferenceSection()
    key_added: Name | None = None
    """Additional columns with scNym's names: obs[key], obs[key + "_confidence"], uns[key + "_probabilities"],
    obsm["X_" + key.lower()].
    """
    model: LocalPath | None = None
    """Folder of the trained classifier (`scnym`); null: `<query.output>-model`."""
    target: Annotated[Name | None, Changes()] = None
    """Label to explain (interpret)."""
    source: Annotated[Name, Changes()] = "all"
    """Label with which `target` is compared, or all others (interpret)."""
