"""Back-off along the Cell Ontology: the most specific cell type that is certain enough, "T cell" for CD4 or CD8."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from census_scvi.census.ontology import ROOT, CellOntology, cell_ontology

log = logging.getLogger(__name__)

# Probability from which a name is given, if it cannot be calibrated.
LEVEL = 0.7
# Share of the held-out cells with the calibrated probability whose label is right. In blood, both ways, it belongs to
# probabilities of 0.71 and 0.75 of the consensus.
_RIGHT = 0.8
_LOWEST, _HIGHEST, _FEWEST_CELLS = 0.6, 0.9, 100
_TERM_ID = "ontology_term_id"
NO_TERM = "unknown"  # as the CELLxGENE schema has it


@dataclass(frozen=True)
class Hierarchy:
    """Labels of a reference, and the terms of the Cell Ontology that are above at least two of them.

    Attributes
    ----------
    classes
        The labels.
    terms
        Term id of each label; None: the label has no term and no ancestor but the root.
    names, term_ids
        Name and term id of each node. First the labels, in their order; then the terms above them, those of the fewest
        labels first; last the root, a term above every label, or else "cell". Terms above the same labels are one node.
    members
        bool (nodes, classes): the labels of each node.
    lineage
        bool (nodes, terms): the terms that a node is or has above it, without the root; see `metrics.hierarchy`.
    """

    classes: list[str]
    terms: list[str | None]
    names: list[str]
    term_ids: list[str | None]
    members: npt.NDArray[np.bool_]
    lineage: npt.NDArray[np.bool_]

    @property
    def flat(self) -> list[str]:
        """Labels without a term."""
        return [label for label, term in zip(self.classes, self.terms, strict=True) if term is None]

    @property
    def has_terms(self) -> bool:
        """Whether at least one label has a term."""
        return any(term is not None for term in self.terms)

    def probability(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Probability of each node, float32 (cells, nodes): the sum over its labels, from (cells, classes)."""
        summed = np.asarray(probability, np.float32) @ self.members.T.astype(np.float32)
        summed[:, -1] = 1  # every cell is a cell
        return np.minimum(summed, np.float32(1))


def build_hierarchy(classes: Sequence[str], terms: Mapping[str, str] | None = None) -> Hierarchy:
    """The terms above some labels.

    Parameters
    ----------
    classes
        The labels.
    terms
        Term ids by label, for example from `terms_in`. A label that has none is searched by its exact name.
    """
    ontology, given = cell_ontology(), terms or {}
    own = [ontology.current(given.get(label)) or ontology.term(label) for label in classes]
    above = [ontology.ancestors(term) if term else set() for term in own]
    groups: dict[tuple[int, ...], list[str]] = {}  # terms by the labels below them
    for term in sorted(set().union(*above)):
        groups.setdefault(tuple(i for i, terms_above in enumerate(above) if term in terms_above), []).append(term)
    names = {below: _most_informative(ontology, same, own) for below, same in groups.items()}
    every = tuple(range(len(classes)))
    ordered = sorted((below for below, name in names.items() if name), key=lambda below: (len(below), below))
    inner = [below for below in ordered if 1 < len(below) < len(every)]
    ids = [*own, *(names[below] for below in inner), names.get(every) or ROOT]
    members = np.vstack([np.eye(len(every), dtype=bool), *(_mask(below, len(every)) for below in [*inner, every])])
    # A term above every label is a column only if it is a label itself.
    columns = [below for below in ordered if below != every or set(own) & set(groups[below])]
    columns += [(i,) for i, term in enumerate(own) if term is None]
    outside = ~np.vstack([_mask(below, len(every)) for below in columns]).T
    return Hierarchy(
        classes=list(classes),
        terms=own,
        names=[*classes, *(ontology.name(str(term)) for term in ids[len(every) :])],
        term_ids=ids,
        members=members,
        lineage=~(members @ outside),
    )


def _most_informative(ontology: CellOntology, terms: list[str], own: list[str | None]) -> str | None:
    """Of the terms above the same labels: a curated class, or else the deepest one that is below a curated class.

    Terms such as "nucleate cell", which are neither, are not names of cell types, unless a label is called so.
    """
    classes = ontology.classes
    curated = [term for term in terms if term in classes]
    below = [term for term in terms if term in own or not ontology.ancestors(term).isdisjoint(classes)]
    return max(curated or below, key=lambda term: (len(ontology.ancestors(term)), term), default=None)


def _mask(below: tuple[int, ...], n_classes: int) -> npt.NDArray[np.bool_]:
    return np.isin(np.arange(n_classes), below)


@dataclass(frozen=True)
class Terms:
    """Answer for each cell: int64 `nodes` of a hierarchy and their float32 `probability`, (cells,) each."""

    nodes: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]


def back_off(hierarchy: Hierarchy, probability: npt.NDArray[np.floating], threshold: float = LEVEL) -> Terms:
    """The node with the fewest labels whose probability reaches the threshold; the most probable one of several.

    Parameters
    ----------
    probability
        (cells, classes): calibrated probabilities of the labels.
    threshold
        Above 0, at most 1.
    """
    summed = hierarchy.probability(probability)
    sizes = hierarchy.members.sum(axis=1)
    # Fewer labels first; of as many labels, the more probable node.
    order = np.where(summed >= np.float32(threshold) - np.float32(1e-6), sizes - summed / 2, np.inf)
    nodes = order.argmin(axis=1)
    return Terms(nodes.astype(np.int64), summed[np.arange(len(nodes)), nodes])


def calibrated_threshold(
    probability: npt.NDArray[np.floating], truth: npt.NDArray[np.integer], share: float = _RIGHT
) -> float:
    """Probability at which the most probable label of a held-out cell is right in this `share` of the cells.

    By logistic regression of "the label is right" on the log odds of its probability, over the cells with a probability
    below 0.9: the more certain ones may be wrong for another reason, for example because studies draw the border of two
    types differently. Terms above labels are right more often than labels of the same probability.

    Parameters
    ----------
    probability
        (held-out cells, classes), predicted without these cells.
    truth
        int (held-out cells,): the class of each cell.

    Returns
    -------
    A threshold between 0.6 and 0.9; 0.7 if there are fewer than 100 such cells.
    """
    best = np.asarray(probability, np.float64).max(axis=1)
    unsure = best < _HIGHEST
    right = (np.asarray(probability).argmax(axis=1) == truth)[unsure]
    if len(right) < _FEWEST_CELLS:
        return LEVEL
    if right.all():
        return _LOWEST
    odds = logit(np.maximum(best[unsure], 1e-3))
    fit = LogisticRegression(C=np.inf).fit(odds[:, None], right) if right.any() else None
    if fit is None or fit.coef_[0, 0] <= 0:  # more probable labels are not more often right
        return _HIGHEST
    reached = expit((logit(share) - fit.intercept_[0]) / fit.coef_[0, 0])
    return float(np.clip(reached, _LOWEST, _HIGHEST).round(3))


def term_column(labels: str) -> str:
    """Column of the term ids of a column of labels, as the Census has them."""
    return f"{labels}_{_TERM_ID}"


def terms_in(obs: pd.DataFrame, labels: str) -> dict[str, str]:
    """Term id of each label, from the column `<labels>_ontology_term_id` as in the Census; the most frequent one.

    Empty if obs has no such column.
    """
    column = term_column(labels)
    if column not in obs:
        return {}
    pairs = pd.DataFrame({"label": obs[labels].astype(str), "term": obs[column].astype(str)})
    counts = pairs.value_counts(sort=False).reset_index(name="cells").sort_values(["cells", "term"])
    return dict(zip(counts["label"], counts["term"], strict=True))  # the last of each label: the most frequent


def term_columns(
    hierarchy: Hierarchy, labels: str, probability: npt.NDArray[np.floating], unknown: npt.NDArray[np.bool_],
    threshold: float = LEVEL,
) -> dict[str, pd.Categorical | npt.NDArray[np.float32]]:  # fmt: skip
    """Columns for obs with the term of each cell; empty if no label has a term.

    `<labels>_ontology`, `<labels>_ontology_id` and `<labels>_ontology_probability` are the most specific name that is
    certain enough, its term id and probability; `<labels>_predicted_ontology_term_id` is the term of the most probable
    label. The names leave `<labels>_ontology_term_id` to the cells' own annotation. Unknown cells have the value
    "unknown"; a label without a term has the term id "".
    """
    if not hierarchy.has_terms:
        log.info("%s: none of the %d labels is a term of the Cell Ontology", labels, len(hierarchy.classes))
        return {}
    found = back_off(hierarchy, probability, threshold)
    ids = np.array([term or "" for term in hierarchy.term_ids], dtype=object)
    names = np.array(hierarchy.names, dtype=object)
    flat = ids[np.asarray(probability).argmax(axis=1)]
    return {
        f"{labels}_ontology": pd.Categorical(np.where(unknown, NO_TERM, names[found.nodes])),
        f"{labels}_ontology_id": pd.Categorical(np.where(unknown, NO_TERM, ids[found.nodes])),
        f"{labels}_ontology_probability": found.probability,
        f"{labels}_predicted_{_TERM_ID}": pd.Categorical(np.where(unknown, NO_TERM, flat)),
    }
