"""Compare ways to map a query: joint surgery, batch by batch, in sequence, with another seed, and no surgery."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score

from census_scvi.metrics.agreement import (
    CLASSIFIERS,
    NEIGHBORS,
    Labels,
    LabelTransfer,
    Points,
    accuracy_gain,
    mixing_within_types,
    share_equal,
    shared_neighbors,
)
from census_scvi.metrics.distances import distances
from census_scvi.neighbors.clusters import leiden
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.batches import batches_of
from census_scvi.query.surgery.adapt import Reference, adapt
from census_scvi.query.surgery.adapted import Adapted, require_work_folder
from census_scvi.query.surgery.settings import JOINT, PER_BATCH, SEQUENTIAL, SurgeryTraining
from census_scvi.query.surgery.verdict import (
    BACKWARD,
    EQUAL_EPOCHS,
    EQUAL_STEPS,
    FORWARD,
    NO_SURGERY,
    seed_name,
    verdict,
)

log = logging.getLogger(__name__)

_BLOCK_CELLS = 4096

# Latent positions, float32 (cells, n_latent), of the cells from a row on, with counts of genes and proteins.
BlockEncoder = Callable[[int, sp.csr_matrix, "npt.NDArray[np.float32] | None"], Points]


@dataclass(frozen=True)
class Way:
    """One way to map the query.

    Attributes
    ----------
    name
        Its name, one of those in `verdict`.
    latent
        float32 (cells, n_latent): the query.
    moved
        Largest change of the latent of the reference's cells; 0 without surgery.
    epochs, steps, seconds
        Of all its trainings: epochs of each, sum of the optimiser steps, time.
    batch_by_batch
        Largest difference of a coordinate if each batch is embedded separately.
    """

    name: str
    latent: Points
    moved: float
    epochs: list[int]
    steps: int
    seconds: float
    batch_by_batch: float


@dataclass(frozen=True)
class Comparison:
    """Ways to map a query, compared with joint surgery.

    Attributes
    ----------
    ways
        The ways.
    table
        One row per way, see `compare_ways`.
    findings
        What follows from the table, in sentences; the first one is the recommendation.
    reference, labels
        Cells of the reference that it was compared with, float32 (cells, n_latent), and their labels; None: none.
    truth
        Known labels of the query; None: not known.
    """

    ways: list[Way]
    table: pd.DataFrame
    findings: list[str]
    reference: Points | None = None
    labels: Labels | None = None
    truth: Labels | None = None

    @property
    def recommendation(self) -> str:
        """How to map, in a sentence."""
        return self.findings[0]


def map_in_all_ways(
    reference: Reference,
    aligned: AlignedCells,
    batch_key: Sequence[str],
    training: SurgeryTraining,
    work: Path,
    without: BlockEncoder,
    *,
    seed: int,
    n_seeds: int = 3,
    accelerator: str = "auto",
) -> list[Way]:
    """Map a query in all ways; joint is the first, unless surgery cannot change the embedding: then it is the only one.

    Parameters
    ----------
    reference, aligned, batch_key, training, work, seed, accelerator
        As in `adapt`; each way has a folder in `work`.
    without
        Encoder of the query's cells without surgery.
    n_seeds
        Number of joint trainings with different seeds, 2 or more: how much they differ is what a difference is
        compared with.
    """

    def surgery(name: str, mode: str, settings: SurgeryTraining = training, **more: Any) -> Adapted:
        place = work / name.replace(", ", "-").replace(" ", "-")
        log.info("comparison of mappings: %s", name)
        return adapt(
            reference, aligned, batch_key, mode, settings, place, **{"seed": seed, "accelerator": accelerator, **more}
        )

    require_work_folder(work)
    joint = surgery(JOINT, JOINT, training.model_copy(update={"order": None}))
    ways = [] if joint.reason else [_way(JOINT, joint, aligned)]
    for other in range(seed + 1, seed + n_seeds) if ways else ():
        name = seed_name(other)
        ways.append(_way(name, surgery(name, JOINT, seed=other), aligned))
    # With one batch, all trainings are the joint one.
    if ways and len(joint.batches) > 1 and not (alone := surgery(EQUAL_EPOCHS, PER_BATCH)).reason:
        ways.append(_way(EQUAL_EPOCHS, alone, aligned))
        epochs = _equal_steps(alone, ways[0].steps)
        ways.append(_way(EQUAL_STEPS, surgery(EQUAL_STEPS, PER_BATCH, epochs=epochs), aligned))
        order = training.order or joint.batches
        for name, batches in ((FORWARD, order), (BACKWARD, order[::-1])):
            settings = training.model_copy(update={"order": list(batches)})
            ways.append(_way(name, surgery(name, SEQUENTIAL, settings), aligned))
    latent, difference = _embedded(aligned, lambda _: without, np.zeros(len(aligned), int))
    return [*ways, Way(NO_SURGERY, latent, 0.0, [], 0, 0.0, difference)]


def _equal_steps(adapted: Adapted, steps: int) -> dict[str, int]:
    """Epochs of each batch that are as many optimiser steps as those of the joint training."""
    return {
        each["batches"][0]: max(round(steps * each["epochs"] / each["steps"]), 1) for each in adapted.facts["trainings"]
    }


def _way(name: str, adapted: Adapted, aligned: AlignedCells) -> Way:
    trainings = adapted.facts["trainings"]
    batches = np.unique(batches_of(aligned.obs, adapted.batch_key), return_inverse=True)[1]
    latent, difference = _embedded(aligned, adapted.encoder, batches)
    return Way(
        name,
        latent,
        max(each["moved"]["latent"] for each in trainings),
        [each["epochs"] for each in trainings],
        sum(each["steps"] for each in trainings),
        sum(each["seconds"] for each in trainings),
        difference,
    )


def _embedded(
    aligned: AlignedCells, encoder: Callable[[pd.DataFrame], Any], batches: npt.NDArray[np.integer]
) -> tuple[Points, float]:
    """Latent positions of all cells, and how much they differ from those of each batch embedded separately."""
    together, largest = [], 0.0
    encode = encoder(aligned.obs)
    for start, counts, proteins in aligned.blocks_with_proteins(_BLOCK_CELLS):
        latent = encode(start, counts, proteins)
        together.append(latent)
        for batch in np.unique(here := batches[start : start + counts.shape[0]]):
            rows = np.flatnonzero(here == batch)
            some = None if proteins is None else proteins[rows]
            separate = encoder(aligned.obs.iloc[start + rows])(0, counts[rows], some)
            largest = max(largest, float(np.abs(latent[rows] - separate).max()))
    return np.concatenate(together), largest


def compare_ways(
    ways: Sequence[Way],
    reference: Points | None = None,
    labels: Labels | None = None,
    truth: Labels | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Compare ways to map a query with the first of them, joint surgery.

    Parameters
    ----------
    ways
        The ways.
    reference
        float32 (reference cells, n_latent): the reference, which does not depend on the way; for `labels`.
    labels
        object (reference cells,): labels of the reference; None: no labels are compared.
    truth
        object (query cells,): labels of the query, None if unknown; None: not known. Labels that the reference lacks
        are not used.
    seed
        Seed of classifiers and clusters.

    Returns
    -------
    The table has one row per way: `moved` (largest change of the reference's latent); `distance_mean`,
    `distance_largest` to joint, and `scale` (mean distance of the cells from their center); `neighbor_overlap` and
    `cluster_agreement` (adjusted Rand index) with joint; for each classifier, `agreement_` with the labels by joint,
    `accuracy_`, and `gain_` and `gain_error_`, the accuracy minus that by joint, and its standard error; `mixing` of
    query and reference within types; `epochs`, `steps` and `seconds`; `batch_by_batch`.
    """
    base = ways[0]
    truth = _of_reference(truth, labels)
    known = None if labels is None else np.array([label is not None for label in labels], dtype=bool)
    rows, named_by_base = [], dict[str, Labels]()
    neighbors = [NeighborIndex(way.latent, seed=seed).others(NEIGHBORS) for way in ways]
    clusters = [leiden(way.latent, 1.0, seed).codes for way in ways]
    transfer = None
    if reference is not None and labels is not None and known is not None:
        transfer = LabelTransfer(reference[known], labels[known], seed=seed)
    for number, way in enumerate(ways):
        to_base = distances(base.latent, way.latent)
        row: dict[str, Any] = {
            "way": way.name,
            "moved": way.moved,
            "distance_mean": to_base.mean,
            "distance_largest": to_base.largest,
            "scale": to_base.scale,
            "neighbor_overlap": shared_neighbors(neighbors[0], neighbors[number]),
            "cluster_agreement": float(adjusted_rand_score(clusters[0], clusters[number])),
        }
        if transfer is not None and reference is not None and labels is not None:
            named = transfer(way.latent)
            named_by_base = named_by_base or named
            for classifier in CLASSIFIERS:
                row[f"agreement_{classifier}"] = share_equal(named_by_base[classifier], named[classifier])
                if truth is not None:
                    row[f"accuracy_{classifier}"] = share_equal(truth, named[classifier])
                    gain = accuracy_gain(truth, named[classifier], named_by_base[classifier])
                    row[f"gain_{classifier}"], row[f"gain_error_{classifier}"] = gain
            types = named_by_base[CLASSIFIERS[0]] if truth is None else truth
            row["mixing"] = mixing_within_types(reference, labels, way.latent, types)
        row |= {name: value for name, value in asdict(way).items() if name in ("epochs", "steps", "seconds")}
        rows.append(row | {"batch_by_batch": way.batch_by_batch})
    table = pd.DataFrame(rows).set_index("way")
    return Comparison(list(ways), table, verdict(table), reference, labels, truth)


def _of_reference(truth: Labels | None, labels: Labels | None) -> Labels | None:
    """The known labels of the query that the reference has, None elsewhere; None if there are none."""
    if truth is None or labels is None:
        return None
    names = set(labels)
    found = np.array([label if label in names else None for label in truth], dtype=object)
    return found if any(label is not None for label in found) else None
