"""The gates of a run: collects their inputs from the run directory and the Census."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scvi

from census_scvi.census.cells import Cells
from census_scvi.census.genes import read_genes
from census_scvi.counts.order import BLOCK_ROWS
from census_scvi.counts.reader import PreparedCells
from census_scvi.model.facts import built_facts, expected_facts
from census_scvi.model.safe import ModelDescription
from census_scvi.model.settings import ModelSection
from census_scvi.neighbors.log_pca import log_pca
from census_scvi.publication import gates
from census_scvi.publication.gates import Gate, LatentMoments
from census_scvi.publication.neighbor_overlap import label_share
from census_scvi.publication.sample import Sample
from census_scvi.publication.settings import GatesSection
from census_scvi.workspace import Artifacts, Workspace

_ROWS = 2**16
_COUNTED_BLOCKS = 64
_COMPONENTS = 50


def measure(
    directory: Path,
    artifacts: Artifacts,
    bounds: GatesSection,
    settings: ModelSection,
    cells: Cells,
    gene_joinids: npt.NDArray[np.int64],
    model: scvi.model.SCVI,
    description: ModelDescription,
    sample: Sample,
    *,
    min_share: float,
    seed: int,
) -> list[Gate]:
    """Measure all gates of an embedding.

    Parameters
    ----------
    directory, artifacts
        The run directory, and the names of its artifacts.
    bounds, settings
        The sections `gates` and `model`.
    cells
        The cells of `obs_query` in the Census.
    gene_joinids
        int64 (genes,): soma_joinids of the model's genes in the Census, -1 for a missing gene.
    model, description
        The trained model in its safe form.
    sample
        Cells that were read again from the Census.
    min_share
        `genes.min_share`.
    seed
        Seed of the PCA and of the bootstrap intervals.
    """
    latent = np.load(directory / artifacts.latent, mmap_mode="r")
    joinids = np.load(directory / artifacts.latent_joinids)
    hashes = np.load(directory / artifacts.latent_hashes)
    found = [gates.same_cells(cells.joinids, joinids)]
    moments = moments_of(latent)
    found += [
        gates.finite(moments),
        gates.variance(moments, bounds.min_variance),
        gates.duplicate_dimensions(moments, bounds.max_correlation),
        gates.effective_rank(moments, min(bounds.min_effective_rank, latent.shape[1])),
    ]
    counts = _gene_counts(directory / artifacts.prepared)
    found += gates.gene_coverage(gene_joinids >= 0, counts, min_share)
    genes = read_genes(directory / artifacts.genes)
    expected = expected_facts(settings, description, genes)
    found.append(gates.architecture(expected, built_facts(model, description.genes)))
    trained = Workspace(directory).record("train") or {}
    found += gates.training_gates(trained.get("learning_curves", {}), bounds.max_elbo_fall, bounds.max_elbo_gap)
    if not found[0].passed:  # rows and cells do not match: nothing below can be compared
        return found
    mean, variance = sample.embed(model, description.genes)
    comparable = _comparable(sample, description)
    published = np.asarray(latent[sample.rows])
    if description.arguments["encode_covariates"]:  # then the same counts in another batch are another input
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + cells.batch_codes.astype(np.uint64)
    found += [
        gates.re_embedding(sample.joinids[comparable], published[comparable], mean[comparable], bounds.max_difference),
        gates.order(hashes, latent, joinids, bounds.max_difference),
        gates.active_units(variance, bounds.min_active_units),
    ]
    return found + _warnings(bounds.label, sample, published, seed)


def _comparable(sample: Sample, description: ModelDescription) -> npt.NDArray[np.bool_]:
    """Cells that scvi-tools can embed: all, or only those of trained batches if the encoder sees the batch."""
    if not description.arguments["encode_covariates"]:
        return np.ones(len(sample.rows), bool)
    return sample.obs["batch"].isin(description.batches).to_numpy()


def moments_of(latent: npt.NDArray[np.float32]) -> LatentMoments:
    """Moments of an embedding, which is read in blocks."""
    moments = LatentMoments(latent.shape[1])
    for start in range(0, len(latent), _ROWS):
        moments.add(latent[start : start + _ROWS])
    return moments


def _gene_counts(prepared: Path) -> npt.NDArray[np.float64]:
    """Counts of each gene over some blocks of the prepared cells; the cells are shuffled."""
    cells = PreparedCells(prepared)
    counts = np.zeros(cells.n_genes)
    starts = range(0, cells.n_cells, BLOCK_ROWS)
    for start in starts[:: -(-len(starts) // _COUNTED_BLOCKS)]:
        rows = cells.read([(start, min(start + BLOCK_ROWS, cells.n_cells))])
        counts += np.bincount(rows.genes, weights=rows.counts, minlength=cells.n_genes)
    cells.close()
    return counts


def _warnings(label: str, sample: Sample, published: npt.NDArray[np.float32], seed: int) -> list[Gate]:
    """Separation of cell types and mixing of batches, compared with a PCA of the same cells and genes."""
    types, batches = (sample.obs[name].astype(str).to_numpy() for name in (label, "batch"))
    pca = _pca(sample, seed)
    separation = [label_share(space, types, seed=seed) for space in (published, pca)]
    mixing = [label_share(space, batches, within=types, seed=seed) for space in (published, pca)]
    return [
        Gate(
            "cell_type_separation",
            separation[0].value,
            "at least",
            separation[1].low,
            f"neighbors of the same {label}: {separation[0]}; in a PCA {separation[1]}",
            stops=False,
        ),
        Gate(
            "batch_mixing",
            mixing[0].value,
            "at most",
            mixing[1].high,
            f"neighbors of the same batch among cells of a {label}: {mixing[0]}; in a PCA {mixing[1]}",
            stops=False,
        ),
    ]


def _pca(sample: Sample, seed: int) -> npt.NDArray[np.float32]:
    """Principal components of log-normalised counts, (cells, components)."""
    return log_pca(sample.counts, _COMPONENTS, counts_per_cell=None, seed=seed)


def table(found: Iterable[Gate], waived: dict[str, str]) -> str:
    """Table of the gates for the log: name, value, limit, verdict, finding."""
    rows = []
    for gate in found:
        verdict = (
            "passed" if gate.passed else "waived" if gate.name in waived else "FAILED" if gate.stops else "warning"
        )
        rows.append((gate.name, f"{gate.value:.4g}", f"{gate.side} {gate.bound:.4g}", verdict, gate.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )


def record(found: Iterable[Gate], waived: dict[str, str], not_applicable: Iterable[str] = ()) -> dict[str, Any]:
    """Content of `qa.json`: every gate with its verdict, the reasons for waived gates, gates that do not apply."""
    listed = [
        {**gate.record(), **({"waived": waived[gate.name]} if gate.name in waived and not gate.passed else {})}
        for gate in found
    ]
    sound = all(gate["passed"] or "waived" in gate or not gate["stops"] for gate in listed)
    others = list(not_applicable)
    return {"gates": listed, "sound": sound, **({"not_applicable": others} if others else {})}
