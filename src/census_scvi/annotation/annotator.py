"""Label transfer to a user's cells: writes labels, labels of baselines and held-out accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.baselines import PCA_NEIGHBORS, REGRESSION, Baselines, Labels
from census_scvi.annotation.held_out import MODEL, HeldOut, hold_out
from census_scvi.annotation.label_transfer import NEIGHBORS, UNKNOWN, LabelTransfer
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

PREDICTION, EMPTY = "scvi_prediction", "scvi_empty"
TITLES = {MODEL: "model", PCA_NEIGHBORS: "PCA", REGRESSION: "logistic regression"}
_VAGUE = ("unknown", "na", "nan", "None", "")
_STUDY, _DONOR = "dataset_id", "donor_id"
STUDY_COLUMNS = [_STUDY, _DONOR]
# Warn if the accuracy of a baseline exceeds the model's by more than this.
_BETTER = 0.02


class Annotator:
    """Annotates cells with the labels of a reference.

    Parameters
    ----------
    reference
        Reference cells; obs has the column `labels`, dataset_id and donor_id. Cells with an uninformative label such as
        "unknown" are excluded.
    latent
        Name of the embedding in the reference's obsm.
    labels
        obs column of the labels.
    method, n_neighbors, seed
        Arguments of `LabelTransfer`.

    Raises
    ------
    UserError
        No cell has a label.
    """

    def __init__(
        self,
        reference: ad.AnnData,
        latent: str,
        labels: str,
        *,
        method: str = NEIGHBORS,
        n_neighbors: int = 15,
        seed: int = 0,
    ) -> None:
        values = reference.obs[labels]
        known = (values.notna() & ~values.astype(str).isin(_VAGUE)).to_numpy(dtype=bool)
        if not known.any():
            raise UserError(f"none of the {reference.n_obs:,} reference cells has a {labels}; change obs_filter")
        self._known, self._points, self._column = known, reference.obsm[latent], labels
        self._labels = reference.obs[labels].astype(str).to_numpy(dtype=object)
        self._method, self._n_neighbors, self._seed = method, n_neighbors, seed
        # A query is from another study than its neighbors, or from another donor if the reference is one study.
        self._differ = next((name for name in STUDY_COLUMNS if reference.obs[name][known].nunique() > 1), None)
        self._studies = None if self._differ is None else reference.obs[self._differ].astype(str).to_numpy(dtype=object)
        self._transfer = LabelTransfer(
            self._points[known],
            self._labels[known],
            None if self._studies is None else self._studies[known],
            n_neighbors=n_neighbors,
            method=method,
            seed=seed,
        )

    def annotate(self, cells: ad.AnnData, latent: str) -> None:
        """Write labels, probability, uncertainty and unknown into the obs of `cells`, from the embedding in obsm."""
        transfer, column = self._transfer, self._column
        empty = cells.obs[EMPTY].to_numpy(dtype=bool)
        found = transfer.predict(cells.obsm[latent], empty=empty)
        cells.obs[f"{column}_predicted"] = pd.Categorical(np.where(found.unknown, UNKNOWN, found.labels))
        cells.obs[f"{column}_best"] = pd.Categorical(np.where(empty, UNKNOWN, found.labels))
        cells.obs[f"{column}_probability"] = found.probability
        cells.obs[f"{column}_uncertainty"] = found.uncertainty
        cells.obs[f"{column}_unknown"] = found.unknown
        cells.uns.setdefault(PREDICTION, {})[column] = {
            "classes": transfer.classes,
            "reference_cells": int(self._known.sum()),
            "method": self._method,
            "n_neighbors": self._n_neighbors,
            "known_kept": transfer.bound.known_kept,
            "left_out_found": transfer.bound.left_out_found,
            "shift": found.shift,
            "usual_shift": transfer.bound.usual_ratio,
            "corrected_by": found.corrected_by,
            "far": found.far,
        }

    def compare(
        self,
        cells: ad.AnnData,
        blocks: Iterable[sp.csr_matrix],
        counts: sp.csr_matrix,
        rows: Any,
        genes: Any,
    ) -> None:
        """Write the labels of the baselines, and the accuracy of all methods on held-out studies of the reference.

        Parameters
        ----------
        cells
            The cells, after `annotate`.
        blocks
            Raw counts of these cells in blocks, CSR (some cells, genes), in their order.
        counts, rows
            Raw counts of some reference cells, CSR (cells, genes), and their rows in the reference, int64 (cells,).
        genes
            bool (genes,): genes that the query has.
        """
        kept = self._known[rows]
        counts, rows = counts[np.flatnonzero(kept)], rows[kept]
        labels = self._labels[rows]
        filled = np.asarray(counts[:, genes].sum(axis=1)).ravel() > 0  # all cells without counts look the same
        counts, rows, labels = _of_several(counts[np.flatnonzero(filled)], rows[filled], labels[filled])
        if len(np.unique(labels.astype(str))) < 2:
            log.info("%s: no baselines, fewer than two labels have two reference cells", self._column)
            return
        if np.count_nonzero(counts[:, genes].sum(axis=0)) < 2:
            log.info("%s: no baselines, the reference has counts of fewer than two genes", self._column)
            return
        baselines = Baselines(counts, labels, genes, n_neighbors=self._n_neighbors, seed=self._seed)
        named: dict[str, list[Labels]] = {}
        for block in blocks:
            for name, (found, _) in baselines.predict(block).items():
                named.setdefault(name, []).append(found)
        column = self._column
        theirs = {name: np.concatenate(parts) for name, parts in named.items()}
        empty = cells.obs[EMPTY].to_numpy(dtype=bool)
        for name, found in theirs.items():
            cells.obs[f"{column}_{name}"] = pd.Categorical(np.where(empty, UNKNOWN, found))
        certain = ~cells.obs[f"{column}_unknown"].to_numpy()
        own = cells.obs[f"{column}_predicted"].astype(str).to_numpy()
        scores = hold_out(
            self._points[rows],
            counts,
            labels,
            None if self._studies is None else self._studies[rows],
            genes,
            method=self._method,
            n_neighbors=self._n_neighbors,
            seed=self._seed,
        )
        cells.uns[PREDICTION][column] |= {
            "baseline_cells": len(rows),
            "agreement": {
                name: float((own == found)[certain].mean()) if certain.any() else float("nan")
                for name, found in theirs.items()
            },
            "held_out_by": self._differ or "cells",
            "held_out": {name: asdict(score) for name, score in scores.items()},
        }
        _say(column, self._differ, scores)


def _of_several(counts: sp.csr_matrix, rows: Any, labels: Labels) -> tuple[sp.csr_matrix, Any, Labels]:
    """Exclude labels with one cell, which cannot be in both training and held-out cells."""
    names, numbers = np.unique(labels.astype(str), return_counts=True)
    several = np.isin(labels.astype(str), names[numbers > 1])
    return counts[np.flatnonzero(several)], rows[several], labels[several]


def _not_held_out(differ: str | None) -> str:
    if differ is None:
        return "the reference has too few cells"
    return f"no label is in two values of {differ}, or the reference has too few cells"


def _say(column: str, differ: str | None, scores: dict[str, HeldOut]) -> None:
    if not scores:
        log.info("%s: no accuracy on held-out cells, because %s", column, _not_held_out(differ))
        return
    right = {name: score.accuracy for name, score in scores.items()}
    log.info(
        "%s, accuracy on held-out reference cells (by %s): %s",
        column,
        differ or "cell",
        ", ".join(f"{TITLES[name]} {share:.1%}" for name, share in right.items()),
    )
    best = max(right, key=lambda name: right[name])
    if right[best] > right[MODEL] + _BETTER:
        log.warning(
            "%s: on held-out reference cells %s has an accuracy of %.1f%%, the model %.1f%%; compare with obs['%s_%s']",
            column,
            TITLES[best],
            100 * right[best],
            100 * right[MODEL],
            column,
            best,
        )
