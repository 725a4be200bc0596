"""List of all stages, from which scripts, `census-scvi`, help, messages, locks and records are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from census_scvi.config.run_names import CHECKPOINT, GENES, PROGRESS


@dataclass(frozen=True)
class Stage:
    """A stage, which `scvi-NAME.py` and `census-scvi NAME` run. The settings define which of them change its result.

    Attributes
    ----------
    name
        Name of the stage.
    summary
        Description in one sentence.
    reads
        Inputs from earlier stages: name of the stage, and attributes of `Artifacts`.
    reads_census
        Whether the result depends on the cells of the Census.
    pipeline
        Whether the stage works in the run directory and has a record in its manifest.
    progress
        File in the staging folder that exists if there is work to resume; None: the stage always starts from the
        beginning.
    several_processes
        Whether several processes may run the stage together; the first process manages the run directory.
    parts
        Whether a part of the work can be done alone (`--part`).
    own_arguments
        Whether the stage has arguments in addition to `--config FILE` and `section.key=value`.
    extra
        Extra of the installation with the packages of the stage; None: every installation has them.
    runs
        Stages that it runs itself, whose settings change its result, too.
    actions
        Values of the setting `<name>.action`, which may be given as the first argument.
    records
        Stage as whose run its run is recorded, because it writes the same; None: its own name.
    example
        Arguments of an example in the help of a stage without own arguments.
    """

    name: str
    summary: str
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads_census: bool = False
    pipeline: bool = False
    progress: str | None = None
    several_processes: bool = False
    parts: bool = False
    own_arguments: bool = False
    extra: str | None = None
    runs: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    records: str | None = None
    example: str = "--config configs/demo.yaml hvg.top_n_hvg=2000 output.directory=run2"

    @property
    def script(self) -> str:
        """File name of the script."""
        return f"scvi-{self.name}.py"

    @property
    def module(self) -> str:
        """Module with the functions `run` and `plan` of the stage."""
        return f"census_scvi.stages.{self.name.replace('-', '_')}"


_MODEL = ("weights", "description")
_LATENT = ("latent", "latent_joinids", "latent_hashes")

# In the order in which a project uses them.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "build-census", "Build a local Census, as the Census API reads it, from .h5ad files.", own_arguments=True
        ),
        Stage(
            "prepare",
            "Select the cells and genes to train on and write them to anndata_model.h5ad and hv_genes.pkl.",
            reads_census=True,
            pipeline=True,
            progress=GENES,
            parts=True,
        ),
        Stage(
            "search",
            "Try settings on the prepared cells, and write search/: table, report and the winner's config.",
            reads={"prepare": ("prepared",)},
            progress=PROGRESS,
            extra="search",
            runs=("prepare", "train"),
            example="--config configs/demo.yaml 'search.space.model.n_latent=[10, 20]' search.trials=2",
        ),
        Stage(
            "train",
            "Train the model on the prepared cells and write it to scvi.model/.",
            reads={"prepare": ("prepared",)},
            pipeline=True,
            progress=CHECKPOINT,
            several_processes=True,
        ),
        Stage(
            "fine-tune",
            "Train a model further on the cells of a newer Census that it has not seen.",
            own_arguments=True,
        ),
        Stage(
            "create-latent-update",
            "Embed every cell of the Census and write latent.npy and final_scvi_optimized/.",
            reads={"prepare": ("genes",), "train": _MODEL},
            reads_census=True,
            pipeline=True,
            progress=PROGRESS,
            parts=True,
        ),
        Stage(
            "evaluate",
            "Measure embeddings of a slice of the Census, and write metrics.json and report.html.",
            reads_census=True,
            extra="evaluate",
            example="--config configs/demo.yaml evaluate.measured_cells=2000",
        ),
        Stage(
            "publish",
            "Pass the gates, then publish the embedding in the Census' obsm, with model and provenance.",
            reads={"prepare": ("genes", "prepared"), "train": _MODEL, "create-latent-update": _LATENT},
            reads_census=True,
            pipeline=True,
            progress=PROGRESS,
            extra="publish",
        ),
        Stage(
            "index",
            "Build an index for the nearest of all embedded cells, and publish it with the embedding.",
            reads={"create-latent-update": ("latent", "latent_joinids")},
            pipeline=True,
            progress=PROGRESS,
            extra="index",
        ),
        Stage(
            "verify", "Check that a published embedding is what its model computes from its cells.", own_arguments=True
        ),
        Stage(
            "import-model",
            "Import a model that scvi-tools saved, so that it can be used without its pickle.",
            own_arguments=True,
        ),
        Stage(
            "import-embedding",
            "Make a run directory from the embedding of any model: vectors and soma_joinids.",
            reads_census=True,
            progress=PROGRESS,
            records="create-latent-update",
            example="--config my-config.yaml import_embedding.vectors=pca.npy import_embedding.joinids=joinids.npy",
        ),
        Stage(
            "compare-releases",
            "Compare a release with an earlier one (compare_releases.old): comparison.json and report.html.",
            extra="compare",
            example="--config my-config.yaml compare_releases.old=run-of-last-release",
        ),
        Stage(
            "map-query",
            "Embed your own cells with a trained model and annotate them from the Census.",
            extra="atlas",
            example="--config configs/demo.yaml query.file=my-cells.h5ad",
        ),
        Stage(
            "annotate",
            "Annotate your own cells with the labels of a file or of a slice of the Census.",
            extra="annotate",
            actions=("predict", "train", "interpret"),
            example="--config configs/annotate-demo.yaml query.file=my-cells.h5ad",
        ),
    )
}
PIPELINE = tuple(name for name, stage in STAGES.items() if stage.pipeline)


def script_of(name: str) -> str:
    """File name of the script that runs a stage; a name that is not a stage is returned unchanged."""
    return STAGES[name].script if name in STAGES else name
