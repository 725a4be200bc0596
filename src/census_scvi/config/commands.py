"""Every command once: scripts, `census-scvi`, help and messages name them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command, which `scvi-NAME.py` and `census-scvi NAME` run.

    Attributes
    ----------
    name
        Its name.
    summary
        What it does, one sentence.
    stage
        Whether it is a stage of the pipeline, with a record in the run directory's manifest.
    own_arguments
        Whether it has arguments of its own, in place of `--config FILE` and `section.key=value`.
    extra
        The extra of the installation that has its packages; None: every installation has them.
    """

    name: str
    summary: str
    stage: bool = False
    own_arguments: bool = False
    extra: str | None = None

    @property
    def script(self) -> str:
        """File name of its script."""
        return f"scvi-{self.name}.py"

    @property
    def module(self) -> str:
        """The module that has `run` and `plan`, or with arguments of its own `main`."""
        return f"census_scvi.stages.{self.name.replace('-', '_')}"


# In the order in which a project needs them.
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "build-census", "Build a local Census, as the Census API reads it, from .h5ad files.", own_arguments=True
        ),
        Command(
            "prepare",
            "Select the cells and genes to train on and write them to anndata_model.h5ad and hv_genes.pkl.",
            stage=True,
        ),
        Command("train", "Train scVI on the prepared cells and write the model to scvi.model/.", stage=True),
        Command(
            "create-latent-update",
            "Embed every cell of the Census and write latent.npy and final_scvi_optimized/.",
            stage=True,
        ),
        Command(
            "evaluate",
            "Measure embeddings of a slice of the Census, and write metrics.json and report.html.",
            extra="evaluate",
        ),
        Command(
            "publish",
            "Pass the gates, then publish the embedding in the Census' obsm, with model and provenance.",
            stage=True,
            extra="publish",
        ),
        Command(
            "verify",
            "Check that a published embedding is what its model computes from its cells.",
            own_arguments=True,
        ),
        Command(
            "map-query", "Embed your own cells with a trained model and annotate them from the Census.", extra="atlas"
        ),
    )
}


def script_of(name: str) -> str:
    """File name of the script that runs a command; of another name, the name."""
    return COMMANDS[name].script if name in COMMANDS else name
