"""Figures of the report as PNG data URLs: UMAPs of the cells, and learning curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's palette without black: colour-blind readers can separate these colours. Numbers on the map help.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#7F7F7F")
MOST_NAMED = 24
_OTHER = "#D9D9D9"
_POINTS, _DPI = 30_000.0, 110


@dataclass(frozen=True)
class Legend:
    """Legend of the numbers and colours of a UMAP.

    Attributes
    ----------
    entries
        Number, colour, label and number of cells, most frequent first.
    others
        Labels without number and colour; their cells are drawn in grey.
    """

    entries: list[tuple[int, str, str, int]]
    others: int


def legend_of(labels: pd.Series) -> Legend:
    """Numbers and colours of the most frequent labels."""
    counts = labels.dropna().astype(str).value_counts()
    entries = [
        (number, COLOURS[(number - 1) % len(COLOURS)], str(name), int(cells))
        for number, (name, cells) in enumerate(counts.head(MOST_NAMED).items(), start=1)
    ]
    return Legend(entries, max(len(counts) - MOST_NAMED, 0))


def map_image(positions: npt.NDArray[np.float32], labels: pd.Series, legend: Legend, *, seed: int = 0) -> str:
    """Scatter plot of cells, (cells, 2), coloured by label, with the number of each label amid its cells."""
    figure = Figure(figsize=(5, 4.4))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    names = labels.astype(str).to_numpy()
    colours = {name: colour for _, colour, name, _ in legend.entries}
    order = np.random.default_rng(seed).permutation(len(names))  # random order, so that no group covers the others
    size = min(max(_POINTS / max(len(names), 1), 0.5), 30)
    shown = [colours.get(names[row], _OTHER) for row in order]
    axes.scatter(positions[order, 0], positions[order, 1], s=size, c=shown, linewidths=0)
    for number, _, name, _ in legend.entries:
        across, up = _densest(positions[names == name])
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axes.text(across, up, str(number), fontsize=9, ha="center", va="center", bbox=box)
    return _data_url(figure)


def _densest(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Position of the cell nearest to the median of a label's cells."""
    middle = np.median(points, axis=0)
    nearest: npt.NDArray[np.float32] = points[np.square(points - middle).sum(axis=1).argmin()]
    return nearest


def draw_curves(curves: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Learning curves by epoch."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, name in zip(COLOURS, names, strict=False):
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], color=colour, label=name.replace("_", ", "))
    axes.set(xlabel="epoch", ylabel="loss a cell (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _data_url(figure)


def _data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
