"""UMAP pictures: cells before and after integration, cells by label, and a user's cells on a reference."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from census_scvi.neighbors.log_pca import log_pca
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.pictures.canvas import Picture

_POINTS = 30_000.0  # marker area times number of cells: the fewer cells, the larger the markers
_SMALLEST, _LARGEST = 0.5, 30.0
_NO_LABEL = "unknown"
# Marker areas and numbers of cells for a user's cells on the UMAP of a reference: each of few cells should be visible.
_LEAST_OWN, _EDGED, _LARGE_OWN, _VERY_FEW = 8.0, 2_000, 70.0, 50
_LEGEND_ENTRIES = 24


def draw_before_and_after(
    cells: ad.AnnData, latent: npt.NDArray[np.float32], path: Path, *, seed: int, batch: str = "batch"
) -> None:
    """Four UMAPs: a PCA of log-normalised counts and the latent, each coloured by cell type and by batch.

    Parameters
    ----------
    cells
        Raw counts (cells, genes); obs has the column `cell_type` and the column given by `batch`.
    latent
        float32 (cells, n_latent), one row per cell.
    path
        PNG to write.
    seed
        Seed of UMAP and of the drawing order.
    batch
        obs column of the batches.
    """
    embeddings = {
        "before: PCA of log-normalised counts": UmapMap(log_pca(cells.X), seed=seed).positions,
        "after: scVI latent": UmapMap(latent, seed=seed).positions,
    }
    figure = Picture(figsize=(15, 11), layout="constrained")
    axes = figure.subplots(2, 2)
    order = np.random.default_rng(seed).permutation(cells.n_obs)  # no group is drawn on top of the others
    for column, (title, positions) in enumerate(embeddings.items()):
        for row, key in enumerate(("cell_type", batch)):
            labels = cells.obs[key].astype("category").cat.remove_unused_categories()
            scatter(axes[row, column], positions[order], labels.iloc[order], legend=column == 1)
            axes[row, column].set_title(f"{title}, by {key.replace('_', ' ')}", fontsize=12, loc="left")
    figure.savefig(path, dpi=110)


def draw_map(positions: npt.NDArray[np.float32], labels: pd.Series, title: str) -> Figure:
    """Cells on a UMAP, positions (cells, 2), coloured by label; the legend starts with the most frequent label."""
    figure = Picture(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    order = np.random.default_rng(0).permutation(len(positions))  # no group is drawn on top of the others
    names = labels.astype(str).value_counts().index
    scatter(axes, positions[order], _categorical(labels, names).iloc[order], legend=True)
    axes.set_title(f"{len(positions):,} cells, by {title}", fontsize=12, loc="left")
    return figure


def draw_on_reference(
    reference: npt.NDArray[np.float32],
    reference_labels: pd.Series,
    query: npt.NDArray[np.float32],
    query_labels: pd.Series,
    title: str,
) -> Figure:
    """Two UMAPs: the reference coloured by its labels, and the query by its labels on top of the reference in grey.

    The fewer query cells there are, the larger they are drawn.

    Parameters
    ----------
    reference, query
        float32 (cells, 2): positions on the same UMAP.
    reference_labels, query_labels
        Labels, one row per cell; equal labels get equal colours.
    title
        Name of the labels.
    """
    figure = Picture(figsize=(15, 6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    # The most frequent labels first, because the legend has space for some labels only.
    names = pd.concat([reference_labels.astype(str), query_labels.astype(str)]).value_counts().index
    order = np.random.default_rng(0).permutation(len(reference))  # no group is drawn on top of the others
    scatter(axes[0], reference[order], _categorical(reference_labels, names).iloc[order], legend=False)
    axes[0].set_title(f"reference, {len(reference):,} cells, by {title}", fontsize=12, loc="left")
    axes[1].scatter(reference[:, 0], reference[:, 1], s=_size(len(reference)), c="0.88", linewidths=0, rasterized=True)
    order = np.random.default_rng(0).permutation(len(query))
    few = len(query) <= _EDGED  # a dark edge makes single cells visible, but many cells black
    scatter(
        axes[1], query[order], _categorical(query_labels, names).iloc[order], legend=True,
        size=_own_size(len(query)), edge=0.4 if few else 0.0,
    )  # fmt: skip
    axes[1].set_title(f"your {len(query):,} cells, by predicted {title}", fontsize=12, loc="left")
    return figure


def _categorical(labels: pd.Series, names: pd.Index) -> pd.Series:
    return pd.Series(pd.Categorical(labels.astype(str), categories=names))


def _size(n_cells: int) -> float:
    """Area of a marker."""
    return min(max(_POINTS / max(n_cells, 1), _SMALLEST), _LARGEST)


def _own_size(n_cells: int) -> float:
    """Area of a marker of a user's cell, which is drawn on top of the reference."""
    if n_cells <= _VERY_FEW:
        return _LARGE_OWN
    return max(_size(n_cells), _LEAST_OWN) if n_cells <= _EDGED else _size(n_cells)


def scatter(
    axes: Axes,
    positions: npt.NDArray[np.float32],
    labels: pd.Series,
    *,
    legend: bool,
    size: float | None = None,
    edge: float = 0.0,
) -> None:
    """Scatter plot of cells coloured by a categorical, with the legend next to it.

    Parameters
    ----------
    axes, positions, labels
        Axes to draw on, positions, float32 (cells, 2), and a categorical, one row per cell.
    legend
        Whether to draw a legend: the first 24 categories, in their order.
    size, edge
        Area of a marker (None: by the number of cells), and width of its dark edge.
    """
    categories = list(labels.cat.categories)
    colours = _colours(len(categories))
    colours[[str(name) == _NO_LABEL for name in categories]] = (0.35, 0.35, 0.35, 1)  # unknown is not a type
    codes = labels.cat.codes.to_numpy()
    axes.scatter(
        positions[:, 0], positions[:, 1], s=size or _size(len(labels)), c=colours[codes], linewidths=edge,
        edgecolors="0.15" if edge else "none", rasterized=True,
    )  # fmt: skip
    axes.set_axis_off()
    if legend:
        for code, name in enumerate(categories[:_LEGEND_ENTRIES]):
            axes.scatter([], [], s=30, color=colours[code], label=str(name))
        more = f"and {len(categories) - _LEGEND_ENTRIES} more" if len(categories) > _LEGEND_ENTRIES else None
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, title=more)


def _colours(number: int) -> npt.NDArray[np.float64]:
    """RGBA colours, float64 (number, 4)."""
    if number <= 20:
        return np.array([mpl.colormaps["tab20"](i) for i in range(number)])
    return np.asarray(mpl.colormaps["gist_ncar"](np.linspace(0.02, 0.95, number)))
