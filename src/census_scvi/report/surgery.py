"""Report of a comparison of ways to map a query: what follows, the numbers of each way, and maps of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.files.atomic import write_json, write_text
from census_scvi.files.json_values import json_values
from census_scvi.metrics.agreement import CLASSIFIERS, LabelTransfer
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.query.surgery.compare import Comparison
from census_scvi.report import figures
from census_scvi.report.page import render
from census_scvi.workspace.provenance import package_versions

# Cells of reference and query on the maps, and number of seeds of UMAP.
_MAP_CELLS, _MAP_SEEDS = 5000, 2

Points = npt.NDArray[np.float32]


def write_comparison_report(
    path: Path, comparison: Comparison, *, facts: Mapping[str, Any] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write the page and, next to it, a .json with its numbers.

    Parameters
    ----------
    path
        NAME.html; the numbers are written to NAME.json.
    comparison
        Result of `compare_ways`.
    facts
        What the reader should know about the input, value by name: file, reference, batches.
    seed
        Seed of the cells on the maps, and of the first UMAP.

    Returns
    -------
    Content of the .json.
    """
    table = comparison.table
    record = {
        "recommendation": comparison.recommendation,
        "findings": comparison.findings[1:],
        "facts": dict(facts or {}),
        "ways": json_values(table.to_dict("index")),
    }
    write_json(path.with_suffix(".json"), record)
    page = render(
        "surgery.html.jinja",
        record=record,
        rows=[(name, _shown(values)) for name, values in table.iterrows()],
        columns=[(name, title, note) for name, title, note in _columns(table)],
        maps=_maps(comparison, seed),
        packages=package_versions(),
    )
    write_text(path, page)
    return record


def _columns(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Name, title and meaning of the columns that the page shows."""
    shown = [
        ("moved", "reference moved", "largest change of a coordinate of the reference's cells"),
        ("distance_mean", "distance to joint, mean", "Euclidean distance of the query's cells in the latent space"),
        ("distance_largest", "distance to joint, largest", "of all cells of the query"),
        ("neighbor_overlap", "neighbors in common", "share of the 15 nearest neighbors that are the same as by joint"),
        ("cluster_agreement", "clusters", "adjusted Rand index of Leiden clusters with those by joint"),
    ]
    for classifier in CLASSIFIERS:
        title = classifier.replace("_", " ").replace("mlp", "perceptron")
        shown.append((f"agreement_{classifier}", f"{title}: agreement", "share of the labels that are as by joint"))
        shown.append((f"accuracy_{classifier}", f"{title}: accuracy", "share of the known labels that are right"))
    shown += [
        ("mixing", "mixing", "with the reference within types; 1: as shuffled"),
        ("batch_by_batch", "batch by batch", "largest change of a coordinate if each batch is embedded separately"),
        ("steps", "steps", "optimiser steps of all its trainings"),
        ("seconds", "seconds", "of all its trainings"),
    ]
    return [column for column in shown if column[0] in table]


def _shown(values: pd.Series) -> dict[str, str]:
    """Numbers as text."""
    text = {}
    for name, value in values.items():
        if not isinstance(value, float | int | np.number) or not math.isfinite(value):
            text[str(name)] = "–"
        elif name in ("moved", "batch_by_batch"):
            text[str(name)] = f"{value:.1g}"
        elif name in ("steps", "seconds"):
            text[str(name)] = f"{value:,.0f}"
        else:
            text[str(name)] = f"{value:.3f}"
    return text


def _maps(comparison: Comparison, seed: int) -> dict[str, Any]:
    """Legend, and a picture of each way for each seed of UMAP; with a seed, all pictures have one layout.

    The layout is that of the reference, on which the query's cells are placed; without a reference, that of the first
    way.
    """
    numbers = np.random.default_rng(seed)
    n_query = len(comparison.ways[0].latent)
    chosen = np.sort(numbers.permutation(n_query)[:_MAP_CELLS])
    base = comparison.ways[0].latent[chosen]
    if comparison.reference is not None:
        base = comparison.reference[np.sort(numbers.permutation(len(comparison.reference))[:_MAP_CELLS])]
    names = pd.Series(_labels(comparison, seed)[chosen].astype(str))
    legend = figures.legend_of(names)
    pictures = {
        umap_seed: {
            way.name: figures.on_reference_image(layout.positions, layout.place(way.latent[chosen]), names, legend)
            for way in comparison.ways
        }
        for umap_seed in range(seed, seed + _MAP_SEEDS)
        for layout in [UmapMap(base, seed=umap_seed)]
    }
    return {"legend": legend, "pictures": pictures, "cells": len(chosen), "reference": comparison.reference is not None}


def _labels(comparison: Comparison, seed: int) -> npt.NDArray[np.object_]:
    """Known labels of the query, else those of its neighbors by the first way, else none."""
    first = comparison.ways[0].latent
    if comparison.truth is not None:
        return np.array(["unknown" if label is None else label for label in comparison.truth], dtype=object)
    if comparison.reference is None or comparison.labels is None:
        return np.full(len(first), "cells of the query", dtype=object)
    known = np.array([label is not None for label in comparison.labels], dtype=bool)
    nearest = CLASSIFIERS[:1]
    return LabelTransfer(comparison.reference[known], comparison.labels[known], nearest, seed=seed)(first)[nearest[0]]
