"""Publication of an embedding whose model is not given: the gates that need no model, and the published folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from census_scvi.census.cells import Cells
from census_scvi.files.atomic import remove, sync_tree, write_json
from census_scvi.model.published import FORMAT, seal_of
from census_scvi.model.source import PROVENANCE
from census_scvi.publication import gates
from census_scvi.publication.card import card_template, model_index, named
from census_scvi.publication.folder import CARD
from census_scvi.publication.gates import NO_MODEL, Gate
from census_scvi.publication.measure_gates import moments_of
from census_scvi.publication.settings import GatesSection
from census_scvi.workspace import Artifacts
from census_scvi.workspace.identity import identities


def measure(directory: Path, artifacts: Artifacts, bounds: GatesSection, cells: Cells) -> list[Gate]:
    """Measure the gates that need no model.

    Parameters
    ----------
    directory, artifacts
        The run directory, and the names of its artifacts.
    bounds
        The section `gates`. `max_difference` is multiplied by the standard deviation of the dimension that varies most,
        if that is above 1: an embedding has any scale.
    cells
        The cells of `obs_query` in the Census.
    """
    latent = np.load(directory / artifacts.latent, mmap_mode="r")
    joinids, hashes = (np.load(directory / name) for name in (artifacts.latent_joinids, artifacts.latent_hashes))
    moments = moments_of(latent)
    scale = max(float(np.sqrt(moments.covariance.diagonal().max())), 1.0)
    return [
        gates.same_cells(cells.joinids, joinids),
        gates.finite(moments),
        gates.variance(moments, bounds.min_variance),
        gates.duplicate_dimensions(moments, bounds.max_correlation),
        gates.effective_rank(moments, min(bounds.min_effective_rank, latent.shape[1])),
        gates.order(hashes, latent, joinids, bounds.max_difference * scale),
    ]


def _header(record: dict[str, Any]) -> str:
    values = {
        **({"license": record["license"].lower()} if record["license"] else {}),
        "tags": ["biology", "genomics", "single-cell"],
        **model_index(record),
    }
    return yaml.safe_dump(values, sort_keys=False)


def write_folder(folder: Path, record: dict[str, Any]) -> None:
    """Write the folder with card and provenance, completely or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    partial.mkdir()
    card = card_template("card_without_model.md.jinja").render(
        record=record,
        header=Markup(_header(record)),
        imported=record["stages"]["create-latent-update"]["imported"],
        query=record["config"]["census"]["obs_query"] or "all",
        organism=record["census"]["organism"].replace("_", " ").capitalize(),
        reason=NO_MODEL,
        **named(record),
    )
    (partial / CARD).write_text(card, encoding="utf-8")
    record = {**record, "format": FORMAT, "files": identities(partial, [CARD])}
    write_json(partial / PROVENANCE, {**record, "seal": seal_of(record)})
    sync_tree(partial)
    partial.rename(folder)
