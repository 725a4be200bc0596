"""Annotate a query: fit annotators, calibrate and validate them on held-out cells, combine them, find unknown cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.annotation.annotators.joint_model import STEPS
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.methods import BASELINES, CONSENSUS, TITLES, create, members_of
from census_scvi.annotation.ontology import LEVEL, Hierarchy, build_hierarchy, calibrated_threshold
from census_scvi.annotation.protocol import Annotation, Annotator, Cells
from census_scvi.annotation.results.groups import similar_cells
from census_scvi.annotation.unknown.rule import (
    Batch,
    HeldOutCells,
    Spaces,
    UnknownRule,
    agree,
    apply_rule,
    set_rule,
)
from census_scvi.annotation.validation.calibration import Probability, fit_temperature, with_temperature, without_type
from census_scvi.annotation.validation.folds import BY_CELLS, Fold, held_out_folds
from census_scvi.annotation.validation.held_out import HeldOut
from census_scvi.errors import UserError
from census_scvi.metrics.hierarchy import HierarchicalScores, hierarchical_scores

log = logging.getLogger(__name__)

# Warn if the accuracy of a baseline exceeds the method's by more than this.
_BETTER = 0.02


class FittedMethod:
    """A method whose annotators have computed what needs no labels; annotates one column of labels after another.

    Parameters
    ----------
    cells
        Reference and query.
    method
        `consensus`, `fast` or the name of an annotator.
    compare
        Names of other methods for the table of held-out accuracy.
    batches_known
        Whether `cells.batch` has the batches of the query's cells, and not one value for all of them.
    n_neighbors
        Neighbors per cell.
    steps
        Training steps of a joint model.
    scnym
        Hyper-parameters of scNym's method, as in `create`.
    seed
        Random seed.
    """

    def __init__(
        self,
        cells: Cells,
        method: str = CONSENSUS,
        *,
        compare: Sequence[str] = BASELINES,
        batches_known: bool = True,
        n_neighbors: int = NEIGHBORS,
        steps: int = STEPS,
        scnym: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.method, self.members = method, members_of(method, batches_known=batches_known)
        self._cells, self._seed, self._known_batches = cells, seed, batches_known
        names = dict.fromkeys([*self.members, *(each for name in compare for each in members_of(name))])
        self.annotators: dict[str, Annotator] = {}
        for name in names:
            annotator = create(name, n_neighbors=n_neighbors, steps=steps, scnym=scnym, seed=seed)
            annotator.fit(cells)
            self.annotators[name] = annotator

    def annotate(
        self,
        labels: npt.NDArray[np.object_],
        units: Mapping[str, npt.NDArray[np.object_]] | None = None,
        terms: Mapping[str, str] | None = None,
    ) -> Annotation:
        """Annotate the query.

        Parameters
        ----------
        labels
            object (reference cells,): labels; None for a cell without a label.
        units
            Columns (reference cells,) of what can be held out, the best first: study, donor, batch; None: cells.
        terms
            Cell Ontology term id of each label; a label without one is searched by name. Labels with terms add
            hierarchical scores to the validation.

        Raises
        ------
        UserError
            No cell has a label.
        """
        rows = np.flatnonzero([label is not None for label in labels])
        if not len(rows):
            raise UserError(f"none of the {len(labels):,} reference cells has a label")
        classes, codes = np.unique(labels[rows].astype(str), return_inverse=True)
        folds, held_out_by = held_out_folds(codes, {k: v[rows] for k, v in (units or {}).items()}, self._seed)
        if len(classes) < 2:
            folds = []
        run = _Run(
            self._cells, self.annotators, self.members, rows, codes, len(classes), folds, held_out_by, self._seed
        )
        rule, scores, batches = run.unknown()
        excess = scores - rule.threshold
        empty = run.empty()
        calibrated = run.query()
        warnings = list(_warnings(run, rule, batches, self._known_batches, classes))
        held = run.held_out(self.method)
        validation = run.validation(held, build_hierarchy(classes.tolist(), terms))
        warnings += _better_baseline(validation, self.method)
        for warning in warnings:
            log.warning("%s", warning)
        return Annotation(
            classes=[str(name) for name in classes],
            probability=np.mean([calibrated[name] for name in self.members], axis=0),
            members={name: calibrated[name] for name in self.members},
            compared={name: values for name, values in calibrated.items() if name not in self.members},
            unknown=(excess > 0) | empty,
            uncertainty=np.where(empty, 1, 1 / (1 + np.exp(-np.clip(2 * excess, -30, 30)))).astype(np.float32),
            groups=similar_cells(run.main_space()[self._cells.query], self._seed),
            embedding=run.main_space()[self._cells.query],
            validation=validation,
            warnings=warnings,
            facts={
                **_facts(run, rule, batches, classes),
                "name_threshold": calibrated_threshold(held[self.method], run.truth) if held else LEVEL,
            },
        )


def annotate(
    cells: Cells,
    labels: npt.NDArray[np.object_],
    units: Mapping[str, npt.NDArray[np.object_]] | None = None,
    terms: Mapping[str, str] | None = None,
    **settings: Any,
) -> Annotation:
    """Annotate a query with one column of labels; see `FittedMethod`, which has the settings."""
    return FittedMethod(cells, **settings).annotate(labels, units, terms)


class _Run:
    """One column of labels: predictions of all annotators for held-out cells and for the query."""

    def __init__(
        self,
        cells: Cells,
        annotators: dict[str, Annotator],
        members: Sequence[str],
        rows: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        folds: list[Fold],
        held_out_by: str,
        seed: int,
    ) -> None:
        self.cells, self.annotators, self.members = cells, annotators, list(members)
        self.rows, self.codes, self.n_classes, self.folds, self.seed = rows, codes, n_classes, folds, seed
        self.held_out_by = held_out_by
        self.held: list[dict[str, Probability]] = [
            {name: self._predict(name, fold.train, rows[fold.test]) for name in annotators} for fold in folds
        ]
        self.raw = {name: self._predict(name, np.arange(len(rows)), cells.query) for name in annotators}
        self.truth = np.concatenate([codes[fold.test] for fold in folds]) if folds else np.empty(0, np.int64)

    def _predict(self, name: str, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> Probability:
        return self.annotators[name].predict(self.rows[train], self.codes[train], self.n_classes, test)

    # --- probabilities

    def query(self) -> dict[str, Probability]:
        """Calibrated probabilities of the query's cells by each annotator."""
        return {name: with_temperature(values, self._temperature(name)) for name, values in self.raw.items()}

    def _temperature(self, name: str) -> float:
        if not self.folds:
            return 1.0
        return fit_temperature(np.concatenate([part[name] for part in self.held]), self.truth)

    def held_out(self, method: str) -> dict[str, Probability]:
        """Calibrated probabilities of the held-out cells by method; each fold is calibrated on the others."""
        if not self.folds:
            return {}
        parts = {name: self._calibrated_across([part[name] for part in self.held]) for name in self.annotators}
        found = {name: np.concatenate(each) for name, each in parts.items()}
        if len(self.members) > 1:
            found = {method: np.mean([found[name] for name in self.members], axis=0), **found}
        return found

    def validation(self, held: Mapping[str, Probability], hierarchy: Hierarchy) -> pd.DataFrame:
        """Quality on held-out cells by method."""
        names = np.array([str(code) for code in range(self.n_classes)], dtype=object)
        scores = {}
        for name, found in held.items():
            best = found.argmax(axis=1)
            scores[name] = asdict(HeldOut.of(names[self.truth], (names[best], found.max(axis=1)), self.seed))
            if hierarchy.has_terms:
                scores[name] |= _of_terms(hierarchical_scores(hierarchy.lineage, self.truth, best))
        return pd.DataFrame.from_dict(scores, orient="index")

    def _calibrated_across(self, parts: list[Probability]) -> list[Probability]:
        if len(parts) < 2:
            return parts
        truths = [self.codes[fold.test] for fold in self.folds]
        found = []
        for k, part in enumerate(parts):
            others = [j for j in range(len(parts)) if j != k]
            temperature = fit_temperature(
                np.concatenate([parts[j] for j in others]), np.concatenate([truths[j] for j in others])
            )
            found.append(with_temperature(part, temperature))
        return found

    # --- unknown

    def spaces(self) -> dict[str, npt.NDArray[np.float32]]:
        """Embeddings of the members; that of another annotator if no member has one."""
        for names in (self.members, list(self.annotators)):
            found = {name: space for name in names if (space := self.annotators[name].space) is not None}
            if found:
                return found
        return {}

    def main_space(self) -> npt.NDArray[np.float32]:
        """The embedding for groups and neighborhoods; without one, a constant."""
        return next(iter(self.spaces().values()), np.zeros((len(self.cells), 1), np.float32))

    def voters(self) -> list[str]:
        """Annotators that agree or not: the members; for a single one, also those that it is compared with."""
        return self.members if len(self.members) > 1 else list(self.annotators)

    def unknown(self) -> tuple[UnknownRule, npt.NDArray[np.float64], dict[str, Batch]]:
        """The rule, the scores of the query's cells, and the state of its batches."""
        spaces: Spaces = self.spaces()
        n_query = len(self.cells.query)
        if not spaces:
            return UnknownRule({}, 0.0, float("nan"), float("nan"), float("nan")), np.full(n_query, -1.0), {}
        voters = self.voters()
        parts = [
            HeldOutCells(
                self.rows[fold.train],
                self.codes[fold.train],
                self.rows[fold.test],
                self.codes[fold.test],
                {name: held[name] for name in voters},
                partial(self._all_without, voters, fold, held),
            )
            for fold, held in zip(self.folds, self.held, strict=True)
        ]
        rule = set_rule(
            spaces, parts, self.rows, self.codes, self.n_classes, self.seed, limited=self.held_out_by != BY_CELLS
        )
        agreed = agree({name: self.raw[name] for name in voters})
        scores, batches = apply_rule(
            rule,
            spaces,
            self.rows,
            self.codes,
            self.n_classes,
            self.cells.query,
            self.cells.query_batch,
            agreed,
        )
        return rule, scores, batches

    def _all_without(
        self, voters: Sequence[str], fold: Fold, held: Mapping[str, Probability], code: int
    ) -> dict[str, Probability]:
        """`_without` for several annotators."""
        return {name: self._without(name, fold, held[name], code) for name in voters}

    def _without(self, name: str, fold: Fold, found: Probability, code: int) -> Probability:
        """Probabilities of held-out cells if the training cells of a type are excluded.

        Votes of neighbors are repeated where they change. A classifier is not trained again: its probabilities of the
        other types are normalised.
        """
        annotator = self.annotators[name]
        others = fold.train[self.codes[fold.train] != code]
        if annotator.refits or annotator.space is None:
            return without_type(found, code)
        changed = found[:, code] > 0
        without = found.copy()
        without[:, code] = 0
        if changed.any() and len(others):
            without[changed] = self._predict(name, others, self.rows[fold.test[changed]])
        return without

    # --- the query

    def empty(self) -> npt.NDArray[np.bool_]:
        """Query cells without counts; False if there are no counts at all."""
        counts = self.cells.counts[self.cells.n_reference :]
        if not counts.shape[1]:
            return np.zeros(counts.shape[0], bool)
        return np.diff(counts.indptr) == 0


def _warnings(
    run: _Run,
    rule: UnknownRule,
    batches: dict[str, Batch],
    known_batches: bool,
    classes: npt.NDArray[np.str_],
) -> Any:
    if not known_batches and len(run.members) > 1:
        yield (
            "the batches of the query are not known, so that Harmony is not used; set query.batch_key to the obs column"
            " of its batches"
        )
    if not run.folds:
        yield "nothing could be held out of the reference: probabilities are not calibrated, and accuracy is not known"
    elif run.held_out_by in ("donor_id", BY_CELLS):
        what = "random cells" if run.held_out_by == BY_CELLS else f"values of {run.held_out_by}"
        yield (
            f"the reference is one study, so accuracy and thresholds are measured on {what} of the same study; a query"
            " of another study has a lower accuracy"
        )
    for name, batch in batches.items():
        if batch.far:
            yield batch.warning(name)
    hard = [str(classes[code]) for code, found in rule.found_by_type.items() if found < 0.2]
    if hard:
        yield (
            f"if the reference lacked {', '.join(hard)}, most of these cells would get another label and would not be"
            " unknown (measured by excluding each type)"
        )


def _of_terms(scores: HierarchicalScores) -> dict[str, float]:
    return {
        "hierarchical_precision": scores.precision,
        "hierarchical_recall": scores.recall,
        "hierarchical_f1": scores.f1,
        "right_or_ancestor": scores.right_or_ancestor,
    }


def _better_baseline(validation: pd.DataFrame, method: str) -> list[str]:
    if method not in validation.index:
        return []
    accuracy = validation["accuracy"]
    best = str(accuracy.idxmax())
    if accuracy[best] <= accuracy[method] + _BETTER:
        return []
    return [
        f"on held-out reference cells {TITLES.get(best, best)} has an accuracy of {accuracy[best]:.1%},"
        f" {TITLES.get(method, method)} {accuracy[method]:.1%}"
    ]


def _facts(run: _Run, rule: UnknownRule, batches: dict[str, Batch], classes: npt.NDArray[np.str_]) -> dict[str, Any]:
    return {
        "members": run.members,
        "held_out_by": run.held_out_by,
        "reference_cells": len(run.rows),
        "known_kept": rule.known_kept,
        "left_out_found": rule.left_out_found,
        "frequent_left_out_found": rule.frequent_found,
        "found_by_type": {str(classes[code]): found for code, found in rule.found_by_type.items()},
        "threshold": rule.threshold,
        "batches": {name: {**asdict(batch), "far": batch.far} for name, batch in batches.items()},
    }
