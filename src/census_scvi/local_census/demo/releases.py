"""The demo Census in two releases, as a Census changes: new datasets and donors, removed and re-annotated cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.local_census.demo.cells import DemoSource, demo_sources
from census_scvi.local_census.sources import regroup
from census_scvi.local_census.write import build_census

# What is only in the second release: a study of another tissue, and a donor of a study that the first one has, too.
NEW_DATASET, NEW_DONOR = "demo-human-heart", "human-blood-4"
# Share of the cells of blood that the second release lacks, and share of the macrophages of lung with a new label.
_REMOVED, _RELABELLED = 0.05, 0.5
_BLOOD, _LUNG = "demo-human-blood", "demo-human-lung"
_NEW_LABEL = {"cell_type": "alveolar macrophage", "cell_type_ontology_term_id": "CL:0000583"}


class _Some:
    """Some cells of a dataset (a `Source`)."""

    def __init__(self, source: DemoSource, kept: npt.NDArray[np.bool_], obs: pd.DataFrame | None = None) -> None:
        self._source, self._kept = source, kept
        self.obs = (source.obs if obs is None else obs)[kept].reset_index(drop=True)
        self.kept_counts = np.ones(len(self.obs))
        self.dataset_id, self.title, self.organism = source.dataset_id, source.title, source.organism
        self.path, self.var, self.genes, self.proteins = source.path, source.var, source.genes, source.proteins

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts int64 of at most `rows` cells x genes)."""
        return self._some(self._source.blocks(rows), rows)

    def protein_blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts int64 of at most `rows` cells x proteins)."""
        return self._some(self._source.protein_blocks(rows), rows)

    def _some(self, blocks: Iterator[tuple[int, sp.csr_matrix]], rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        kept = (block[np.flatnonzero(self._kept[start : start + block.shape[0]])] for start, block in blocks)
        return regroup(kept, rows)


def write_demo_releases(
    first: str | Path,
    second: str | Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    n_genes: int = 3000,
    force: bool = False,
) -> None:
    """Write two releases of the demo Census into the folders `first` and `second`.

    The second one has a new study of another tissue, and a new donor in a study of the first one; 5 % of that study's
    cells are gone, and half of the macrophages of another study have a finer label. All else is the same.

    Parameters
    ----------
    first, second
        Folders to write.
    seed, scale, n_genes
        As for `demo_sources`.
    force
        Whether to replace folders that exist.
    """
    sources = demo_sources(seed, scale, n_genes)
    old = [_in_first(source) for source in sources if source.dataset_id != NEW_DATASET]
    build_census(first, old, force=force)
    build_census(second, [_in_second(source, np.random.default_rng(seed)) for source in sources], force=force)


def _in_first(source: DemoSource) -> _Some:
    return _Some(source, (source.obs["donor_id"] != NEW_DONOR).to_numpy())


def _in_second(source: DemoSource, numbers: np.random.Generator) -> _Some:
    obs, kept = source.obs, np.full(len(source.obs), True)
    if source.dataset_id == _BLOOD:
        kept = numbers.random(len(obs)) >= _REMOVED
    if source.dataset_id == _LUNG:
        relabelled = (obs["cell_type"] == "macrophage").to_numpy() & (numbers.random(len(obs)) < _RELABELLED)
        obs = obs.astype(dict.fromkeys(_NEW_LABEL, object))
        obs.loc[relabelled, list(_NEW_LABEL)] = list(_NEW_LABEL.values())
    return _Some(source, kept, obs)
