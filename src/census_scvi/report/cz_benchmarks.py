"""Scores in the form of cz-benchmarks, for tools that compare models.

Each score is `{"metric_type", "value", "params"}`, as `MetricResult` of cz-benchmarks 0.15 reads it. Only metrics that
are the same there are exported. Classifiers predict a label, as there, but hold out donors; `params` says so.
"""

from __future__ import annotations

import math
from typing import Any

from census_scvi.metrics.score import BIOLOGY, Score

_OF_LABEL: dict[str, tuple[str, dict[str, str]]] = {
    "leiden_nmi": ("normalized_mutual_info", {"clustering": "leiden, the resolution of the greatest NMI"}),
    "leiden_ari": ("adjusted_rand_index", {"clustering": "leiden, the resolution of the greatest NMI"}),
    "silhouette_label": ("silhouette_score", {}),
    **{f"classifier_{name}": ("mean_fold_accuracy", {"classifier": name}) for name in ("lr", "forest", "svm")},
}
_OF_BATCH: dict[str, tuple[str, dict[str, str]]] = {
    "entropy_scaled": ("entropy_per_cell", {"n_neighbors": "200"}),
    "silhouette_batch": ("batch_silhouette", {}),
}


def as_cz_benchmarks(scores: dict[str, list[Score]]) -> dict[str, list[dict[str, Any]]]:
    """The scores of each embedding that cz-benchmarks has, too, if they are numbers."""
    return {name: [result for score in some if (result := _result(score))] for name, some in scores.items()}


def _result(score: Score) -> dict[str, Any] | None:
    """The score in that form; None if it has none."""
    named = (_OF_LABEL if score.about == BIOLOGY else _OF_BATCH).get(score.metric)
    if named is None or not math.isfinite(score.value):
        return None
    name, params = named
    column = {"label" if score.about == BIOLOGY else "batch": score.column}
    note = {"note": score.note} if score.note else {}
    return {
        "metric_type": name,
        "value": score.value,
        "params": column | params | {"cells": str(score.cells)} | note,
    }
