"""report.html: a self-contained file with the scores of embeddings, by cell type and batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from census_scvi.config.run_names import QA
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_text
from census_scvi.metrics.score import BATCH, BIOLOGY, CHANCE, MIXED, WITHIN, Score
from census_scvi.model.families import SCVI, family_of
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.report import figures
from census_scvi.report.groups import same_groups
from census_scvi.report.page import render
from census_scvi.report.result import Evaluation
from census_scvi.report.settings import PCA, EvaluateSection
from census_scvi.report.slice import Slice
from census_scvi.workspace import Workspace

_COLOURED_BY = ("cell_type", "dataset_id", "assay", "donor_id")
_CURVES = ("elbo_train", "elbo_validation")
# Maximum number of rows shown of a breakdown, those with the most cells; metrics.json has all rows.
MOST_ROWS = 60


def write_report(
    path: Path,
    settings: EvaluateSection,
    directory: Path,
    cells: Slice,
    measured: npt.NDArray[np.int64],
    found: Evaluation,
    record: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Draw the UMAPs and write the page.

    Parameters
    ----------
    path
        Path of report.html.
    settings, directory
        The section `evaluate`, and the run directory.
    cells, measured
        The slice, and int64 (cells,): rows of the measured cells.
    found
        The results.
    record
        Content of metrics.json.
    config
        Config sections that reproduce the evaluation; the page shows them.
    """
    spaces = [*cells.spaces]
    maps, unmapped = _maps(settings, cells, measured, record["seed"])
    page = render(
        "report.html.jinja",
        record=record,
        spaces=spaces,
        best=[name for name in spaces if name != PCA],
        maps=maps,
        unmapped=unmapped,
        tables=_tables(found, spaces),
        breakdowns=_breakdowns(found, spaces),
        training=_training(directory),
        gates=_gates(directory),
        most_rows=MOST_ROWS,
        config_text=yaml.safe_dump(config, sort_keys=False),
    )
    write_text(path, page)


def _maps(
    settings: EvaluateSection, cells: Slice, measured: npt.NDArray[np.int64], seed: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Legend, and one picture per embedding, of each colour column; and the columns that have a single value.

    Columns that group the cells identically share their pictures.
    """
    positions = {name: UmapMap(points[measured], seed=seed).positions for name, points in cells.spaces.items()}
    columns = dict.fromkeys([*settings.labels, *_COLOURED_BY, *settings.batches])
    labels = {name: cells.obs[name].iloc[measured] for name in columns if name in cells.obs}
    unmapped = {name: _only_value(values) for name, values in labels.items() if values.nunique(dropna=False) < 2}
    same_as = same_groups({name: values for name, values in labels.items() if name not in unmapped})
    shown = []
    for column, values in labels.items():
        if column in unmapped or column in same_as:
            continue
        legend = figures.legend_of(values)
        pictures = {name: figures.map_image(places, values, legend, seed=seed) for name, places in positions.items()}
        same = [name for name, first in same_as.items() if first == column]
        shown.append({"column": column, "same": same, "legend": legend, "pictures": pictures})
    return shown, unmapped


def _only_value(values: pd.Series) -> str:
    return "missing" if values.isna().all() else str(values.iloc[0])


def _tables(found: Evaluation, spaces: list[str]) -> list[dict[str, Any]]:
    """One table per column, with one row per metric and one score per embedding."""
    tables: dict[tuple[str, str], dict[str, dict[str, Score]]] = {}
    for name in spaces:
        for score in found.scores.get(name, []):
            tables.setdefault((score.about, score.column), {}).setdefault(score.metric, {})[name] = score
    return [
        {
            "about": about,
            "column": column,
            "same": [name for name, first in found.same_as.items() if first == column],
            "rows": rows,
            "levels": [level for level in (CHANCE, MIXED, WITHIN) if _has_level(rows, level)],
            "notes": sorted({score.note for row in rows.values() for score in row.values() if score.note}),
        }
        for wanted in (BIOLOGY, BATCH)
        for (about, column), rows in tables.items()
        if about == wanted
    ]


def _has_level(rows: dict[str, dict[str, Score]], level: str) -> bool:
    return any(level in score.levels for row in rows.values() for score in row.values())


def _breakdowns(found: Evaluation, spaces: list[str]) -> list[dict[str, Any]]:
    """One table per column, with one row per value and the measures of each embedding."""
    columns = list(dict.fromkeys(column for tables in found.breakdowns.values() for column in tables))
    shown = []
    for column in columns:
        tables = {name: found.breakdowns[name][column] for name in spaces if name in found.breakdowns}
        first = next(iter(tables.values()))
        rows = [
            {"name": name, "cells": int(first.loc[name, "cells"]), "by": {k: t.loc[name] for k, t in tables.items()}}
            for name in first.index[:MOST_ROWS]
        ]
        shown.append({"column": column, "rows": rows, "n_values": len(first)})
    return shown


def _training(directory: Path) -> dict[str, Any] | None:
    """Training of the model, as recorded in the run directory."""
    workspace = Workspace(directory)
    prepare, train = workspace.whole_record("prepare"), workspace.whole_record("train")
    if not prepare or not train:
        return None
    curves = {name: train["learning_curves"][name] for name in _CURVES if train["learning_curves"].get(name)}
    return {
        "prepare": prepare,
        "train": train,
        "method": family_of(train["config"].get("model", {}).get("kind", SCVI)).title,
        "curves": figures.draw_curves(curves, list(curves)) if curves else None,
        "final": {name: values[-1] for name, values in curves.items()},
        "hardware": ", ".join(train["hardware"].get("gpus", [])) or f"{train['hardware']['cores']} cores",
    }


def _gates(directory: Path) -> list[dict[str, Any]]:
    path = directory / QA
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["gates"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or run scvi-publish.py again") from None
