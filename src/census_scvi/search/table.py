"""The table of all trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from census_scvi.search.choose import measures_of, score_of
from census_scvi.search.trials import Trial


def table_of(trials: Sequence[Trial], names: Sequence[str], weights: Mapping[str, float]) -> pd.DataFrame:
    """One row per trial, failed and stopped ones included; what is not known is empty.

    Parameters
    ----------
    trials
        The trials.
    names
        The searched settings; a trial of the default that the space does not contain has none of them.
    weights
        The metric.

    Returns
    -------
    Columns `trial`, `part`, the settings, `seed`, `status`, `epochs`, `score` (the metric, higher is better), `elbo`,
    `reconstruction`, `kl`, `active_units`, `bio`, `batch`, each score of the embedding, `parameters`, `seconds`,
    `cpu_seconds`, `gpu_seconds`, `memory_bytes`, `error`.
    """
    return pd.DataFrame([_row(trial, names, weights) for trial in trials])


def _row(trial: Trial, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, Any]:
    measured, record = trial.measured, trial.record
    cost = trial.cost
    return {
        "trial": trial.number,
        "part": trial.part,
        **{name: _cell(trial.settings.get(name)) for name in names},
        "seed": trial.seed,
        "status": trial.status,
        "epochs": len(trial.curves.get("elbo_train", [])),
        "score": score_of(trial, weights),
        **measures_of(trial),
        "active_units": measured.get("active_units"),
        **{f"{score['metric']} {score['column']}": score["value"] for score in measured.get("scores", [])},
        "parameters": record["counts"]["parameters"] if record else None,
        **{name: cost.get(name) for name in ("seconds", "cpu_seconds", "gpu_seconds", "memory_bytes")},
        "error": trial.error,
    }


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
