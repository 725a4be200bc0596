"""Genes selected in one pass are scanpy's and the Census library's, whatever the counts look like."""

from pathlib import Path
from typing import Literal

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from cellxgene_census.experimental.pp import highly_variable_genes
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census.cells import Cells, select_cells
from census_scvi.census.genes import read_genes, read_var, select_genes
from census_scvi.census.hvg import select
from census_scvi.census.hvg.seurat_v3 import mean_and_variance, normalised_variance, top_genes
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection, HvgSection
from census_scvi.local_census.sources import open_h5ad
from census_scvi.local_census.write import build_census


def tally_of(matrix: np.ndarray, batches: np.ndarray, kept: int) -> GeneTally:
    tally = GeneTally(int(batches.max()) + 1, matrix.shape[1], kept=kept)
    cell, gene = np.nonzero(matrix)
    order = np.random.default_rng(0).permutation(len(cell))
    cell, gene = cell[order], gene[order]
    tally.add(batches[cell].astype(np.int32), gene.astype(np.int64), matrix[cell, gene].astype(np.float32))
    return tally


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_cells=st.integers(2, 60),
    kept=st.integers(1, 40),
    scale=st.sampled_from([1, 30, 3000]),
    share=st.floats(0.0, 1.5),
)
def test_clipped_sums_are_exact_where_the_tally_says_so(
    seed: int, n_cells: int, kept: int, scale: int, share: float
) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.negative_binomial(0.3, 0.3 / (0.3 + scale), size=(n_cells, 7))
    batches = np.arange(n_cells) % 2
    tally = tally_of(matrix, batches, kept)
    clip = np.full((2, 7), share * max(matrix.max(), 1))
    sums, squares, exact = tally.clipped(clip)
    for batch in (0, 1):
        cells = matrix[batches == batch]
        clipped = np.minimum(cells, clip[batch])
        np.testing.assert_allclose(tally.sums[batch], cells.sum(axis=0))
        np.testing.assert_allclose(tally.squares[batch], (cells.astype(float) ** 2).sum(axis=0))
        # Exact to the rounding of what the clipped part is taken from, however little the clip value leaves of it.
        right = np.isclose(sums[batch], clipped.sum(axis=0), atol=1e-12 * cells.sum())
        right &= np.isclose(squares[batch], (clipped**2).sum(axis=0), atol=1e-12 * (cells.astype(float) ** 2).sum())
        assert right[exact[batch]].all()
        few = (cells > clip[batch]).sum(axis=0) < kept
        assert exact[batch][few].all()  # and it does not cry wolf


def test_the_largest_counts_are_kept() -> None:
    generator = np.random.default_rng(1)
    matrix = generator.integers(0, 10_000, size=(500, 3))
    tally = tally_of(matrix, np.zeros(500, dtype=int), kept=16)
    for gene in range(3):
        assert sorted(tally.largest[0, gene]) == sorted(matrix[:, gene])[-16:]


def human_cells(uri: str) -> ad.AnnData:
    with cellxgene_census.open_soma(uri=uri) as root:
        return cellxgene_census.get_anndata(root, "Homo sapiens")


def one_pass(uri: str, batch_key: list[str], n_top: int) -> np.ndarray:
    with open_census(CensusSection(uri=uri)) as census:
        return select.select_in_one_pass(census, select_cells(census, None, batch_key), n_top, seed=0)[0]


def test_scores_are_scanpy_s(demo_census: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {}
    real = select.top_genes
    monkeypatch.setattr(select, "top_genes", lambda variances, n: scores.update(ours=variances) or real(variances, n))
    chosen = one_pass(demo_census, [], 200)
    theirs = sc.pp.highly_variable_genes(human_cells(demo_census), flavor="seurat_v3", n_top_genes=200, inplace=False)
    np.testing.assert_allclose(scores["ours"][0], theirs["variances_norm"], rtol=1e-9)
    assert np.array_equal(chosen, theirs["highly_variable"].to_numpy())


def scanpy_scores(cells: ad.AnnData, batch_key: list[str]) -> np.ndarray:
    """Scores within each batch, batch by batch, (batches, genes)."""
    label = cells.obs[batch_key].astype(str).agg("|".join, axis=1)
    batches = [cells[(label == name).to_numpy()] for name in sorted(label.unique())]
    scores = [sc.pp.highly_variable_genes(batch, flavor="seurat_v3", inplace=False) for batch in batches]
    return np.array([score["variances_norm"].to_numpy() for score in scores])


@pytest.mark.parametrize("batch_key", [["assay"], ["suspension_type", "assay"], ["dataset_id"], ["donor_id"]], ids=str)
def test_genes_are_scanpy_s_within_batches(demo_census: str, batch_key: list[str]) -> None:
    expected = top_genes(scanpy_scores(human_cells(demo_census), batch_key), 150)
    assert np.array_equal(one_pass(demo_census, batch_key, 150), expected)


@pytest.fixture(scope="module")
def blood(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Census of the real blood cells."""
    uri = str(tmp_path_factory.mktemp("blood") / "census")
    file = real_data / "pbmc_multi_human.h5ad"
    columns = {"donor_id": "batch"}
    build_census(uri, open_h5ad(file, dataset_column="dataset", organism="homo_sapiens", obs_columns=columns))
    return uri


@pytest.mark.parametrize("batch_key", [["dataset_id"], ["dataset_id", "donor_id"]], ids=str)
def test_genes_of_real_cells_are_scanpy_s_and_the_census_library_s(blood: str, batch_key: list[str]) -> None:
    with open_census(CensusSection(uri=blood)) as census:
        ours, theirs = (
            select_genes(
                census, None, HvgSection(top_n_hvg=2000, hvg_batch=batch_key, engine=engine), seed=0
            ).feature_ids
            for engine in ("one-pass", "census")
        )
    cells = human_cells(blood)
    expected = cells.var["feature_id"][top_genes(scanpy_scores(cells, batch_key), 2000)]
    assert ours == expected.tolist()
    # The library clips in single precision, which moves scores by up to 1e-3, and leaves ties to the sorting algorithm.
    assert len(set(ours) & set(theirs)) >= 0.98 * 2000


@pytest.mark.parametrize("engine", ["one-pass", "census"])
@pytest.mark.parametrize("value_filter", [None, "nnz >= 150 and is_primary_data == True"])
def test_rare_genes_are_excluded_before_selection_as_scanpy_does(
    demo_census: str, engine: Literal["one-pass", "census"], value_filter: str | None
) -> None:
    cells = human_cells(demo_census)
    if value_filter:
        cells = cells[(cells.obs["nnz"] >= 150) & cells.obs["is_primary_data"]].copy()
    settings = HvgSection(top_n_hvg=100, hvg_batch=["assay"], engine=engine)
    with open_census(CensusSection(uri=demo_census)) as census:
        selection = select_genes(census, value_filter, settings, seed=0, min_cells=700)
    common = cells[:, (cells.X > 0).sum(axis=0).A1 >= 700].copy()
    expected = common.var["feature_id"][top_genes(scanpy_scores(common, ["assay"]), 100)].tolist()
    assert 100 < common.n_vars < cells.n_vars - 100
    assert selection.below_min_cells == cells.n_vars - common.n_vars
    assert len(set(selection.feature_ids) & set(expected)) >= (100 if engine == "one-pass" else 98)
    assert len(selection.feature_ids) == 100


@pytest.mark.parametrize("engine", ["one-pass", "census"])
def test_fewer_common_genes_than_asked_for_are_all_taken(demo_census: str, tmp_path: Path, engine: str) -> None:
    run = Run(tmp_path, demo_census, hvg={"engine": engine}, genes={"min_cells": 1250})
    assert run("prepare") == 0
    cells = human_cells(demo_census)
    cells = cells[cells.obs["is_primary_data"] & (cells.obs["nnz"] >= 50)]
    common = (cells.X > 0).sum(axis=0).A1 >= 1250
    assert 0 < common.sum() < 200
    assert read_genes(run.path("hv_genes.pkl")) == cells.var["feature_id"][common].tolist()
    assert run.record("prepare")["counts"]["genes_below_min_cells"] == (~common).sum()
    assert run("prepare") == 0  # done
    assert run("prepare", "genes.min_cells=1") == 2


def test_no_gene_in_so_many_cells(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(tmp_path, demo_census)("prepare", "genes.min_cells=1000000") == 2
    assert "genes.min_cells is 1,000,000 and no gene is detected in that many of the cells" in capsys.readouterr().err


def test_reading_again_where_too_few_large_counts_were_kept(demo_census: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a small deviation is a low clip value: many counts lie above it
    monkeypatch.setattr(select, "regularised_deviation", lambda means, variances, seed: np.full(len(means), 0.1))
    expected = one_pass(demo_census, ["assay"], 150)
    again = []
    real = select.read_again
    monkeypatch.setattr(select, "n_kept", lambda batches, genes: 1)
    monkeypatch.setattr(select, "read_again", lambda *arguments: again.append(1) or real(*arguments))
    assert np.array_equal(one_pass(demo_census, ["assay"], 150), expected)
    assert again


def test_batches_of_one_cell_and_genes_without_variance_score_nothing() -> None:
    sums, squares = np.array([[3.0, 0.0], [8.0, 4.0]]), np.array([[9.0, 0.0], [32.0, 10.0]])
    n_cells = np.array([1, 2])
    means, variances = mean_and_variance(sums, squares, n_cells)
    assert variances.tolist() == [[0, 0], [0, 2]]
    scores = normalised_variance(means, np.ones((2, 2)), sums, squares, n_cells)
    assert scores[0].tolist() == [0, 0]
    assert np.isfinite(scores).all()


def test_ties_go_to_the_gene_that_comes_first() -> None:
    assert top_genes(np.array([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [True, True, False, False]


def test_the_rank_is_the_median_over_batches_then_their_number() -> None:
    # gene 0: second in one batch; gene 1: first in one; gene 2: first and second
    variances = np.array([[0.0, 5.0, 4.0, 1.0], [4.0, 0.0, 5.0, 1.0]])
    assert top_genes(variances, 2).tolist() == [False, True, True, False]


def test_the_engine_is_the_config_s(demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise AssertionError("one-pass was used")

    monkeypatch.setattr("census_scvi.census.genes.select_in_one_pass", fails)
    assert Run(tmp_path / "census", demo_census, hvg={"engine": "census"})("prepare") == 0
    assert Run(tmp_path / "one", demo_census, hvg={"engine": "one-pass"})("prepare") == 1


def test_the_census_library_s_jitter_is_seeded_and_numpy_left_alone(
    demo_census: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = HvgSection(top_n_hvg=200, hvg_batch=["donor_id", "cell_type"], engine="census")
    with open_census(CensusSection(uri=demo_census)) as census:
        with census.experiment.axis_query("RNA") as query:
            with pytest.raises(ValueError, match=r"condition number|singular"):  # it does need jitter
                highly_variable_genes(query, batch_key=settings.hvg_batch, max_loess_jitter=0)
            unseeded = np.random.default_rng
            with monkeypatch.context() as patch:  # what the library gives where its generator starts from the seed
                patch.setattr(np.random, "default_rng", lambda: unseeded(7))
                theirs = highly_variable_genes(query, n_top_genes=200, batch_key=settings.hvg_batch)
        with monkeypatch.context() as patch:  # what other threads would draw from
            patch.setattr(np.random, "default_rng", lambda seed: unseeded(seed))
            chosen = select_genes(census, None, settings, seed=7).feature_ids
        var = read_var(census)
    assert chosen == var["feature_id"][theirs["highly_variable"].to_numpy()].tolist()


def test_cells_without_a_batch_key_are_one_batch(demo_census: str) -> None:
    with open_census(CensusSection(uri=demo_census)) as census:
        cells = select_cells(census, "soma_joinid < 10", [])
    assert isinstance(cells, Cells)
    pd.testing.assert_series_equal(cells.batch_sizes(), pd.Series([10], index=[""]))
