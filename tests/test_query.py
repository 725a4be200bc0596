"""A user's own cells: genes aligned by name, counts found, what does not fit refused with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.errors import UserError
from census_scvi.model.encode import reference_latent
from census_scvi.model.safe import load_safe
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells
from census_scvi.query.mapping import Mapper

ORGANISM = "homo_sapiens"


@pytest.fixture(scope="module")
def cells(demo_census: str) -> ad.AnnData:
    """Cells of the Census with all their genes, named by symbol, as a user may have them."""
    with cellxgene_census.open_soma(uri=demo_census) as root:
        adata = cellxgene_census.get_anndata(root, ORGANISM, obs_value_filter="soma_joinid < 400")
    adata.var = adata.var[["feature_id", "feature_name"]].set_index(adata.var["feature_name"].astype(str))
    adata.X = adata.X.astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def latent(finished_run: Run) -> np.ndarray:
    return np.load(finished_run.path("latent.npy"))[:400]


@pytest.fixture(scope="module")
def mapper(finished_run: Run) -> Mapper:
    return Mapper(*load_safe(finished_run.path("scvi.model")))


def by_id(cells: ad.AnnData) -> ad.AnnData:
    changed = cells.copy()
    changed.var = pd.DataFrame(index=changed.var["feature_id"].astype(str))
    return changed


def with_versions(cells: ad.AnnData) -> ad.AnnData:
    changed = by_id(cells)
    changed.var_names = [f"{name}.{number % 20}" for number, name in enumerate(changed.var_names)]
    return changed


def numbered(cells: ad.AnnData) -> ad.AnnData:
    """Names of no meaning in the index; ids in a categorical column."""
    changed = cells.copy()
    changed.var = pd.DataFrame({"gene_ids": pd.Categorical(changed.var["feature_id"])})
    return changed


def shuffled(cells: ad.AnnData) -> ad.AnnData:
    return cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()


def normalised(cells: ad.AnnData) -> ad.AnnData:
    changed = cells.copy()
    changed.X = changed.X.multiply(1 / np.maximum(changed.X.sum(axis=1), 1)).log1p().tocsr().astype(np.float32)
    return changed


def counts_in_layer(cells: ad.AnnData) -> ad.AnnData:
    changed = normalised(cells)
    changed.layers["counts"] = cells.X
    return changed


def counts_in_odd_layer(cells: ad.AnnData) -> ad.AnnData:
    changed = normalised(cells)
    changed.layers["spliced_and_not"] = cells.X.toarray()
    return changed


def counts_in_raw(cells: ad.AnnData) -> ad.AnnData:
    """As in many tutorials: raw holds the counts of all genes, X some genes, normalised."""
    changed = normalised(cells)[:, :50].copy()
    changed.raw = cells
    return changed


def split_gene(cells: ad.AnnData) -> ad.AnnData:
    """Every column twice, with half of the counts each: the same gene under two versions of its id."""
    one, other = by_id(cells), by_id(cells)
    one.X.data = np.floor(cells.X.data / 2)
    other.X = (cells.X - one.X).tocsr()
    other.var_names = [f"{name}.7" for name in other.var_names]
    return ad.concat([one, other], axis=1, merge="first")


FORMS = [by_id, with_versions, numbered, shuffled, counts_in_layer, counts_in_odd_layer, counts_in_raw, split_gene]
STORED: dict[str, Callable[[ad.AnnData], ad.AnnData]] = {
    "csr": lambda cells: cells,
    "csc": lambda cells: ad.AnnData(cells.X.tocsc(), obs=cells.obs, var=cells.var),
    "dense": lambda cells: ad.AnnData(cells.X.toarray(), obs=cells.obs, var=cells.var),
    "int64": lambda cells: ad.AnnData(cells.X.astype(np.int64), obs=cells.obs, var=cells.var),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_the_census_own_cells_are_embedded_as_in_the_census(
    form: Callable[[ad.AnnData], ad.AnnData],
    in_file: bool,
    cells: ad.AnnData,
    latent: np.ndarray,
    mapper: Mapper,
    tmp_path: Path,
) -> None:
    query = form(cells)
    before = query.copy()
    if in_file:
        query.write_h5ad(tmp_path / "query.h5ad")
    mapped = mapper(tmp_path / "query.h5ad" if in_file else query)
    np.testing.assert_allclose(mapped.latent, latent, atol=1e-5)
    assert mapped.obs.index.tolist() == before.obs_names.tolist()
    assert mapped.report.n_shared == mapped.report.n_genes == 200
    assert not mapped.report.missing
    assert mapped.report.summed == (200 if form is split_gene else 0)
    assert (query.X != before.X).nnz == 0  # the user's cells are as they were
    assert query.var_names.equals(before.var_names)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("place", ["memory", "file", "backed"])
def test_any_way_of_storing_counts(
    stored: str, place: str, cells: ad.AnnData, latent: np.ndarray, mapper: Mapper, tmp_path: Path
) -> None:
    query: ad.AnnData | Path = STORED[stored](cells)
    if place != "memory":
        query.write_h5ad(tmp_path / "query.h5ad")
        query = tmp_path / "query.h5ad" if place == "file" else ad.read_h5ad(tmp_path / "query.h5ad", backed="r")
    np.testing.assert_allclose(mapper(query).latent, latent, atol=1e-5)


def test_missing_genes_count_as_zero_as_in_scvi_tools(cells: ad.AnnData, finished_run: Run, mapper: Mapper) -> None:
    model, description = load_safe(finished_run.path("scvi.model"))
    dropped = set(description.genes[::9])
    query = by_id(cells)
    query = query[:, ~query.var_names.isin(dropped)].copy()
    mapped = mapper(query)
    assert set(mapped.report.missing) == dropped
    assert mapped.report.n_shared == 200 - len(dropped)
    padded = by_id(cells)[:, description.genes].X.tolil()
    padded[:, ::9] = 0
    expected, _ = reference_latent(model, description.genes, padded.tocsr(), ["query"] * cells.n_obs)
    np.testing.assert_allclose(mapped.latent, expected, atol=1e-5)
    assert mapped.report.counts_share == pytest.approx(padded.sum() / query.X.sum(), rel=1e-5)


def test_the_report_reads_well(cells: ad.AnnData, mapper: Mapper, finished_run: Run) -> None:
    query = cells.copy()
    query.X.data[slice(*query.X.indptr[3:5])] = 0
    query.X.eliminate_zeros()
    gene = load_safe(finished_run.path("scvi.model"))[1].symbols[0]
    query.var_names = ["renamed" if name == gene else name for name in query.var_names]  # the column of ids has it
    mapped = mapper(query)
    lines = str(mapped.report).splitlines()
    assert lines[0] == "raw counts from X, genes from var['feature_id']"
    assert lines[1] == "200 of the model's 200 genes (100.0%), by Ensembl id (200)"
    assert lines[-1].startswith("1 cells have no counts in these genes")
    assert mapped.empty.nonzero()[0].tolist() == [3]


# --- what is refused


def lower_case(cells: ad.AnnData) -> ad.AnnData:
    changed = cells.copy()
    changed.var = pd.DataFrame(index=changed.var_names.str.lower())
    return changed


def of_a_mouse(cells: ad.AnnData) -> ad.AnnData:
    changed = by_id(cells)
    changed.var_names = changed.var_names.str.replace("ENSG", "ENSMUSG")
    return changed


def named_by_number(cells: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(cells.X, obs=cells.obs)


def variable_genes_only(cells: ad.AnnData) -> ad.AnnData:
    return by_id(cells)[:, ::3].copy()


def few_genes_beside_raw(cells: ad.AnnData) -> ad.AnnData:
    changed = by_id(cells)
    changed.raw = normalised(changed)
    return changed[:, ::3].copy()


def with_value(value: float) -> Callable[[ad.AnnData], ad.AnnData]:
    def change(cells: ad.AnnData) -> ad.AnnData:
        changed = by_id(cells)
        changed.X.data[5] = value
        return changed

    return change


def nothing_but_normalised(cells: ad.AnnData) -> ad.AnnData:
    changed = normalised(cells)
    changed.layers["scaled"] = changed.X - 0.5 * (changed.X > 0)
    return changed


REFUSED = {
    "normalised": (nothing_but_normalised, r"no raw counts.*X holds 0\.\d+ in row 0.*layers/scaled holds.*put the"),
    "nan": (with_value(np.nan), r"has no raw counts.*X holds nan in row 0, column \d+"),
    "negative": (with_value(-1.0), r"has no raw counts.*X holds -1 in row 0"),
    "fraction": (with_value(2.5), r"has no raw counts.*X holds 2\.5 in row 0"),
    "infinite": (with_value(np.inf), r"has no raw counts.*X holds inf in row 0"),
    "mouse": (of_a_mouse, r"0 of the model's 200 genes.*Ensembl ids of another organism \(ENSMUSG.*homo_sapiens"),
    "lower case": (lower_case, r"0 of the model's 200 genes.*only in capitals.*the model is of homo_sapiens"),
    "numbers": (named_by_number, r"0 of the model's 200 genes \(0\.0%\), 80% are needed.*names such as 'ENSG\d+' or"),
    "few": (variable_genes_only, r"of the model's 200 genes.*Missing are ENSG.*Were genes removed"),
    "raw": (few_genes_beside_raw, r"X has 200 genes, \.raw 600: were genes removed\? Use the original file"),
}  # fmt: skip


@pytest.mark.parametrize("defect", REFUSED)
def test_what_does_not_fit_is_refused(defect: str, cells: ad.AnnData, mapper: Mapper) -> None:
    change, message = REFUSED[defect]
    with pytest.raises(UserError, match=message):
        mapper(change(cells))


def test_a_bad_value_deep_in_a_file_is_found(
    cells: ad.AnnData, mapper: Mapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("census_scvi.counts.raw_counts._CELLS", 64)
    monkeypatch.setattr("census_scvi.query.mapping._BLOCK_CELLS", 100)
    query = by_id(cells)
    query.X.data[query.X.indptr[333]] = 0.5
    query.write_h5ad(tmp_path / "query.h5ad")
    with pytest.raises(UserError, match=r"query\.h5ad: X holds 0\.5 in row 333"):
        mapper(tmp_path / "query.h5ad")


def test_files_that_are_none(cells: ad.AnnData, mapper: Mapper, tmp_path: Path) -> None:
    by_id(cells).write_h5ad(tmp_path / "whole.h5ad")
    data = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "half.h5ad").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.h5ad").write_text("gene,cell\n")
    for name, message in {
        "half": "not a complete .h5ad",
        "text": "not a complete .h5ad",
        "none": "no such file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.h5ad: {message}"):
            mapper(tmp_path / f"{name}.h5ad")
    with pytest.raises(UserError, match="the query is a DataFrame; expected an AnnData or the path"):
        mapper(cells.obs)
    with pytest.raises(UserError, match="the query has no cells"):
        mapper(cells[:0])


def test_a_place_that_was_asked_for_is_the_only_one(cells: ad.AnnData, mapper: Mapper) -> None:
    query = counts_in_layer(cells)
    with pytest.raises(UserError, match="X holds 0"):
        mapper(query, counts="X")
    with pytest.raises(UserError, match=r"has no layers/count; did you mean layers/counts\?"):
        mapper(query, counts="layers/count")
    assert mapper(query).report.counts == "layers/counts"


def test_a_symbol_of_several_genes_is_left_out_and_said(cells: ad.AnnData, finished_run: Run, demo_census: str) -> None:
    model, description = load_safe(finished_run.path("scvi.model"))
    shared, other = description.symbols[7], "ENSG00000000000"
    ambiguous = Mapper(model, description, {other: shared})
    query = cells.copy()
    query.var = pd.DataFrame(index=query.var_names)
    report = ambiguous(query).report
    assert report.ambiguous == 1
    assert report.missing == [description.genes[7]]


@given(
    columns=st.lists(
        st.sampled_from(["ENSG00000000001", "ENSG00000000001.4", "A", "B", "b", "C", "x", ""]), max_size=12
    ),
    seed=st.integers(0, 9),
)
def test_counts_are_summed_by_name_and_nothing_else(columns: list[str], seed: int) -> None:
    genes = ["ENSG00000000003", "ENSG00000000001", "ENSG00000000002"]
    symbols = {"ENSG00000000001": "A", "ENSG00000000002": "B", "ENSG00000000003": "C"}
    counts = np.random.default_rng(seed).integers(0, 4, (5, len(columns)))
    query = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), var=pd.DataFrame(index=columns))
    expected = np.zeros((5, 3))
    meant = {"A": 1, "B": 2, "C": 0, "ENSG00000000001": 1, "ENSG00000000001.4": 1}
    for column, name in enumerate(columns):
        if name in meant:
            expected[:, meant[name]] += counts[:, column]
    aligned = AlignedCells(QueryCells(query), genes, symbols, ORGANISM, min_share=0.0)
    found = sp.vstack([block for _, block in aligned.blocks(2)])
    assert np.array_equal(found.toarray(), expected)
    assert found.dtype == np.float32
    report = aligned.report
    assert report.n_shared == len({meant[name] for name in columns if name in meant})
    assert report.by_id + report.by_symbol + report.extra == len(columns)
    assert report.n_empty == int((expected.sum(axis=1) == 0).sum())


def test_an_encoder_that_sees_the_batch_takes_the_mean_of_those_it_knows(demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, model={"encode_covariates": True}, train={"max_epochs": 1}).all()
    model, description = load_safe(run.path("scvi.model"))
    with open_census(CensusSection(uri=demo_census)) as census:
        adata = cellxgene_census.get_anndata(census.root, ORGANISM, obs_value_filter="soma_joinid < 50")
    adata.var_names = adata.var["feature_id"].astype(str)
    first, second = (Mapper(model, description)(adata).latent for _ in range(2))
    assert np.array_equal(first, second)
    assert np.isfinite(first).all()
