"""Report of an annotation: types found, their markers, disagreement of annotators, uncertain groups of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.methods import TITLES
from census_scvi.annotation.ontology import Hierarchy, back_off
from census_scvi.annotation.protocol import UNKNOWN, Annotated, Annotation
from census_scvi.annotation.results.groups import label_groups
from census_scvi.annotation.results.markers import Markers, dots
from census_scvi.files.atomic import write_json, write_text
from census_scvi.files.json_values import json_values
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.report import figures
from census_scvi.report.page import render
from census_scvi.workspace.provenance import package_versions

# The page shows at most this many types in pictures, and this many groups; the JSON has all.
MOST_TYPES, MOST_GROUPS, _MAP_CELLS, _FEWEST_ON_MAP = 24, 20, 20_000, 10

Names = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Reported:
    """One column of labels in a report.

    Attributes
    ----------
    labels
        obs column of the reference that was predicted.
    annotation
        The annotation of the cells of `query`, in their order.
    query, reference
        X: raw counts (cells, genes) of the same genes; the column `feature_name` of var has gene symbols, if there is
        one. The query's X may be None. `reference.obs` has the column `labels`; None: no markers.
    hierarchy, threshold
        Terms of the labels, and the probability from which a name is given; None: no terms, and the calibrated
        probability of the annotation.
    """

    labels: str
    annotation: Annotation
    query: ad.AnnData
    reference: ad.AnnData | None = None
    hierarchy: Hierarchy | None = None
    threshold: float | None = None


def write_annotation_report(
    path: Path,
    columns: Sequence[Reported],
    *,
    facts: Mapping[str, Any] | None = None,
    refused: Sequence[str] = (),
    positions: npt.NDArray[np.float32] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the page and, next to it, a .json with its numbers.

    Parameters
    ----------
    path
        NAME.html; the numbers are written to NAME.json.
    columns
        Annotations of the same cells; the page has a section for each column of labels.
    facts
        What the reader should know about the input, value by name: file, reference, method.
    refused
        What was not used or not done, and why, one sentence each.
    positions
        float32 (cells, 2): a map of the cells; None: a UMAP of the first annotation's embedding.
    seed
        Seed of UMAP and of the cells for markers.

    Returns
    -------
    The content of the .json: the numbers of the column; with several columns `labels`, their names, and `columns`, the
    numbers of each by name.
    """
    places = _places(columns[0].annotation, positions, seed)
    parts = [_part(column, places, dict(facts or {}), refused, seed) for column in columns]
    records = {part["record"]["labels"]: part["record"] for part in parts}
    page = render(
        "annotation.html.jinja",
        parts=parts,
        facts=dict(facts or {}),
        refused=list(dict.fromkeys(line for record in records.values() for line in record["refused"])),
        packages=package_versions(),
        most_types=MOST_TYPES,
        titles=TITLES,
    )
    content = {"labels": list(records), "columns": records} if len(records) > 1 else next(iter(records.values()))
    write_json(path.with_suffix(".json"), content)
    write_text(path, page)
    return content


def _part(
    column: Reported, places: _Places | None, facts: dict[str, Any], refused: Sequence[str], seed: int
) -> dict[str, Any]:
    """The numbers (`record`) and pictures of one column of labels."""
    annotation, query, reference, hierarchy = column.annotation, column.query, column.reference, column.hierarchy
    labels = column.labels
    threshold = annotation.name_threshold if column.threshold is None else column.threshold
    answer = _Answer.of(annotation, hierarchy, threshold)
    markers = None if reference is None else Markers(reference.X, reference.obs[labels], seed=seed)
    symbols = None if reference is None else _symbols(reference)
    groups = _groups(annotation, query, hierarchy, markers, symbols, threshold)
    of_types = {} if markers is None else markers.of_types()
    record = json_values(
        {
            "labels": labels,
            "cells": query.n_obs,
            "unknown": int(annotation.unknown.sum()),
            "facts": facts,
            "types": _types(annotation, answer, hierarchy, of_types, symbols),
            "not_found": [name for name in annotation.classes if name not in set(answer.shown)],
            "names": _names(answer, hierarchy),
            "threshold": threshold,
            "validation": _validation(annotation.validation),
            "agreement": _agreement(annotation),
            "groups": groups,
            "refused": [*refused, *_without_term(hierarchy)],
            "warnings": list(annotation.warnings),
            "measured": annotation.facts,
            "packages": package_versions(),
        }
    )
    found = [row["label"] for row in record["types"] if row["label"] != UNKNOWN][:MOST_TYPES]
    return {
        "record": record,
        "title": labels.replace("_", " "),
        "uncertain": [group for group in record["groups"] if group["uncertain"]][:MOST_GROUPS],
        "n_uncertain": sum(group["uncertain"] for group in record["groups"]),
        "map": None if places is None else _map(answer, places, seed),
        "dot_plot": _dot_plot(query, reference, labels, answer, of_types, symbols, found),
        "confusion": _confusion(annotation, answer, found),
    }


def reported(found: Annotated, joined: Joined, symbols: Mapping[str, str] | None = None) -> Reported:
    """An annotation for `write_annotation_report`.

    Parameters
    ----------
    found, joined
        The annotation, and the cells that it is of. Without counts, there are no markers.
    symbols
        Gene symbols by feature_id; None: those of `joined`.
    """
    cells, labels = joined.cells, found.labels
    if not cells.genes:
        none = ad.AnnData(shape=(len(cells.query), 0))
        return Reported(labels, found.annotation, none, hierarchy=found.hierarchy)
    names = joined.symbols if symbols is None else [symbols.get(gene, gene) for gene in cells.genes]
    var = pd.DataFrame({"feature_name": names}, index=cells.genes)
    known = joined.labels[labels]
    rows = np.flatnonzero([label is not None for label in known])
    obs = pd.DataFrame({labels: known[rows]}, index=rows.astype(str))
    query, reference = ad.AnnData(cells.counts[cells.n_reference :], var=var), ad.AnnData(cells.counts[rows], obs, var)
    return Reported(labels, found.annotation, query, reference, found.hierarchy)


@dataclass(frozen=True)
class _Answer:
    """Answers for each cell: the label, "unknown" if it is unknown, and its probability; and whether members agree."""

    shown: Names
    probability: npt.NDArray[np.float32]
    agree: npt.NDArray[np.bool_]
    nodes: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, annotation: Annotation, hierarchy: Hierarchy | None, threshold: float) -> _Answer:
        best = annotation.probability.argmax(axis=1)
        names = np.array(annotation.classes, dtype=object)[best]
        votes = [each.argmax(axis=1) == best for each in annotation.members.values()]
        return cls(
            np.where(annotation.unknown, UNKNOWN, names),
            annotation.probability.max(axis=1),
            np.logical_and.reduce(votes) if votes else np.ones(len(best), bool),
            back_off(hierarchy, annotation.probability, threshold).nodes if hierarchy and hierarchy.has_terms else None,
        )


def _validation(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Numbers of each method, without the curves that the table holds as arrays."""
    shown = [name for name in table if pd.api.types.is_numeric_dtype(table[name])]
    return [{"method": TITLES.get(str(name), name), **row} for name, row in table[shown].to_dict("index").items()]


def _types(
    annotation: Annotation,
    answer: _Answer,
    hierarchy: Hierarchy | None,
    markers: Mapping[str, list[int]],
    symbols: Names | None,
) -> list[dict[str, Any]]:
    """A row per type found, the most frequent first; unknown cells last."""
    terms = {} if hierarchy is None else dict(zip(hierarchy.classes, hierarchy.terms, strict=True))
    counts = pd.Series(answer.shown).value_counts()
    rows = []
    for name in sorted(counts.index, key=lambda name: (name == UNKNOWN, -counts[name], name)):
        mine = answer.shown == name
        rows.append(
            {
                "label": name,
                "term": terms.get(name),
                "cells": int(mine.sum()),
                "share": float(mine.mean()),
                "mean_probability": float(answer.probability[mine].mean()),
                "agree": float(answer.agree[mine].mean()) if annotation.members else None,
                "markers": [] if symbols is None else [str(symbols[gene]) for gene in markers.get(str(name), [])],
            }
        )
    return rows


def _names(answer: _Answer, hierarchy: Hierarchy | None) -> list[dict[str, Any]]:
    """Terms above labels that are the answer for some cells, the most frequent first."""
    if answer.nodes is None or hierarchy is None:
        return []
    known = answer.shown != UNKNOWN
    counts = np.bincount(answer.nodes[known], minlength=len(hierarchy.names))
    return [
        {
            "name": hierarchy.names[node],
            "term": hierarchy.term_ids[node],
            "cells": int(counts[node]),
            "labels": [
                label for label, member in zip(hierarchy.classes, hierarchy.members[node], strict=True) if member
            ],
        }
        for node in np.argsort(-counts, kind="stable")
        if counts[node] and node >= len(hierarchy.classes)
    ]


def _agreement(annotation: Annotation) -> dict[str, Any]:
    """Share of the cells to which an annotator gives the label given, and to which two annotators give one label."""
    given = annotation.probability.argmax(axis=1)
    labels = {name: each.argmax(axis=1) for name, each in annotation.members.items()}
    return {
        "with_label": {name: float((each == given).mean()) for name, each in labels.items()},
        "pairs": [
            {"first": first, "second": second, "share": float((labels[first] == labels[second]).mean())}
            for first, second in combinations(labels, 2)
        ],
    }


def _groups(
    annotation: Annotation,
    query: ad.AnnData,
    hierarchy: Hierarchy | None,
    markers: Markers | None,
    symbols: Names | None,
    threshold: float,
) -> list[dict[str, Any]]:
    """A row per group, the largest first, with its two most probable labels and, if uncertain, genes to separate them.

    A group is uncertain if most of its cells are unknown, or if the mean probability of its label is below the
    threshold.
    """
    labels = np.array(annotation.classes, dtype=object)[annotation.probability.argmax(axis=1)]
    rows = []
    for group, row in label_groups(annotation.groups, labels, annotation.unknown).iterrows():
        mine = np.flatnonzero(annotation.groups == group)
        means = annotation.probability[mine].mean(axis=0)
        best = np.argsort(-means, kind="stable")[:2]
        candidates = [annotation.classes[number] for number in best]
        unknown = float(annotation.unknown[mine].mean())
        found = {
            "group": group,
            **row.to_dict(),
            "unknown": unknown,
            "candidates": candidates,
            "probability": [float(mean) for mean in means[best]],
            "name": _name(hierarchy, means, threshold),
            "uncertain": bool(unknown > 0.5 or means[best[0]] < threshold),
        }
        counts = None if query.X is None else query.X[mine]
        compared = found["uncertain"] and len(candidates) == 2
        found["genes"] = _separating(markers, candidates, counts, symbols) if compared else []
        rows.append(found)
    return sorted(rows, key=lambda row: -row["cells"])


def _name(hierarchy: Hierarchy | None, means: npt.NDArray[np.floating], threshold: float) -> dict[str, Any] | None:
    """Most specific name that the mean probabilities of a group allow."""
    if hierarchy is None or not hierarchy.has_terms:
        return None
    found = back_off(hierarchy, means[None], threshold)
    node = int(found.nodes[0])
    return {
        "name": hierarchy.names[node],
        "term": hierarchy.term_ids[node],
        "probability": float(found.probability[0]),
    }


def _separating(
    markers: Markers | None, candidates: list[str], counts: Any, symbols: Names | None
) -> list[dict[str, Any]]:
    """Genes that separate two types, with their mean log expression in some cells and in both types."""
    if markers is None or symbols is None:
        return []
    higher = markers.between(candidates[0], candidates[1])
    genes = [*higher[0], *higher[1]]
    if not genes:
        return []
    theirs = markers.mean(genes, candidates)
    here = None if counts is None else dots(counts, ["group"] * counts.shape[0], ["group"], genes).mean[0]
    return [
        {
            "gene": str(symbols[gene]),
            "higher_in": candidates[place >= len(higher[0])],
            "mean": None if here is None else float(here[place]),
            "reference": theirs[:, place].tolist(),
        }
        for place, gene in enumerate(genes)
    ]


def _without_term(hierarchy: Hierarchy | None) -> list[str]:
    if hierarchy is None or not hierarchy.flat:
        return []
    names = ", ".join(hierarchy.flat[:10]) + (", ..." if len(hierarchy.flat) > 10 else "")
    return [
        f"{len(hierarchy.flat)} of {len(hierarchy.classes)} labels have no term of the Cell Ontology and therefore no"
        f" less specific name: {names}"
    ]


def _symbols(cells: ad.AnnData) -> Names:
    return np.asarray(cells.var.get("feature_name", cells.var_names), dtype=object)


@dataclass(frozen=True)
class _Places:
    """Cells on the map: int64 `rows` (cells,), and their float32 `positions`, (cells, 2)."""

    rows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float32]


def _places(annotation: Annotation, positions: npt.NDArray[np.float32] | None, seed: int) -> _Places | None:
    """Places of at most 20,000 cells; None for fewer than ten."""
    n_cells = len(annotation.embedding)
    if n_cells < _FEWEST_ON_MAP:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(n_cells)[:_MAP_CELLS])
    return _Places(
        rows, UmapMap(annotation.embedding[rows], seed=seed).positions if positions is None else positions[rows]
    )


def _map(answer: _Answer, places: _Places, seed: int) -> dict[str, Any]:
    """Pictures of the cells by label and by probability."""
    rows = places.rows
    labels = pd.Series(answer.shown[rows])
    labels = labels.where(labels != UNKNOWN)
    legend = figures.legend_of(labels)
    return {
        "unknown": int(labels.isna().sum()),
        "cells": len(rows),
        "legend": legend,
        "labels": figures.map_image(places.positions, labels, legend, seed=seed),
        "probability": figures.value_map(places.positions, answer.probability[rows], "probability"),
    }


def _dot_plot(
    query: ad.AnnData,
    reference: ad.AnnData | None,
    labels: str,
    answer: _Answer,
    markers: Mapping[str, list[int]],
    symbols: Names | None,
    found: list[str],
) -> str | None:
    """Markers of the types found, in the reference and in the cells with these labels."""
    owners = [(gene, name) for name in found for gene in markers.get(name, [])]
    if reference is None or symbols is None or not owners:
        return None
    genes = [gene for gene, _ in owners]
    panels = {"reference": dots(reference.X, reference.obs[labels], found, genes)}
    if query.X is not None:
        panels["your cells"] = dots(query.X, answer.shown, found, genes)
    return figures.dot_plot(panels, found, [str(symbols[gene]) for gene in genes], [name for _, name in owners])


def _confusion(annotation: Annotation, answer: _Answer, found: list[str]) -> str | None:
    """For each annotator, the share of the cells of each label to which it gives each label."""
    if len(annotation.members) < 2 or not found:
        return None
    shares = {}
    for name, probability in annotation.members.items():
        theirs = np.array(annotation.classes, dtype=object)[probability.argmax(axis=1)]
        crossed = pd.crosstab(answer.shown, theirs, normalize="index").reindex(index=found, fill_value=0.0)
        others = [label for label in crossed.columns[crossed.max() >= 0.05] if label not in found]
        shares[TITLES.get(name, name)] = crossed.reindex(columns=[*found, *others[:MOST_TYPES]], fill_value=0.0)
    return figures.table_of_labels(shares)
