"""Report of a comparison of two releases: what changed, in sentences, tables and maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from census_scvi.config.random_streams import draw
from census_scvi.files.atomic import write_text
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.releases.measure import SAMPLED, Drift
from census_scvi.report import figures
from census_scvi.report.page import render
from census_scvi.report.slice import Slice

# Cells on the maps; rows of a table that the page shows (comparison.json has all); names of genes and batches.
_MAP_CELLS, _MOST_ROWS, _MOST_NAMES = 5000, 40, 30

# Title and meaning of each measure.
MEASURES = {
    "neighbor_overlap": ("Neighbors in common", "Share of a cell's nearest neighbors that are the same."),
    "label_stability": (
        "Label stability",
        "Share of the cells whose nearest neighbors have the same most frequent label in both.",
    ),
    "old_accuracy": ("Own label, old", "Share of the cells with the most frequent label of their old neighbors."),
    "new_accuracy": ("Own label, new", "Share of the cells with the most frequent label of their new neighbors."),
    "movement": (
        "Movement",
        "Distance after the best translation, rotation and scale (Procrustes), in units of the spread of the new"
        " embedding; mean of all cells. Lower is more similar.",
    ),
}


def findings(record: Mapping[str, Any]) -> list[str]:
    """What changed, in sentences.

    Parameters
    ----------
    record
        Content of comparison.json.
    """
    cells, overall = record["cells"], record["overall"]
    sentences = [
        f"{cells['shared']:,} cells are in both releases; {cells['added']:,} of {cells['new']:,} cells are new, and"
        f" {cells['gone']:,} of {cells['old']:,} cells are gone."
    ]
    if ambiguous := cells["old_ambiguous"] + cells["new_ambiguous"]:
        sentences.append(f"{ambiguous:,} cells have the identity of another cell and are not matched.")
    label = record["settings"]["label"]
    relabelled = record["relabelled"]["cells"]
    sentences.append(f"{relabelled:,} cells of both ({_percent(relabelled, cells['shared'])}) have another {label}.")
    if cells["recounted"]:
        sentences.append(
            f"{cells['recounted']:,} cells of both ({_percent(cells['recounted'], cells['shared'])}) have other counts."
        )
    overlap = overall["neighbor_overlap"]
    sentences.append(
        f"{overlap['value']:.1%} of the {record['n_neighbors']} nearest neighbors of a cell are the same"
        f" ({overlap['low']:.1%} to {overlap['high']:.1%}; {overlap['chance']:.1%} by chance)."
    )
    if "label_stability" in overall:
        stable, (old, new) = overall["label_stability"], (overall[f"{name}_accuracy"] for name in ("old", "new"))
        sentences.append(
            f"For {stable['value']:.1%} of the cells the neighbors have the same most frequent {label} in both"
            f" ({stable['low']:.1%} to {stable['high']:.1%}; {stable['chance']:.1%} by chance). It is the cell's own"
            f" for {old['value']:.1%} in the old and {new['value']:.1%} in the new embedding."
        )
    for column, rows in record["by"].items():
        if rows and rows[0]["neighbor_overlap"] is not None and len(rows) > 1:
            worst = rows[0]
            sentences.append(
                f"The {column} that changed most is {worst['name']} ({worst['cells']:,} cells):"
                f" {worst['neighbor_overlap']:.1%} of the neighbors are the same."
            )
    for name, found in (record["predictions"] or {"labels": {}})["labels"].items():
        sentences.append(_prediction(name, found))
    return sentences


def _prediction(label: str, found: Mapping[str, Any]) -> str:
    text = f"Both releases predict the same {label} for {found['same']:.1%} of the {found['cells']:,} cells of the file"
    if "old_accuracy" not in found:
        return f"{text}."
    right = f"{found['old_accuracy']:.1%} are right by the old and {found['new_accuracy']:.1%} by the new release"
    return f"{text}; {right}."


def _percent(number: int, of: int) -> str:
    return f"{number / max(of, 1):.1%}"


def write_release_report(path: Path, record: Mapping[str, Any], drift: Drift, cells: Slice, seed: int) -> None:
    """Draw the maps and write the page.

    Parameters
    ----------
    path
        Path of report.html.
    record
        Content of comparison.json.
    drift, cells
        The measures, and the sampled cells with both embeddings.
    seed
        Seed of the maps.
    """
    page = render(
        "releases.html.jinja",
        record=record,
        measures=MEASURES,
        sampled=SAMPLED,
        scores=_scores(record["scores"]),
        maps=_maps(record["settings"]["label"], drift, cells, seed),
        settings=[(row["name"], json.dumps(row["old"]), json.dumps(row["new"])) for row in _of(record, "settings")],
        facts=_facts(record),
        most_rows=_MOST_ROWS,
        most_names=_MOST_NAMES,
    )
    write_text(path, page)


def _of(record: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    return list(record["differences"][what])


def _scores(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the metrics: those of both embeddings, next to each other."""
    by_name = {
        name: {(score["about"], score["column"], score["metric"]): score for score in rows}
        for name, rows in scores.items()
    }
    first, second = by_name.values()
    return [
        {"about": key[0], "column": key[1], "metric": key[2], "old": score, "new": second[key]}
        for key, score in first.items()
        if key in second
    ]


def _maps(label: str, drift: Drift, cells: Slice, seed: int) -> dict[str, Any]:
    """UMAPs of the same cells in both embeddings, by label and by the share of neighbors in common."""
    chosen = draw(len(cells.obs), _MAP_CELLS, np.random.default_rng(seed))
    shared = drift.shared
    names = shared.new.labels[label][shared.new_rows[drift.moved.sample[chosen]]]
    values = pd.Series(names.astype(object))
    legend = figures.legend_of(values)
    overlap = drift.sampled.values["neighbor_overlap"].to_numpy()[chosen]
    pictures, of_overlap = {}, {}
    for name, points in cells.spaces.items():
        positions = UmapMap(points[chosen], seed=seed).positions
        pictures[name] = figures.map_image(positions, values, legend, seed=seed)
        of_overlap[name] = figures.value_map(positions, overlap, "neighbors in common")
    return {"legend": legend, "pictures": pictures, "overlap": of_overlap, "cells": len(chosen)}


def _facts(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Name of each fact, and its value for both releases, as text."""
    titles = {
        "place": "release",
        "finished": "embedded on",
        "cells": "embedded cells",
        "method": "model",
        "n_latent": "latent dimensions",
        "genes": "genes",
        "batches": "trained batches",
        "training_cells": "prepared cells",
        "epochs": "epochs",
        "seed": "seed of the training",
    }
    both = [record[name] for name in ("old", "new")]
    rows = [("Census", *(_census(facts["census"]) for facts in both))]
    rows += [(title, *(_text(facts[name]) for facts in both)) for name, title in titles.items()]
    metrics = sorted({name for facts in both for name in facts["final_metrics"]})
    rows += [
        (name.replace("_", ", "), *(_text(facts["final_metrics"].get(name)) for facts in both))
        for name in metrics
        if name.startswith("elbo")
    ]
    return rows


def _census(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "not known"
    where = identity["version"] or identity["uri"] or "location not recorded"
    return f"{where}, created {identity['created_on']}, schema {identity['schema']}, {identity['cells']:,} cells"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
