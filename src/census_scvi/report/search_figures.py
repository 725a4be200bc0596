"""Figures of the report of a search as PNG data URLs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from census_scvi.report.figures import COLOURS, data_url
from census_scvi.search.settings import Range
from census_scvi.search.trials import FINAL, STOPPED, Trial

_GREY, _BEST = "#9AA5B1", "#0072B2"


def learning_curves(groups: Mapping[str, Sequence[Trial]], names: Mapping[int, str]) -> str:
    """Validation ELBO by epoch of every trial, complete: a panel for each set of genes and batches.

    Parameters
    ----------
    groups
        Trials by panel: losses can be compared within a panel only.
    names
        Name of the finalist that a trial belongs to, by the number of the trial; others are grey.
    """
    figure = Figure(figsize=(7.2, 3.6 * len(groups)), layout="constrained")
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(dict.fromkeys(names.values()))}
    for axes, (title, trials) in zip(np.atleast_1d(figure.subplots(len(groups), 1)), groups.items(), strict=True):
        labelled: set[str] = set()
        lowest = 1.0
        for trial in sorted(trials, key=lambda trial: trial.number in names):
            losses = np.array(trial.curves.get("elbo_validation", []), float)
            if not len(losses):
                continue
            lowest = min(lowest, float(np.nanmin(losses)))
            name = names.get(trial.number, "other trials")
            colour = colours.get(name, _GREY)
            epochs = np.arange(1, len(losses) + 1)
            label = None if name in labelled else name
            axes.plot(epochs, losses, color=colour, lw=1.4 if name in colours else 0.8, alpha=0.85, label=label)
            if trial.status == STOPPED:
                axes.plot(epochs[-1:], losses[-1:], "x", color=colour, ms=5)
            labelled.add(name)
        if lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="validation ELBO per cell (nats)")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return data_url(figure)


def parallel_coordinates(
    table: pd.DataFrame, space: Mapping[str, list[Any] | Range], score: str, low_best: bool
) -> str:
    """A line for each trial through its settings and its score; the darker, the better.

    Parameters
    ----------
    table
        Trials with a score.
    space
        The space.
    score
        Name of the last axis; the column `shown` has its values.
    low_best
        Whether low values are good.
    """
    names = [*space, score]
    figure = Figure(figsize=(1.6 + 1.5 * len(names), 3.9), layout="constrained")
    axes = figure.subplots()
    places = np.column_stack([*(_places(table[name], space[name]) for name in space), _scaled(table["shown"])])
    quality = _scaled(table["shown"])
    quality = 1 - quality if low_best else quality
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, places.shape)
    jitter[:, -1] = 0
    for row in np.argsort(quality):
        colour = _BEST if quality[row] == quality.max() else _GREY
        axes.plot(range(len(names)), (places + jitter)[row], color=colour, lw=1.2, alpha=0.25 + 0.75 * quality[row])
    for column, name in enumerate(space):
        axes.axvline(column, color="#1d2733", lw=0.8)
        for place, text in _ticks(space[name]):
            axes.text(column + 0.04, place, text, fontsize=8, va="center", bbox={"fc": "white", "ec": "none", "pad": 1})
    axes.axvline(len(names) - 1, color="#1d2733", lw=0.8)
    for value in (table["shown"].min(), table["shown"].max()):
        place = float(_scaled(pd.Series([value, table["shown"].min(), table["shown"].max()]))[0])
        axes.text(len(names) - 0.96, place, f"{value:,.4g}", fontsize=8, va="center")
    axes.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names], fontsize=8)
    axes.set(yticks=[], xlim=(-0.1, len(names) - 0.6), ylim=(-0.08, 1.08))
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return data_url(figure)


def _places(column: pd.Series, values: list[Any] | Range) -> np.ndarray:
    if isinstance(values, list):
        texts = [_text(value) for value in values]
        return np.array([texts.index(_text(value)) / (len(texts) - 1) for value in column])
    numbers, ends = column.to_numpy(float), np.array([values.low, values.high], float)
    if values.log:
        numbers, ends = np.log(numbers), np.log(ends)
    return np.asarray((numbers - ends[0]) / (ends[1] - ends[0]))


def _ticks(values: list[Any] | Range) -> list[tuple[float, str]]:
    if isinstance(values, list):
        return [(place / (len(values) - 1), _text(value)) for place, value in enumerate(values)]
    return [(0.0, f"{values.low:g}"), (1.0, f"{values.high:g}")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and not value.startswith('"') else json.dumps(value)


def _scaled(values: pd.Series) -> np.ndarray:
    numbers = values.to_numpy(float)
    width = np.ptp(numbers)
    return (numbers - numbers.min()) / width if width > 0 else np.full(len(numbers), 0.5)


def importance(shares: Mapping[str, float]) -> str:
    """Bars: share of the variance of the score that each setting explains."""
    figure = Figure(figsize=(6.4, 0.7 + 0.36 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color=_BEST, height=0.6)
    axes.set(xlabel="share of the variance of the score", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return data_url(figure)


def score_and_cost(table: pd.DataFrame, score: str, cost: str, front: pd.DataFrame) -> str:
    """Score against cost of every finished trial, with the Pareto front: trials that none beats at less cost."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for part, marker, label in (("search", "o", "search"), (FINAL, "D", "further seeds")):
        some = table[table["part"] == part]
        if len(some):
            axes.scatter(some[cost], some["shown"], s=26, marker=marker, color=_GREY, label=label, alpha=0.9)
    axes.plot(front[cost], front["shown"], "-o", color=_BEST, ms=5, lw=1.3, label="Pareto front")
    for _, row in front.iterrows():
        axes.annotate(f" {row['trial']:.0f}", (row[cost], row["shown"]), fontsize=8, color=_BEST)
    axes.set(xlabel=cost.replace("_seconds", "-seconds").replace("cpu", "CPU").replace("gpu", "GPU"), ylabel=score)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return data_url(figure)
