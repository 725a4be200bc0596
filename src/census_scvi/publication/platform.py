"""The fields that the Virtual Cells Platform wants of a model: its template model_card_metadata.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from census_scvi.model.families import SCANVI, TOTALVI, Family

METADATA = "model_card_metadata.yaml"
_MOST_CHARACTERS = 160
_TASKS = ("Batch Correction", "Cell Clustering", "Data Integration", "Differential Expression", "Expression Denoising")
_MORE_TASKS = {SCANVI: ("Cell Type Classification",), TOTALVI: ("Imputation",)}
# What is not in a record: the publisher adds it.
_UNKNOWN = ("repository_link", "uses_synthetic_data", "uses_purchased_licensed_data", "quickstart_link")


def platform_metadata(record: Mapping[str, Any], family: Family) -> str:
    """YAML of the fields that the provenance answers; a comment names those that only the publisher knows.

    Source: the template of chanzuckerberg/model-template. What a provenance does not state is not there.
    """
    contact, census, uri = record["contact"], record["census"], record["model"]["uri"]
    description = record["description"] or f"{family.title} model of single-cell counts and its embedding of cells."
    values = {
        "model_display_name": record["title"],
        "model_version": record["published_on"][:10],
        "primary_contact_email": contact["email"],
        "publication_preprint_link": f"https://doi.org/{record['doi']}" if record["doi"] else "",
        "release_date": record["published_on"][:10],
        "model_modality": ["Transcriptomic"],
        "model_description": description,
        "short_description": _short(description),
        "authors": _author(contact),
        "licenses": [{"type": record["license"]}] if record["license"] else [],
        "compute_requirement": "CPU",
        "model_architecture_type": ["PyTorch", "Safetensors", "scvi-tools"],
        "tasks_performed_by_model": [*_TASKS, *_MORE_TASKS.get(family.kind, ())],
        "training_date": record["stages"]["train"]["finished"][:10],
        "input_data_type": ["h5ad"],
        "output_data_type": ["embeddings", *(["cell types"] if family.kind == SCANVI else [])],
        "dataset_sources": _datasets(record["data"], census),
        "model_download_link": "" if uri == "." else uri,
    }
    known = {name: value for name, value in values.items() if value not in ("", [])}
    missing = [*_UNKNOWN, *(name for name in values if name not in known)]
    return f"# To be added: {', '.join(missing)}\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 3].rsplit(' ', 1)[0]}..."


def _author(contact: Mapping[str, str]) -> list[dict[str, Any]]:
    if contact["name"]:
        affiliates = {"affiliates": [contact["affiliation"]]} if contact["affiliation"] else {}
        return [{"name": contact["name"], "type": "individual", **affiliates}]
    return [{"name": contact["affiliation"], "type": "organization"}] if contact["affiliation"] else []


def _datasets(data: Mapping[str, Any], census: Mapping[str, Any]) -> list[dict[str, Any]]:
    if data["cellxgene"]:
        version = census["version"] or census["created_on"] or ""
        return [{"dataset_name": "CELLxGENE Census", "dataset_version": version, "usage": ["training"]}]
    return [
        {"dataset_name": each.get("dataset_title") or each.get("dataset_id", ""), "usage": ["training"]}
        for each in data["datasets"]
    ]
