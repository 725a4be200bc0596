"""Normalised expression of cells of a Census, and differential expression between groups, by the model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.errors import UserError
from census_scvi.query.atlas_cells import AtlasCells
from census_scvi.query.expression import Decoder, warn_where_groups_are_batches


def normalized_expression(
    cells: AtlasCells,
    obs_filter: str | None,
    genes: list[str],
    transform_batch: str | list[str] | None,
    *,
    library_size: float,
    n_samples: int,
    max_cells: int,
    seed: int,
) -> ad.AnnData:
    """See `Atlas.normalized_expression`."""
    decoder = _decoder(cells)
    feature_ids = decoder.check_genes(genes)
    targets = [transform_batch] if isinstance(transform_batch, str) else transform_batch
    chosen = cells.with_batches(obs_filter, max_cells, seed, "obs_filter")
    labels = np.array(chosen.batches, dtype=object)[chosen.batch_codes]
    if targets is None:
        way_out = "Give trained batches in transform_batch (listed in atlas.description.batches)"
        decoder.refuse_untrained(labels, f"{way_out}, or exclude these cells with obs_filter")
    else:
        decoder.check_batches(targets)
        decoder, labels = decoder.for_untrained(labels)
    found = np.empty((len(chosen), len(genes)), np.float32)
    for block in cells.counts(chosen.joinids):
        rows = slice(block.start, block.start + block.counts.shape[0])
        found[rows] = decoder.normalised(
            block.counts,
            labels[rows],
            feature_ids,
            targets,
            library_size=library_size,
            n_samples=n_samples,
            seed=seed + block.start,
            proteins=cells.proteins(chosen.joinids[rows]),
        )
    return ad.AnnData(found, obs=cells.obs(chosen.joinids), var=pd.DataFrame({"feature_id": feature_ids}, index=genes))


def differential_expression(
    cells: AtlasCells,
    group_a: str,
    group_b: str,
    *,
    batch_correction: bool,
    fdr: float,
    delta: float,
    max_cells: int,
    seed: int,
) -> pd.DataFrame:
    """See `Atlas.differential_expression`."""
    decoder = _decoder(cells)
    groups = [
        cells.with_batches(group, max_cells, seed, argument)
        for argument, group in (("group_a", group_a), ("group_b", group_b))
    ]
    if shared := len(np.intersect1d(groups[0].joinids, groups[1].joinids)):
        raise UserError(f"{shared:,} cells are in both groups; change group_a or group_b")
    labels = np.concatenate([np.array(group.batches, dtype=object)[group.batch_codes] for group in groups])
    decoder.refuse_untrained(labels, "Exclude them from group_a and group_b")
    in_first = np.arange(len(labels)) < len(groups[0])
    warn_where_groups_are_batches(labels, in_first, batch_correction=batch_correction)
    blocks = (block.counts for group in groups for block in cells.counts(group.joinids))
    counts = sp.vstack(list(blocks), format="csr")
    proteins = [each for group in groups if (each := cells.proteins(group.joinids)) is not None]
    return decoder.differential(
        counts,
        labels,
        in_first,
        batch_correction=batch_correction,
        fdr=fdr,
        delta=delta,
        seed=seed,
        proteins=np.concatenate(proteins) if proteins else None,
    )


def _decoder(cells: AtlasCells) -> Decoder:
    _ = cells.census
    return Decoder(*cells.model)
