"""Write one organism of a Census: the counts in blocks, then the tables derived from them (obs, var, presence)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import tiledbsoma as soma

from census_scvi.census import schema
from census_scvi.counts.h5ad import MAX_COUNT
from census_scvi.counts.row_hash import row_hashes
from census_scvi.errors import UserError
from census_scvi.local_census.arrays import new_layer, write_block, write_presence, write_table
from census_scvi.local_census.proteins import write_proteins
from census_scvi.local_census.sources import Source

log = logging.getLogger(__name__)

# Minimum number of detected genes: equal counts of cells with fewer genes may be a coincidence.
_TELLING_GENES = 10
_LENGTH_IF_UNKNOWN = 1000.0


@dataclass
class ObsStatistics:
    """Statistics per cell, arrays of shape (cells of the organism,), filled block by block."""

    raw_sum: npt.NDArray[np.float64]
    nnz: npt.NDArray[np.int64]
    raw_mean_nnz: npt.NDArray[np.float64]
    raw_variance_nnz: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, n_obs: int) -> "ObsStatistics":
        """Statistics of zeros; float64, except for nnz (int64)."""
        return cls(np.zeros(n_obs), np.zeros(n_obs, dtype=np.int64), np.zeros(n_obs), np.zeros(n_obs))

    def add(self, start: int, counts: sp.csr_matrix) -> None:
        """Add the cells from position `start` on; counts (cells x genes, float32) have no explicit zeros.

        As in the Census, the variance over the non-zeros has ddof 1, and is 0 for fewer than two non-zeros.
        """
        cells = slice(start, start + counts.shape[0])
        nnz = np.diff(counts.indptr)
        values = counts.data.astype(np.float64)
        row = np.repeat(np.arange(counts.shape[0]), nnz)
        total = np.bincount(row, weights=values, minlength=counts.shape[0])
        mean = total / np.maximum(nnz, 1)
        squares = np.bincount(row, weights=(values - mean[row]) ** 2, minlength=counts.shape[0])
        self.raw_sum[cells], self.nnz[cells], self.raw_mean_nnz[cells] = total, nnz, mean
        self.raw_variance_nnz[cells] = np.where(nnz > 1, squares / np.maximum(nnz - 1, 1), 0.0)


@dataclass(frozen=True)
class Repeated:
    """Primary cells of a dataset with the same counts as an earlier primary cell of this or another dataset."""

    dataset_id: str
    same_as: str
    n_cells: int

    def __str__(self) -> str:
        where = "of other cells of it" if self.dataset_id == self.same_as else f"of cells of {self.same_as}"
        return f"{self.dataset_id}: {self.n_cells:,} primary cells have exactly the counts {where}"


@dataclass(frozen=True)
class Written:
    """Numbers of cells, genes and proteins of an organism that was written, and its repeated primary cells."""

    n_cells: int
    n_genes: int
    n_proteins: int
    repeated: list[Repeated]


def find_repeated(sources: Sequence[Source], hashes: npt.NDArray[np.uint64]) -> list[Repeated]:
    """Find repeated primary cells by the hash of each cell's counts, uint64; cells with hash 0 are ignored."""
    ids = np.repeat([source.dataset_id for source in sources], [len(source.obs) for source in sources])
    primary = np.concatenate([source.obs["is_primary_data"].to_numpy(bool) for source in sources])
    cells = pd.DataFrame({"hash": hashes, "dataset": ids})[primary & (hashes != 0)]
    first = cells.groupby("hash", sort=False)["dataset"].transform("first")
    again = cells.assign(first=first)[cells["hash"].duplicated()]
    numbers = again.groupby(["dataset", "first"], sort=False).size()
    return [Repeated(str(dataset), str(same), int(n)) for (dataset, same), n in numbers.items()]


def join_genes(sources: Sequence[Source]) -> pd.DataFrame:
    """Genes of several sources, each feature_id once, in order of appearance; the first known description is used."""
    var = pd.concat([source.var for source in sources], ignore_index=True)
    length = var["feature_length"].where(var["feature_length"] > 0)
    known_length = length.groupby(var["feature_id"], sort=False).first().fillna(0).astype(np.int64)
    # A feature_name equal to the feature_id is not a symbol.
    name = var["feature_name"].where(var["feature_name"] != var["feature_id"])
    known_name = name.groupby(var["feature_id"], sort=False).first()
    kind = var["feature_type"].where(var["feature_type"] != "unknown")
    known_kind = kind.groupby(var["feature_id"], sort=False).first()
    joined = pd.DataFrame({"feature_id": known_length.index.to_numpy()})
    joined["feature_name"] = known_name.fillna(known_name.index.to_series()).to_numpy()
    joined["feature_type"] = known_kind.fillna("unknown").to_numpy()
    joined["feature_length"] = known_length.to_numpy()
    return joined


def write_experiment(
    census_data: soma.Collection, organism: str, sources: Sequence[tuple[int, Source]], *, n_datasets: int, rows: int
) -> Written:
    """Write the experiment `organism` from (soma_joinid of the dataset, source) pairs.

    Returns the numbers of cells, genes and proteins, and the repeated primary cells.

    Cells get contiguous soma_joinids, source by source. The counts of `rows` cells are in memory at a time.
    """
    var = join_genes([source for _, source in sources])
    n_obs = sum(len(source.obs) for _, source in sources)
    statistics, hashes = ObsStatistics.empty(n_obs), np.zeros(n_obs, np.uint64)
    gene_cells = np.zeros((len(sources), len(var)), dtype=np.int64)
    with census_data.add_new_collection(organism, soma.Experiment) as experiment:
        measurements = experiment.add_new_collection("ms")
        measurement = measurements.add_new_collection("RNA", soma.Measurement)
        with measurement.add_new_collection("X") as layers:
            raw, normalized = (new_layer(layers, name, (n_obs, len(var))) for name in ("raw", "normalized"))
            first_cell = 0
            for number, (joinid, source) in enumerate(sources):
                log.info("dataset %d of %d: %s", joinid + 1, n_datasets, source.dataset_id)
                for start, counts in _census_blocks(source, var, rows):
                    statistics.add(first_cell + start, counts)
                    telling = np.diff(counts.indptr) >= _TELLING_GENES
                    hashes[first_cell + start :][: counts.shape[0]] = np.where(telling, row_hashes(counts), 0)
                    gene_cells[number] += np.bincount(counts.indices, minlength=len(var))
                    write_block(raw, first_cell + start, counts)
                    write_block(normalized, first_cell + start, _normalize(counts, source, start, var))
                first_cell += len(source.obs)
            raw.close()
            normalized.close()
        present = gene_cells > 0
        write_presence(measurement, present, [joinid for joinid, _ in sources], n_datasets)
        n_cells = np.array([len(source.obs) for _, source in sources], dtype=np.int64)
        var["nnz"], var["n_measured_obs"] = gene_cells.sum(axis=0), n_cells @ present
        var.insert(0, "soma_joinid", np.arange(len(var)))
        write_table(measurement, "var", schema.VAR_SCHEMA, len(var), iter([var]))
        tables = _obs_tables([source for _, source in sources], statistics, present.sum(axis=1))
        write_table(experiment, "obs", schema.OBS_SCHEMA, n_obs, tables)
        n_proteins = write_proteins(measurements, sources, n_datasets=n_datasets, rows=rows)
    return Written(n_obs, len(var), n_proteins, find_repeated([source for _, source in sources], hashes))


def _census_blocks(source: Source, var: pd.DataFrame, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Blocks of a source as float32 CSR over the genes of the Census; indices sorted, no explicit zeros."""
    column = pd.Index(var["feature_id"]).get_indexer(pd.Index(source.var["feature_id"])).astype(np.int32)
    expected = 0
    for start, block in source.blocks(rows):
        if start != expected:
            raise ValueError(f"{source.dataset_id}: block starts at cell {start}, expected {expected}")
        expected += block.shape[0]
        if len(block.data) and block.data.max() > MAX_COUNT:
            raise UserError(
                f"{source.path or source.dataset_id}: a count is larger than {MAX_COUNT:,}, "
                "which float32 cannot represent exactly"
            )
        arrays = (block.data.astype(np.float32), column[block.indices], block.indptr.astype(np.int32))
        counts = sp.csr_matrix(arrays, shape=(block.shape[0], len(var)))
        counts.eliminate_zeros()
        counts.sort_indices()
        yield start, counts
    if expected != len(source.obs):
        raise ValueError(f"{source.dataset_id}: {expected} cells in blocks, {len(source.obs)} in obs")


def _normalize(counts: sp.csr_matrix, source: Source, start: int, var: pd.DataFrame) -> sp.csr_matrix:
    """Counts divided by the cell's total; for full-length assays they are divided by gene length first."""
    values = counts.data.astype(np.float64)
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    cells = source.obs.iloc[start : start + counts.shape[0]]
    full_gene = cells["assay"].isin(schema.FULL_GENE_ASSAYS) | cells["assay_ontology_term_id"].isin(
        schema.FULL_GENE_ASSAYS
    )
    if full_gene.any():
        length = var["feature_length"].to_numpy(dtype=np.float64)
        typical = float(np.median(length[length > 0])) if (length > 0).any() else _LENGTH_IF_UNKNOWN
        length[length <= 0] = typical
        values = np.where(full_gene.to_numpy()[row], values / length[counts.indices], values)
    total = np.bincount(row, weights=values, minlength=counts.shape[0])
    share = (values / total[row]).astype(np.float32)
    return sp.csr_matrix((share, counts.indices, counts.indptr), shape=counts.shape)


def _obs_tables(
    sources: Sequence[Source], statistics: ObsStatistics, n_measured: npt.NDArray[Any]
) -> Iterator[pd.DataFrame]:
    """Obs tables, one source after the other, with the same categories in all of them."""
    text = ["dataset_id", *schema.LABEL_COLUMNS]
    labels = {name: _categories(sources, name) for name in schema.LABEL_COLUMNS}
    labels["dataset_id"] = pd.Index([source.dataset_id for source in sources])
    first = 0
    for number, source in enumerate(sources):
        cells = slice(first, first + len(source.obs))
        table = source.obs.assign(dataset_id=source.dataset_id).reset_index(drop=True)
        for name in text:
            table[name] = pd.Categorical(table[name], categories=labels[name])
        if "observation_joinid" not in table:
            table["observation_joinid"] = observation_joinids(source.dataset_id, len(table))
        table["soma_joinid"] = np.arange(cells.start, cells.stop)
        for name, values in vars(statistics).items():
            table[name] = values[cells]
        table["n_measured_vars"] = int(n_measured[number])
        yield table
        first = cells.stop


def _categories(sources: Sequence[Source], column: str) -> pd.Index:
    """All labels of a column, sorted, so that the result does not depend on the order of the files."""
    return pd.Index(sorted({str(label) for source in sources for label in source.obs[column].unique()}))


def observation_joinids(dataset_id: str, n_cells: int) -> list[str]:
    """20 hex digits per cell (str), from dataset_id and position in the dataset: unique, and equal in every build."""
    seed = blake2b(dataset_id.encode(), digest_size=10)

    def of_cell(cell: int) -> str:
        state = seed.copy()
        state.update(b"/%d" % cell)
        return state.hexdigest()

    return [of_cell(cell) for cell in range(n_cells)]
