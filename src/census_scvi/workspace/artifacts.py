"""Names of everything in the run directory, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from census_scvi.config import Config

MANIFEST = "manifest.json"
LOCK = ".lock"
STAGING = ".partial"


@dataclass(frozen=True)
class Artifacts:
    """File and folder names, relative to the run directory."""

    prepared: str
    model: str
    genes: str = "hv_genes.pkl"
    tensorboard: str = "tb_logs"
    latent: str = "latent.npy"
    latent_joinids: str = "latent-idx.npy"
    latent_hashes: str = "latent-hash.npy"
    minified: str = "final_scvi_optimized"
    qa: str = "qa.json"
    published: str = "published"

    @classmethod
    def of(cls, config: Config) -> Artifacts:
        """The names that a config asks for."""
        return cls(prepared=config.anndata.model_filename, model=config.model.filename)
