"""Slices of a Census are what the Census API reads, and the same random cells with the same seed."""

import cellxgene_census
import numpy as np
import pytest
from pipeline import Run

from census_scvi.census.cells import batch_label
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.census.slices import (
    choose_cells,
    choose_cells_and_batches,
    read_counts_of,
    read_obs_of,
    read_positions,
)
from census_scvi.query.reference import RunEmbedding

FILTER = "is_primary_data == True and nnz >= 60"


@pytest.mark.parametrize("max_cells", [1, 300, 10**6])
def test_a_slice_is_what_the_census_api_reads(demo_census: str, finished_run: Run, max_cells: int) -> None:
    with cellxgene_census.open_soma(uri=demo_census) as root:
        theirs = cellxgene_census.get_anndata(root, "Homo sapiens", obs_value_filter=FILTER)
    every, n_cells = theirs.obs["soma_joinid"].to_numpy(), theirs.n_obs
    assert 400 < n_cells < 1500
    numbers = np.random.default_rng(3)
    rows = np.sort(numbers.choice(n_cells, max_cells, replace=False)) if max_cells < n_cells else np.arange(n_cells)
    with open_census(CensusSection(uri=demo_census)) as census:
        joinids, n_matching = choose_cells(census, FILTER, max_cells=max_cells, numbers=np.random.default_rng(3))
        assert n_matching == n_cells
        assert np.array_equal(joinids, every[rows])

        cells = choose_cells_and_batches(
            census, FILTER, ["donor_id", "assay"], max_cells=max_cells, numbers=np.random.default_rng(3)
        )
        assert np.array_equal(cells.joinids, joinids)
        expected = theirs.obs.iloc[rows]
        labels = [batch_label(values) for values in expected[["donor_id", "assay"]].itertuples(index=False, name=None)]
        assert [cells.batches[code] for code in cells.batch_codes] == labels

        obs = read_obs_of(census, joinids, ["tissue", "nnz"])
        assert list(obs.columns) == ["soma_joinid", "tissue", "nnz"]
        assert obs["tissue"].astype(str).tolist() == expected["tissue"].astype(str).tolist()
        assert np.array_equal(obs["nnz"].to_numpy(), expected["nnz"].to_numpy())

        blocks = list(read_counts_of(census, joinids, np.array([5, -1, 2])))
        counts = np.concatenate([block.counts.toarray() for block in blocks])
        assert np.array_equal(counts[:, [0, 2]], theirs.X[rows][:, [5, 2]].toarray())
        assert not counts[:, 1].any()

        found, positions = read_positions(RunEmbedding(finished_run.directory, census), joinids)
    places = np.searchsorted(np.load(finished_run.path("latent-idx.npy")), joinids)
    assert np.array_equal(found, joinids)
    assert np.array_equal(positions, np.load(finished_run.path("latent.npy"))[places])
