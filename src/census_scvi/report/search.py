"""Report of a search: what was chosen and why, learning curves, settings and scores, cost, winner and default."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from census_scvi.files.atomic import write_text
from census_scvi.report import search_figures as figures
from census_scvi.report.page import render
from census_scvi.search.choose import Choice, distinct, metric_words, tried_of, words_of
from census_scvi.search.settings import SearchSection
from census_scvi.search.space import Settings, study_of
from census_scvi.search.study import Study
from census_scvi.search.table import table_of
from census_scvi.search.trials import FAILED, STOPPED, Trial
from census_scvi.workspace.provenance import package_versions

_PACKAGES = ("census-scvi", "scvi-tools", "torch")
_FEWEST_FOR_IMPORTANCE = 4


def write_search_report(path: Path, study: Study, choice: Choice, settings: SearchSection, data: Sequence[str]) -> None:
    """Write the page.

    Parameters
    ----------
    path
        The HTML file.
    study
        The finished search.
    choice
        The winner, and why.
    settings
        The section `search`.
    data
        Searched settings that change the prepared file: losses are compared only between trials that agree in them.
    """
    trials = study.trials
    table = table_of(trials, list(settings.space), settings.weights)
    table["shown"] = -table["score"] if list(settings.weights) == ["elbo"] else table["score"]
    winner, default = choice.winner.settings, study.default
    problems = sorted({problem for trial in trials for problem in trial.measured.get("problems", [])})
    page = render(
        "search.html.jinja",
        sentence=choice.sentence,
        metric=metric_words(settings.weights),
        n_settings=len(settings.space),
        data=list(data),
        problems=problems,
        counts=_counts(trials),
        budget=_budget(study, settings),
        finals=_finals(study, settings, winner),
        curves=figures.learning_curves(_groups(trials, data), _named(study)),
        parallel=_parallel(table, settings),
        importance=_importance(study, settings),
        pareto=_pareto(table, settings),
        benchmark=_benchmark(study, winner, default),
        rows=_rows(table.drop(columns="shown")),
        columns=[str(name) for name in table.columns if name != "shown"],
        packages={name: number for name, number in package_versions().items() if name in _PACKAGES},
    )
    write_text(path, page)


def _counts(trials: Sequence[Trial]) -> str:
    stopped, failed = (sum(trial.status == status for trial in trials) for status in (STOPPED, FAILED))
    return f"{len(trials)} trainings, {stopped} stopped early, {failed} failed"


def _budget(study: Study, settings: SearchSection) -> str:
    cells: dict[str, int] = next((trial.record["counts"] for trial in study.trials if trial.record), {})
    epochs = "the searched number of" if "train.max_epochs" in settings.space else f"at most {study.max_epochs}"
    return (
        f"{epochs} epochs of {cells.get('training_cells', 0):,} training cells, and"
        f" {cells.get('validation_cells', 0):,} validation cells"
    )


def _finals(study: Study, settings: SearchSection, winner: Settings) -> list[dict[str, Any]]:
    """A row per finalist: its scores by seed, and its size."""
    sign = -1.0 if list(settings.weights) == ["elbo"] else 1.0
    return [
        {
            "name": words_of(each.settings),
            "winner": each.settings == winner,
            "default": each.settings == study.default,
            "scores": [_text(sign * score) for score in each.scores],
            "mean": _text(sign * each.mean),
            "parameters": f"{each.parameters:,}",
            "epochs": each.epochs,
        }
        for each in sorted(study.results(), key=lambda each: -each.mean)
    ]


def _groups(trials: Sequence[Trial], data: Sequence[str]) -> dict[str, list[Trial]]:
    """Trials by the settings that change the prepared file."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        name = ", ".join(f"{key} {json.dumps(trial.settings[key])}" for key in data if key in trial.settings)
        found.setdefault(name or ("the default's genes and batches" if data else "all trials"), []).append(trial)
    return found


def _named(study: Study) -> dict[int, str]:
    wanted = study.finalists()
    return {trial.number: words_of(trial.settings) for trial in study.trials if trial.settings in wanted}


def _parallel(table: pd.DataFrame, settings: SearchSection) -> str | None:
    known = table[table["shown"].notna() & table[list(settings.space)].notna().all(axis=1)]
    if len(known) < 2:
        return None
    by_elbo = list(settings.weights) == ["elbo"]
    return figures.parallel_coordinates(known, settings.space, metric_words(settings.weights), by_elbo)


def _importance(study: Study, settings: SearchSection) -> str | None:
    """Bars of Optuna's importance (fANOVA, Hutter et al. 2014); None with too few trials."""
    tried = [each for each in tried_of(study.trials, settings.weights) if each.score is not None]
    if len(tried) < _FEWEST_FOR_IMPORTANCE or np.ptp([float(each.score or 0) for each in tried]) == 0:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=study.seed)
    shares = optuna.importance.get_param_importances(study_of(settings.space, tried), evaluator=evaluator)
    return figures.importance(shares)


def _pareto(table: pd.DataFrame, settings: SearchSection) -> dict[str, Any] | None:
    """Picture of score against cost, and the trials of the Pareto front."""
    cost = "gpu_seconds" if table["gpu_seconds"].sum() > 0 else "cpu_seconds"
    known = table[table["score"].notna() & table[cost].notna()].sort_values([cost, "score"], ascending=[True, False])
    if not len(known):
        return None
    front = known[known["score"] > known["score"].cummax().shift(fill_value=-math.inf)]
    picture = figures.score_and_cost(known, metric_words(settings.weights), cost, front)
    return {"picture": picture, "trials": [int(number) for number in front["trial"]]}


def _benchmark(study: Study, winner: Settings, default: Settings) -> dict[str, Any]:
    """Every score of the validation cells of winner and default: mean and range over their finished seeds."""
    shown = distinct([winner, default])
    by_settings = [_scores_of(study.of(settings)) for settings in shown]
    keys = list(dict.fromkeys(key for scores in by_settings for key in scores))
    names = [f"{'winner' if each == winner else 'default'}: {words_of(each)}" for each in shown]
    if winner == default:
        names = [f"winner, which is the default: {words_of(winner)}"]
    rows = [
        {
            "metric": metric.replace("_", " "),
            "column": column,
            "values": [_spread(s.get((metric, column))) for s in by_settings],
        }
        for metric, column in keys
    ]
    return {"names": names, "rows": rows}


def _scores_of(trials: Sequence[Trial]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        units = trial.measured.get("active_units")
        if units is not None:
            found.setdefault(("active_units", ""), []).append(float(units))
        for score in trial.measured.get("scores", []):
            if score["value"] is not None:
                found.setdefault((score["metric"], score["column"]), []).append(float(score["value"]))
    return found


def _spread(values: list[float] | None) -> str:
    if not values:
        return "–"
    return f"{_text(float(np.mean(values)))} ({_text(min(values))} to {_text(max(values))})"


def _rows(table: pd.DataFrame) -> list[list[str]]:
    return [[_text(value) for value in row] for row in table.itertuples(index=False, name=None)]


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):  # NumPy's float64, too
        if value.is_integer():
            return f"{value:,.0f}"
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)
