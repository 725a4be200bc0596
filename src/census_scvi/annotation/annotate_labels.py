"""Annotate a query with one or several columns of labels: what needs no labels is computed once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from census_scvi.annotation.annotate import FittedMethod
from census_scvi.annotation.annotators.joint_model import STEPS
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.methods import BASELINES, EMBEDDED
from census_scvi.annotation.ontology import build_hierarchy
from census_scvi.annotation.protocol import Annotated

log = logging.getLogger(__name__)


def annotate_labels(
    joined: Joined,
    method: str,
    *,
    n_neighbors: int = NEIGHBORS,
    steps: int = STEPS,
    scnym: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Annotated]:
    """Annotate the query, once per column of labels.

    Parameters
    ----------
    joined
        Reference and query. Without counts, the neighbors in the embedding are used; with counts and an embedding, they
        are compared with the method.
    method, n_neighbors, steps, scnym, seed
        As of `FittedMethod`.
    """
    cells = joined.cells
    compare: tuple[str, ...] = BASELINES if cells.embedding is None else (EMBEDDED, *BASELINES)
    if not cells.genes:
        compare = ()
        if method != EMBEDDED:
            log.warning("there are no counts for method %s, so the neighbors in the embedding are used", method)
        method = EMBEDDED
    fitted = FittedMethod(
        cells, method, compare=compare, batches_known=joined.batches_known, n_neighbors=n_neighbors, steps=steps,
        scnym=scnym, seed=seed,
    )  # fmt: skip
    annotated = []
    for column, labels in joined.labels.items():
        terms = joined.terms[column]
        found = fitted.annotate(labels, joined.units, terms)
        found = replace(found, warnings=[*joined.notes, *found.warnings])
        hierarchy = build_hierarchy(found.classes, terms)
        n_with_counts = cells.n_reference if cells.genes else 0
        annotated.append(Annotated(column, found, hierarchy, method, n_neighbors, n_with_counts))
    return annotated
