"""Metrics of biological conservation: how well an embedding separates the values of a label."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import scib_metrics
from sklearn.metrics import silhouette_samples

from census_scvi.config.random_streams import Stream, generator
from census_scvi.errors import UserError
from census_scvi.metrics.cluster_agreement import adjusted_rand_index, agreement, normalized_mutual_information
from census_scvi.metrics.hierarchy import Lineage
from census_scvi.metrics.score import (
    BIOLOGY,
    CHANCE,
    FEWEST_CELLS,
    Names,
    Points,
    Score,
    classified,
    mean_of,
    neighbor_graph,
    scaled_lisi,
    scored,
    usable,
)  # fmt: skip
from census_scvi.metrics.space import Space


def biology(
    space: Space,
    column: str,
    labels: Names,
    donors: Names | None,
    batches: Names,
    lineage_of: Callable[[list[str]], Lineage | None] | None = None,
) -> list[Score]:
    """Scores of how well an embedding separates the values of a label.

    Parameters
    ----------
    space
        The embedding.
    column
        Name of the label.
    labels, batches
        (measured cells,): the label (None if it is missing or uninformative), and the batch.
    donors
        (measured cells,): groups that are held out and resampled as a whole; None: no groups.
    lineage_of
        Function from labels to the terms above each, bool (labels, terms), or None if they have none; see
        `metrics.hierarchy`. None: no hierarchical metrics.

    Raises
    ------
    UserError
        Fewer than two labels have ten or more cells.
    """
    known = usable(labels)
    names, codes = np.unique(labels[known].astype(str), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"{column} has too few usable values, {len(names)} (known, with at least {FEWEST_CELLS} measured cells);"
            " two are needed"
        )
    points = space.points[known]
    groups = None if donors is None else donors[known]
    shuffled = generator(space.seed, Stream.SHUFFLED_LABELS).permutation(codes)
    left_out = f"{(~known).sum():,} cells without a usable label excluded" if not known.all() else ""
    score = partial(scored, about=BIOLOGY, column=column, groups=groups, seed=space.seed, note=left_out)
    clusterings = [clusters[known] for clusters in space.clusterings]
    found, every = [], np.arange(len(codes))
    best = max(clusterings, key=lambda clusters: agreement(normalized_mutual_information, codes, clusters)(every))
    for metric, measure in (("leiden_nmi", normalized_mutual_information), ("leiden_ari", adjusted_rand_index)):
        chance = max(agreement(measure, shuffled, clusters)(every) for clusters in clusterings)
        found.append(score(metric, agreement(measure, codes, best), len(codes), {CHANCE: chance}))
    widths = (silhouette_samples(points, codes) + 1) / 2
    chance = float(((silhouette_samples(points, shuffled) + 1) / 2).mean())
    found.append(score("silhouette_label", mean_of(widths), len(codes), {CHANCE: chance}))
    lineage = lineage_of(names.tolist()) if lineage_of else None
    found += classified(score, points, codes, groups, mixed=False, seed=space.seed, lineage=lineage)
    graph = neighbor_graph(points)
    real, random = (
        partial(scaled_lisi, scib_metrics.lisi_knn(graph, values), len(names), keep=True)
        for values in (codes, shuffled)
    )
    found.append(score("clisi", real, len(codes), {CHANCE: random(every)}))
    if len(np.unique(batches[known].astype(str))) > 1:
        found.append(_isolated(points, column, names[codes], names[shuffled], batches[known], left_out))
    return found


def _isolated(points: Points, column: str, labels: Names, shuffled: Names, batches: Names, note: str) -> Score:
    """Isolated label score: silhouette of the labels that occur in the fewest batches."""
    value, chance = (
        float(scib_metrics.isolated_labels(points, values.astype(str), batches.astype(str)))
        for values in (labels, shuffled)
    )
    return Score("isolated_labels", BIOLOGY, column, value, None, None, {CHANCE: chance}, len(labels), note)
