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
from matplotlib.patches import Rectangle

from census_scvi.annotation.results.markers import Dots

# Okabe and Ito's palette without black: colour-blind readers can separate these colours. Numbers on the map help.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#7F7F7F")
MOST_NAMED = 24
_OTHER = "#D9D9D9"
_POINTS, _DPI = 30_000.0, 110
_ABREAST = 3  # heat maps next to each other


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
    size = _area(len(names))
    shown = [colours.get(names[row], _OTHER) for row in order]
    axes.scatter(positions[order, 0], positions[order, 1], s=size, c=shown, linewidths=0)
    for number, _, name, _ in legend.entries:
        across, up = _densest(positions[names == name])
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axes.text(across, up, str(number), fontsize=9, ha="center", va="center", bbox=box)
    return data_url(figure)


def on_reference_image(
    reference: npt.NDArray[np.float32], positions: npt.NDArray[np.float32], labels: pd.Series, legend: Legend
) -> str:
    """Scatter plot of cells, (cells, 2), coloured by label, on top of the cells of a reference in grey."""
    figure = Figure(figsize=(5, 4.4))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    axes.scatter(reference[:, 0], reference[:, 1], s=_area(len(reference)), c="0.86", linewidths=0)
    colours = {name: colour for _, colour, name, _ in legend.entries}
    order = np.random.default_rng(0).permutation(len(positions))  # random order, so that no group covers the others
    shown = [colours.get(str(labels.iloc[row]), _OTHER) for row in order]
    axes.scatter(positions[order, 0], positions[order, 1], s=_area(len(positions)), c=shown, linewidths=0)
    return data_url(figure)


def _area(n_cells: int) -> float:
    """Area of a marker."""
    return min(max(_POINTS / max(n_cells, 1), 0.5), 30)


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
    return data_url(figure)


def dot_plot(panels: Mapping[str, Dots], types: Sequence[str], genes: Sequence[str], owners: Sequence[str]) -> str:
    """Dot plots of the same genes in the same types: area by share of cells with the gene, colour by mean expression.

    Parameters
    ----------
    panels
        Expression by title, (types, genes) each.
    types, genes
        Names of rows and columns.
    owners
        Type of which each gene is a marker; brackets mark its genes.
    """
    width, height = 1.4 + 0.24 * len(genes) + _text(types), 0.5 + 0.26 * len(types) + _text(genes)
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    rows, columns = np.indices((len(types), len(genes)))
    top = max(float(np.nanmax(dots.mean)) for dots in panels.values())
    for axes, (title, dots) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels.items(), strict=True):
        shown = np.isfinite(dots.mean)
        drawn = axes.scatter(
            columns[shown], rows[shown], s=110 * dots.share[shown], c=dots.mean[shown], cmap="Blues", vmin=0, vmax=top,
            edgecolors="#5b6875", linewidths=0.3,
        )  # fmt: skip
        for type_ in dict.fromkeys(owners):
            places = [place for place, owner in enumerate(owners) if owner == type_]
            row = list(types).index(type_)
            axes.add_patch(
                Rectangle((places[0] - 0.5, row - 0.5), len(places), 1, fill=False, edgecolor="#D55E00", lw=0.9)
            )
        axes.set_xticks(range(len(genes)), genes, rotation=90, fontsize=8)
        axes.set_yticks(range(len(types)), types, fontsize=8)
        axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(types) - 0.4, -0.6))
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(drawn, ax=axes, fraction=0.02, aspect=12).set_label("mean log expression", fontsize=8)
    return data_url(figure)


def table_of_labels(shares: Mapping[str, pd.DataFrame]) -> str:
    """Heat maps of shares, one per title: rows are labels of the annotation, columns those of an annotator."""
    frames = list(shares.values())
    names = [name for frame in frames for name in (*frame.index, *frame.columns)]
    side = 0.5 + 0.24 * max(max(frame.shape) for frame in frames) + _text(names)
    n_rows, n_columns = -(-len(frames) // _ABREAST), min(len(frames), _ABREAST)
    figure = Figure(figsize=(side * n_columns, side * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes in grid[len(frames) :]:
        axes.set_axis_off()
    for axes, (title, frame) in zip(grid, shares.items(), strict=False):
        axes.imshow(frame.to_numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(frame.shape[1]), frame.columns, rotation=90, fontsize=8)
        axes.set_yticks(range(frame.shape[0]), frame.index, fontsize=8)
        for row, column in zip(*np.nonzero(frame.to_numpy() >= 0.05), strict=True):
            share = frame.iloc[row, column]
            colour = "white" if share > 0.6 else "#1d2733"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return data_url(figure, tight=True)


def value_map(positions: npt.NDArray[np.float32], values: npt.NDArray[np.floating], title: str) -> str:
    """Scatter plot of cells, (cells, 2), coloured by a number from 0 to 1; low values on top."""
    figure = Figure(figsize=(5, 4.4))
    axes = figure.add_axes((0.01, 0.01, 0.84, 0.98))
    axes.set_axis_off()
    order = np.argsort(-values, kind="stable")
    size = _area(len(values))
    drawn = axes.scatter(
        positions[order, 0], positions[order, 1], s=size, c=values[order], cmap="cividis", vmin=0, vmax=1, linewidths=0
    )
    figure.colorbar(drawn, cax=figure.add_axes((0.87, 0.3, 0.025, 0.4))).set_label(title, fontsize=9)
    return data_url(figure)


def _text(names: Sequence[str]) -> float:
    """Inches for the longest of some names as labels of an axis."""
    return 0.3 + 0.075 * max(map(len, names))


def data_url(figure: Figure, *, tight: bool = False) -> str:
    """A figure as a PNG data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight" if tight else None)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
