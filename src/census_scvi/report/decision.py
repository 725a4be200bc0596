"""The page and the text of a decision: keep a model, fine-tune it or train it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from census_scvi.files.atomic import write_text
from census_scvi.report.page import render
from census_scvi.workspace.provenance import package_versions

# Name, title, meaning, and format of each line of the table.
_LINES = (
    ("elbo_new", "ELBO, new cells", "negative, per held-out cell; lower is better", ".1f"),
    ("elbo_new_extrapolated", "ELBO, new cells, extrapolated", "at all epochs, by its learning curve", ".1f"),
    ("elbo_old", "ELBO, old cells", "negative, per held-out cell; lower is better", ".1f"),
    ("transfer", "label transfer", "accuracy for held-out cells of new batches, from old cells", ".3f"),
    ("transfer_gain", "label transfer, gain", "compared with the model as it is", "+.3f"),
    ("transfer_error", "standard error of the gain", "paired over cells", ".3f"),
    ("bio", "biology", "mean of the benchmark's metrics, all held-out cells", ".3f"),
    ("batch", "batch mixing", "mean of the benchmark's metrics, all held-out cells", ".3f"),
    ("moved", "old cells moved", "mean distance, as a share of their mean distance from the center", ".3f"),
    (
        "neighbor_overlap",
        "neighbors of old cells",
        "share of the 15 nearest that are the same as by the old model",
        ".2f",
    ),
    ("epochs", "epochs", "", "d"),
    ("train_hours", "hours of training", "", ".4f"),
    ("embed_hours", "hours of embedding", "new cells, or all cells if they moved", ".4f"),
    ("price", "price", "of both", ".2f"),
    ("hours_extrapolated", "hours, extrapolated", "of both, with all epochs", ".4f"),
    ("price_extrapolated", "price, extrapolated", "of both, with all epochs", ".2f"),
)


def write_decision_report(path: Path, record: Mapping[str, Any]) -> None:
    """Write the page of a decision.

    Parameters
    ----------
    path
        NAME.html.
    record
        `recommendation` (sentences), `rows` (values by way and name) and `facts`.
    """
    ways, lines = _table(record)
    page = render("decision.html.jinja", record=record, ways=ways, lines=lines, packages=package_versions())
    write_text(path, page)


def as_text(record: Mapping[str, Any]) -> str:
    """The table and the recommendation as text."""
    ways, lines = _table(record)
    width = max(len(title) for title, _, _ in lines)
    columns = [max(len(way), 9) for way in ways]
    rows = [
        f"{title:<{width}}  " + "  ".join(value.rjust(size) for value, size in zip(values, columns, strict=True))
        for title, values in [("", ways), *((title, values) for title, _, values in lines)]
    ]
    return "\n".join([*rows, "", *record["recommendation"]])


def _table(record: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Names of the ways, and title, meaning and values of each line that has a value."""
    rows: Mapping[str, Mapping[str, Any]] = record["rows"]
    lines = [
        (title, note, [_shown(row.get(name), form) for row in rows.values()]) for name, title, note, form in _LINES
    ]
    return list(rows), [line for line in lines if any(value != "–" for value in line[2])]


def _shown(value: Any, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)
