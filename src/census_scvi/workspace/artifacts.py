"""Names of the artifacts of a run."""

from __future__ import annotations

from dataclasses import dataclass

from census_scvi.config import run_names


@dataclass(frozen=True)
class Artifacts:
    """File and folder names, relative to the run directory."""

    prepared: str
    model: str
    genes: str = run_names.GENES
    tensorboard: str = run_names.TENSORBOARD
    latent: str = run_names.LATENT
    latent_joinids: str = run_names.LATENT_JOINIDS
    latent_hashes: str = run_names.LATENT_HASHES
    minified: str = run_names.MINIFIED
    index: str = run_names.INDEX
    qa: str = run_names.QA
    published: str = run_names.PUBLISHED

    @property
    def weights(self) -> str:
        """Weights of the model in its safe form."""
        return f"{self.model}/{run_names.WEIGHTS}"

    @property
    def description(self) -> str:
        """Description of the model in its safe form."""
        return f"{self.model}/{run_names.DESCRIPTION}"
