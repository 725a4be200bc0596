"""The evaluated cells of a Census, with labels, batches and embeddings, and a PCA of their counts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from census_scvi.census import ontology
from census_scvi.census.cells import batch_label
from census_scvi.census.genes import locate_genes, read_genes, read_var
from census_scvi.census.open import Census
from census_scvi.census.slices import choose_cells, read_counts_of, read_obs_of, read_positions
from census_scvi.config.messages import suggestion
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.config.run_names import GENES
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.metrics.score import VAGUE
from census_scvi.neighbors.log_pca import log_pca
from census_scvi.neighbors.numba_threads import start_numba_threads
from census_scvi.query.reference import open_embedding
from census_scvi.report.named import embeddings_of
from census_scvi.report.settings import PCA, EvaluateSection
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

BATCH = "batch"
_TERMS = "cell_type_ontology_term_id"
# Columns that colour the UMAPs, in addition to labels and batches.
_SHOWN = ("cell_type", "dataset_id", "assay", "donor_id")
_GENE_CELLS = 20_000

Names = npt.NDArray[np.object_]


@dataclass
class Slice:
    """The cells on which embeddings are evaluated.

    Attributes
    ----------
    obs
        Labels, batches and other columns, one row per cell; indexed by soma_joinid, ascending.
    spaces
        float32 (cells, dimensions) by name; the PCA, if there is one, is first.
    n_matching
        Number of cells of the Census that match the filter; at most `evaluate.max_cells` of them are drawn.
    problems
        Inputs that could not be read, for the report.
    """

    obs: pd.DataFrame
    spaces: dict[str, npt.NDArray[np.float32]]
    n_matching: int
    problems: list[str] = field(default_factory=list)

    def names(self, column: str, *, vague: bool) -> Names:
        """Column as object (cells,); None for missing and, unless `vague`, uninformative values."""
        values = self.obs[column].astype(object).where(self.obs[column].notna(), None).to_numpy(dtype=object)
        if vague:
            return values
        return np.array([None if value is None or str(value) in VAGUE else value for value in values], dtype=object)


def read_slice(
    census: Census, settings: EvaluateSection, directory: Path, *, batch_key: list[str], n_genes: int, seed: int
) -> Slice:
    """Read the cells and embeddings that the settings name.

    Parameters
    ----------
    census
        The open Census.
    settings
        The section `evaluate`.
    directory
        The run directory. Its embedding is used if none is named, and its genes, if it has any, for the PCA.
    batch_key
        obs columns whose combination is the batch.
    n_genes
        Number of highly variable genes for the PCA if the run directory has no genes.
    seed
        Seed of the random sampling of cells.

    Raises
    ------
    UserError
        No cell matches the filter, or no embedding exists.
    """
    joinids, n_matching = choose_cells(
        census,
        settings.obs_filter,
        max_cells=settings.max_cells,
        numbers=generator(seed, Stream.EVALUATED_CELLS),
        setting="evaluate.obs_filter",
    )
    problems: list[str] = []
    spaces, joinids = _embeddings(census, joinids, embeddings_of(settings, directory), problems)
    obs = read_slice_obs(census, joinids, settings, batch_key, problems)
    if settings.baseline:
        log.info("PCA of the counts of %s cells", f"{len(joinids):,}")
        genes = _genes(census, joinids, directory, n_genes, seed)
        spaces = {PCA: log_pca(_counts(census, joinids, genes)), **spaces}
    return Slice(obs, spaces, n_matching, problems)


def _embeddings(
    census: Census, joinids: npt.NDArray[np.int64], named: dict[str, str], problems: list[str]
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """Embeddings of the cells that are in all of them; an embedding that cannot be read is skipped."""
    read = {}
    for name, place in named.items():
        try:
            embedding = open_embedding(place, census)
        except UserError as error:
            if len(named) == 1:
                raise
            problems.append(f"{name}: {error}")
            continue
        log.info("%s is the embedding %s", name, without_credentials(embedding.name))
        found, values = read_positions(embedding, joinids)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            problems.append(
                f"{name} has no finite position for {(~finite).sum():,} cells; they are excluded for all embeddings"
            )
        if len(found) < len(joinids):
            problems.append(
                f"{name} lacks {len(joinids) - len(found):,} of the cells; they are excluded for all embeddings"
            )
        read[name] = (found[finite], values[finite])
    common = joinids
    for found, _ in read.values():
        common = np.intersect1d(common, found, assume_unique=True)
    if not read or not len(common):
        raise UserError(
            f"none of the {len(joinids):,} cells has a position in {' and '.join(named)}; give an embedding of this"
            f" Census in evaluate.embeddings, or another evaluate.obs_filter. {'; '.join(problems)}"
        )
    return {name: values[np.searchsorted(found, common)] for name, (found, values) in read.items()}, common


def read_slice_obs(
    census: Census, joinids: npt.NDArray[np.int64], settings: EvaluateSection, key: list[str], problems: list[str]
) -> pd.DataFrame:
    """`Slice.obs` of cells, int64 (cells,) ascending; adds the columns of the settings that do not exist to `problems`.

    `key` are the obs columns that define the batch.
    """
    known = [name for name in census.experiment.obs.schema.names if name != "soma_joinid"]
    wanted = [*settings.labels, *settings.batches, *_SHOWN, *key, _TERMS]
    if settings.donors:
        wanted.append(settings.donors)
    columns = [name for name in dict.fromkeys(wanted) if name in known]
    obs = read_obs_of(census, joinids, columns).set_index("soma_joinid")
    if all(name in obs for name in key):
        combinations = obs[key].astype(object).itertuples(index=False, name=None)
        obs[BATCH] = [batch_label(values) for values in combinations]
    for column in ontology.COLUMNS:
        if column in settings.labels and column not in obs and _TERMS in obs:
            obs[column] = ontology.classes_of(obs[_TERMS], column)
    for setting, names in {"labels": settings.labels, "batches": settings.batches}.items():
        for name in names:
            if name not in obs and name not in ontology.COLUMNS:
                near = suggestion(name, known)
                problems.append(f"evaluate.{setting} contains {name!r}, which is not an obs column of the Census{near}")
    return obs


def _genes(
    census: Census, joinids: npt.NDArray[np.int64], directory: Path, n_genes: int, seed: int
) -> npt.NDArray[np.int64]:
    """soma_joinids of the genes of the run, or of highly variable genes if there is no run."""
    path = directory / GENES
    if path.exists():
        Workspace(directory).check("prepare", [GENES])
        found = locate_genes(census, read_genes(path), 0.0)
        return found[found >= 0]
    every = read_var(census)["soma_joinid"].to_numpy()
    some = joinids[draw(len(joinids), _GENE_CELLS, generator(seed, Stream.CELLS_FOR_GENES))]
    cells = ad.AnnData(_counts(census, some, every))
    start_numba_threads()
    sc.pp.filter_genes(cells, min_cells=1)
    kept = sc.pp.highly_variable_genes(
        cells, flavor="seurat_v3", n_top_genes=min(n_genes, cells.n_vars), inplace=False
    )["highly_variable"].to_numpy()
    return every[cells.var_names.astype(int)[kept]]


def _counts(census: Census, joinids: npt.NDArray[np.int64], genes: npt.NDArray[np.int64]) -> sp.csr_matrix:
    """CSR float32 (cells, genes): raw counts."""
    return sp.vstack([block.counts for block in read_counts_of(census, joinids, genes)], format="csr")
