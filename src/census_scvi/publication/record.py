"""Provenance of a publication, and the parts of it for the Census API and `scvi_summary`."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.census.embedding import EmbeddingHash
from census_scvi.census.open import MEASUREMENT
from census_scvi.census.precision import rounded
from census_scvi.files.json_file import read_json
from census_scvi.files.place import recorded, without_paths
from census_scvi.files.uri import local_path, tiledb_place, without_credentials
from census_scvi.publication.settings import PublishSection
from census_scvi.workspace import provenance
from census_scvi.workspace.identity import Identity

log = logging.getLogger(__name__)

THIS_FOLDER = "."
_BLOCK_CELLS = 2**16
_NOT_OURS = ("config", "fingerprint")  # keys of a stage's record to drop: the provenance has the whole config once


def publication_record(
    settings: PublishSection,
    publication: str,
    *,
    config: dict[str, Any],
    folder: Path,
    experiment_uri: str,
    census: dict[str, Any],
    joinids: npt.NDArray[np.int64],
    latent: npt.NDArray[np.float32],
    n_batches: int,
    method: str,
    model: dict[str, Any] | None,
    predictions: dict[str, Any] | None,
    weights: Identity | None,
    stages: dict[str, dict[str, Any]],
    gates: dict[str, Any],
    data: dict[str, Any],
    evaluation: dict[str, Any] | None,
) -> dict[str, Any]:
    """Provenance of a publication, without credentials, paths of this machine, and other people's names.

    Parameters
    ----------
    settings
        The section `publish`.
    publication
        Id of the publication.
    config
        All settings of the run.
    folder
        The folder that is published with the embedding; paths are recorded relative to it.
    experiment_uri
        URI of the Experiment that it is published to.
    census
        Identity of the Census.
    joinids, latent
        The embedding: int64 (cells,), float32 (cells, n_latent); may be memory maps.
    n_batches
        Number of batches among its cells.
    method
        Title of the kind of model, such as `scVI`.
    model
        Facts of the built module; None: the embedding is published without a model.
    predictions
        Result of `check_predictions`, or None.
    weights
        Identity of the model's weights, or None.
    stages
        Records of the earlier stages.
    gates
        Record of the gates.
    data
        Result of `describe_data`.
    evaluation
        Result of `evaluation_of`.
    """
    digests = {precision: EmbeddingHash() for precision in ("float32", settings.precision)}
    for start in range(0, len(joinids), _BLOCK_CELLS):
        block = slice(start, start + _BLOCK_CELLS)
        for precision, digest in digests.items():
            digest.update(joinids[block], rounded(latent[block], precision))
    folder = folder.absolute()
    elsewhere = settings.model_uri if settings.model_uri and local_path(settings.model_uri) is None else None
    record = {
        "publication": publication,
        "published_on": datetime.now(UTC).isoformat(timespec="seconds"),
        "published_by": settings.contact.name or settings.contact.email or settings.contact.affiliation,
        "title": settings.title or _title(method, data, census["organism"], len(joinids)),
        "description": settings.description,
        "license": settings.license,
        "doi": settings.doi,
        "contact": settings.contact.model_dump(),
        "embedding": {
            "name": settings.name,
            "experiment_uri": recorded(experiment_uri, folder) if settings.in_obsm else None,
            "n_cells": len(joinids),
            "n_features": int(latent.shape[1]),
            "sha256": digests["float32"].hexdigest(),
            **_own_array(settings, digests[settings.precision].hexdigest(), folder),
        },
        "census": census | {"uri": recorded(census["uri"], folder)},
        "data": data,
        "cells_sha256": hashlib.sha256(np.ascontiguousarray(joinids, "<i8").tobytes()).hexdigest(),
        "batches": n_batches,
        **_of_model(model, weights, elsewhere or THIS_FOLDER),
        "config": without_paths(config, folder),
        "stages": {
            stage: without_paths({name: value for name, value in values.items() if name not in _NOT_OURS}, folder)
            for stage, values in stages.items()
        },
        "gates": gates,
        **({"evaluation": evaluation} if evaluation else {}),
        **({"predictions": predictions} if predictions else {}),
        "code": provenance.code_state(),
        "packages": provenance.package_versions(),
        "hardware": provenance.hardware(),
        "seed": config["seed"],
    }
    return dict(without_credentials(record))


def _own_array(settings: PublishSection, digest: str, folder: Path) -> dict[str, Any]:
    if settings.array_uri is None:
        return {}
    uri = recorded(tiledb_place(settings.array_uri, "publish.array_uri"), folder)
    return {"array": {"uri": uri, "precision": settings.precision, "sha256": digest}}


def _of_model(model: dict[str, Any] | None, weights: Identity | None, uri: str) -> dict[str, Any]:
    if model is None or weights is None:
        return {"model": None}
    genes = hashlib.sha256("\n".join(model["genes"]).encode()).hexdigest()
    return {"genes_sha256": genes, "model": {**model, "sha256": _whole(weights), "uri": uri}}


def _title(method: str, data: dict[str, Any], organism: str, n_cells: int) -> str:
    if data["cellxgene"]:
        return f"{method} embedding of CELLxGENE Census"
    titles = [dataset.get("dataset_title") or dataset.get("dataset_id", "") for dataset in data["datasets"]]
    of = titles[0] if data["n_datasets"] == 1 else f"{data['n_datasets']:,} datasets"
    return f"{method} embedding of {n_cells:,} cells of {organism.replace('_', ' ').capitalize()}: {of}"


def evaluation_of(folder: Path, latent: Identity) -> dict[str, Any] | None:
    """Results of scvi-evaluate.py for an embedding; None if there are none or they belong to another embedding.

    Parameters
    ----------
    folder
        Folder of metrics.json.
    latent
        Identity of the embedding's `latent.npy`.

    Returns
    -------
    `cells` (the number of measured cells), `obs_filter`, and `scores`: a list of metric, column, value, interval, and
    the values of the other embeddings and baselines.
    """
    path = folder / "metrics.json"
    try:
        found = read_json(path)
        names = [name for name, identity in found.get("latents", {}).items() if identity == latent]
        if names and found.get("mode", "sound") == "sound":  # an earlier version also had flawed metrics
            return _measured(found, names[0])
        log.info("%s is of another embedding or an earlier version; it is not published", path)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s); it is not published", path, error)
    return None


def _measured(found: dict[str, Any], name: str) -> dict[str, Any]:
    others = {
        other: {(score["metric"], score["column"]): score["value"] for score in scores}
        for other, scores in found["scores"].items()
        if other not in found["latents"]
    }
    return {
        "cells": int(found["cells"]["measured"]),
        "obs_filter": found["settings"]["obs_filter"],
        "scores": [
            {
                **{key: score[key] for key in ("metric", "about", "column", "value", "low", "high")},
                "others": {other: values.get((score["metric"], score["column"])) for other, values in others.items()},
            }
            for score in found["scores"][name]
        ],
    }


def _whole(identity: Identity) -> str:
    """One digest per file: the digest of its only block, or a digest over the digests of its blocks."""
    blocks = identity["sha256"]
    return str(blocks[0]) if len(blocks) == 1 else hashlib.sha256("".join(blocks).encode()).hexdigest()


def embedding_info(record: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an embedding, as the Census API expects it."""
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
        "model_link": _link(record),
        "data_type": "obs_embedding",
        "census_version": census["version"] or census["created_on"] or "",
        "experiment_name": census["organism"],
        "measurement_name": MEASUREMENT,
        "n_embeddings": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "submission_date": record["published_on"][:10],
    }


def summary_row(record: dict[str, Any]) -> dict[str, Any]:
    """One row of `scvi_summary`, by column."""
    census, embedding = record["census"], record["embedding"]
    return {
        "publication": record["publication"],
        "embedding_name": embedding["name"],
        "embedding_sha256": embedding["sha256"],
        "n_cells": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "published_on": record["published_on"],
        "published_by": record["published_by"],
        "model_sha256": "" if record["model"] is None else record["model"]["sha256"],
        "model_uri": _link(record),
        "census_uri": census["uri"] or "",
        "census_version": census["version"],
        "census_schema": census["schema"],
        "census_created_on": census["created_on"],
        "census_cells": census["cells"],
    }


def _link(record: dict[str, Any]) -> str:
    """URL of the model for readers of the Census; empty if the model is on a local disk, or not given."""
    if record["model"] is None:
        return ""
    uri = str(record["model"]["uri"])
    return "" if uri == THIS_FOLDER else uri
