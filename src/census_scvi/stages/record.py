"""How a publication was made: its provenance, and what of it the Census API and `scvi_summary` show."""

from __future__ import annotations

import getpass
import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.census.embedding import EmbeddingHash
from census_scvi.census.open import MEASUREMENT
from census_scvi.config import Config
from census_scvi.workspace import Artifacts, provenance
from census_scvi.workspace.identity import Identity
from census_scvi.workspace.uri import without_credentials

_BLOCK_CELLS = 2**16


def publication_record(
    config: Config,
    publication: str,
    *,
    experiment_uri: str,
    census: dict[str, Any],
    joinids: npt.NDArray[np.int64],
    latent: npt.NDArray[np.float32],
    n_batches: int,
    model: dict[str, Any],
    weights: Identity,
    stages: dict[str, dict[str, Any]],
    gates: dict[str, Any],
) -> dict[str, Any]:
    """The provenance of a publication, without credentials.

    Parameters
    ----------
    config
        The config of the run.
    publication
        Its id.
    experiment_uri
        Where it is published.
    census
        Identity of the Census.
    joinids, latent
        The embedding: int64 (cells,), float32 (cells, n_latent); may be memory maps.
    n_batches
        Batches among its cells.
    model
        Facts of the built module.
    weights
        Identity of the model's weights.
    stages
        Records of the stages before.
    gates
        Record of the gates.
    """
    digest = EmbeddingHash()
    for start in range(0, len(joinids), _BLOCK_CELLS):
        digest.update(joinids[start : start + _BLOCK_CELLS], latent[start : start + _BLOCK_CELLS])
    settings = config.publish
    folder = str((config.directory / Artifacts.of(config).published).absolute())
    record = {
        "publication": publication,
        "published_on": datetime.now(UTC).isoformat(timespec="seconds"),
        "published_by": _user(),
        "title": settings.title,
        "description": settings.description,
        "license": settings.license,
        "doi": settings.doi,
        "contact": settings.contact.model_dump(),
        "embedding": {
            "name": settings.name,
            "experiment_uri": experiment_uri,
            "n_cells": len(joinids),
            "n_features": int(latent.shape[1]),
            "sha256": digest.hexdigest(),
        },
        "census": census,
        "cells_sha256": hashlib.sha256(np.ascontiguousarray(joinids, "<i8").tobytes()).hexdigest(),
        "batches": n_batches,
        "genes_sha256": hashlib.sha256("\n".join(model["genes"]).encode()).hexdigest(),
        "model": {**model, "sha256": _whole(weights), "uri": settings.model_uri or folder},
        "config": config.model_dump(mode="json"),
        "stages": {
            stage: {name: value for name, value in values.items() if name not in ("config", "fingerprint")}
            for stage, values in stages.items()
        },
        "gates": gates,
        "code": provenance.code_state(),
        "packages": provenance.package_versions(),
        "hardware": provenance.hardware(),
        "seed": config.seed,
    }
    return dict(without_credentials(record))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a process whose user has no name, as in some containers
        return "unknown"


def _whole(identity: Identity) -> str:
    """One digest for a file: its only block's, or one of the digests of its blocks."""
    blocks = identity["sha256"]
    return str(blocks[0]) if len(blocks) == 1 else hashlib.sha256("".join(blocks).encode()).hexdigest()


def embedding_info(record: dict[str, Any]) -> dict[str, Any]:
    """The metadata that the Census API expects of an embedding."""
    census, embedding = record["census"], record["embedding"]
    return {
        "id": record["publication"],
        "embedding_name": embedding["name"],
        "title": record["title"],
        "description": record["description"],
        "primary_contact": record["contact"],
        "additional_contacts": [],
        "DOI": record["doi"],
        "additional_information": f"license: {record['license']}" if record["license"] else "",
        "model_link": record["model"]["uri"],
        "data_type": "obs_embedding",
        "census_version": census["version"] or census["created_on"] or "",
        "experiment_name": census["organism"],
        "measurement_name": MEASUREMENT,
        "n_embeddings": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "submission_date": record["published_on"][:10],
    }


def summary_row(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of `scvi_summary`."""
    census, embedding = record["census"], record["embedding"]
    return {
        "publication": record["publication"],
        "embedding_name": embedding["name"],
        "embedding_sha256": embedding["sha256"],
        "n_cells": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "published_on": record["published_on"],
        "published_by": record["published_by"],
        "model_sha256": record["model"]["sha256"],
        "model_uri": record["model"]["uri"],
        "census_uri": census["uri"],
        "census_version": census["version"],
        "census_schema": census["schema"],
        "census_created_on": census["created_on"],
        "census_cells": census["cells"],
    }
