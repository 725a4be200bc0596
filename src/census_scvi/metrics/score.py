"""A row of the tables of metrics, and functions that the metrics of biology and of batches share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scib_metrics.nearest_neighbors import NeighborsResults

from census_scvi.config.versions import version
from census_scvi.metrics import classify
from census_scvi.metrics.hierarchy import Lineage, hierarchical_scores
from census_scvi.metrics.interval import interval
from census_scvi.neighbors.index import NeighborIndex

BIOLOGY, BATCH = "biology", "batch"
CHANCE, MIXED, WITHIN = "chance", "perfectly mixed", "mixed within types"
FEWEST_CELLS = 10
# Uninformative labels. The published script has a list of some, but does not use it.
VAGUE = ("unknown", "native cell", "animal cell", "eukaryotic cell", "cell", "na", "nan", "None", "")
# Metrics of labels that are terms of the Cell Ontology, and attributes of `HierarchicalScores`.
HIERARCHICAL = {
    "hierarchical_precision": "precision",
    "hierarchical_recall": "recall",
    "hierarchical_f1": "f1",
    "right_or_ancestor": "right_or_ancestor",
}
# Neighbors of LISI, as in scib-metrics' own benchmark.
_LISI_NEIGHBORS = 90
# Classifiers use this number of classes at most, the most frequent ones: the SVM trains on each pair of classes.
MOST_CLASSES = 100

# Metrics whose value changes with the release of scib-metrics: release 0.6 changed LISI.
_OF_SCIB_METRICS = ("clisi", "ilisi", "kbet", "isolated_labels")
# Number of the definitions of all other metrics; a change of one that changes its values takes the next number.
_DEFINITIONS = 1

Points = npt.NDArray[np.float32]
Names = npt.NDArray[np.object_]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes
    ----------
    metric
        Name of the metric in the published tables.
    about
        `biology` or `batch`.
    column
        Name of the label or the batch.
    value
        The score; higher is better: biology is kept, or batches are mixed.
    low, high
        95 % interval by a bootstrap over donors (over cells if there are fewer than five donors); None: no interval.
    levels
        Values to compare it with: `chance`, or `perfectly mixed` and `mixed within types`.
    cells
        Number of cells.
    note
        Held-out groups and excluded cells, for the reader.
    """

    metric: str
    about: str
    column: str
    value: float
    low: float | None = None
    high: float | None = None
    levels: dict[str, float] = field(default_factory=dict)
    cells: int = 0
    note: str = ""


def definition(metric: str) -> str:
    """What defines a metric: values of equal metrics can be compared if this is equal, too."""
    if metric in _OF_SCIB_METRICS:
        return f"scib-metrics {version('scib-metrics')}"
    return f"census-scvi {_DEFINITIONS}"


def scored(
    metric: str, statistic: Callable[[Any], float], n_cells: int, levels: dict[str, float], *, about: str, column: str,
    groups: Names | None, seed: int, note: str = "",
) -> Score:  # fmt: skip
    """The score of a statistic (a function of rows, int64), with its interval."""
    value = statistic(np.arange(n_cells))
    low, high = interval(statistic, groups, n_cells, seed=seed)
    return Score(metric, about, column, value, low, high, levels, n_cells, note)


def mean_of(values: npt.NDArray[np.floating]) -> Callable[[Any], float]:
    """A statistic: the mean of `values` over rows."""
    return lambda rows: float(values[rows].mean())


def usable(labels: Names) -> npt.NDArray[np.bool_]:
    """Cells whose label is not None and has ten cells or more, bool (cells,)."""
    there = np.array([label is not None for label in labels])
    names, numbers = np.unique(labels[there].astype(str), return_counts=True)
    there[there] = np.isin(labels[there].astype(str), names[numbers >= FEWEST_CELLS])
    return there


def neighbor_graph(points: Points) -> NeighborsResults:
    """The 90 nearest neighbors of each cell, in the form that scib-metrics takes."""
    n_neighbors = min(_LISI_NEIGHBORS, len(points) - 1)
    distances, positions = NeighborIndex(points, exact_cells=len(points)).query(points, n_neighbors)
    return NeighborsResults(indices=positions, distances=distances)


def scaled_lisi(lisi: npt.NDArray[np.floating], n_values: int, rows: Any, *, keep: bool) -> float:
    """Median over cells, scaled to 0 to 1; higher means that labels are better separated (`keep`), or better mixed."""
    median = float(np.nanmedian(lisi[rows]))
    return (n_values - median) / (n_values - 1) if keep else (median - 1) / (n_values - 1)


def classified(
    score: Callable[..., Score],
    points: Points,
    codes: Codes,
    groups: Names | None,
    *,
    mixed: bool,
    seed: int,
    lineage: Lineage | None = None,
) -> list[Score]:  # fmt: skip
    """Accuracy of three classifiers; 1 - accuracy if `mixed`, because the label should not be predictable.

    With the terms above each label, bool (labels, terms), also the hierarchical metrics of logistic regression.
    """
    numbers = np.bincount(codes)
    kept = np.isin(codes, np.argsort(-numbers, kind="stable")[:MOST_CLASSES])
    notes = [f"classifiers: the {MOST_CLASSES} most frequent of {len(numbers):,} values"] if not kept.all() else []
    values, codes = np.unique(codes[kept], return_inverse=True)
    points = points[kept]
    groups = None if groups is None else groups[kept]
    found = classify.held_out(points, codes, groups, "donors", seed=seed)
    if found is None:
        return []
    notes.append(f"classifiers: {found.held_out} held out")
    level = {MIXED: 1 - found.majority} if mixed else {CHANCE: found.majority}
    scores = []
    for name, right in found.right.items():
        statistic = mean_of((~right if mixed else right).astype(float))
        drawn = None if groups is None else groups[found.rows]
        options = {"groups": drawn, "note": "; ".join(notes)}
        scores.append(score(f"classifier_{name}", statistic, len(right), level, **options))
    if lineage is not None:
        drawn = None if groups is None else groups[found.rows]
        options = {"groups": drawn, "note": "; ".join(notes)}
        scores += _hierarchical(score, lineage[values], codes[found.rows], found.predicted["lr"], options)
    return scores


def _hierarchical(
    score: Callable[..., Score], lineage: Lineage, truth: Codes, predicted: Codes, options: dict[str, Any]
) -> list[Score]:
    """Hierarchical metrics; chance is the most frequent label for every cell."""
    frequent = np.full(len(truth), np.bincount(truth).argmax())

    def statistic(name: str, answers: Codes, rows: Any) -> float:
        return float(getattr(hierarchical_scores(lineage, truth[rows], answers[rows]), name))

    every = np.arange(len(truth))
    return [
        score(
            metric,
            partial(statistic, name, predicted),
            len(truth),
            {CHANCE: statistic(name, frequent, every)},
            **options,
        )
        for metric, name in HIERARCHICAL.items()
    ]
