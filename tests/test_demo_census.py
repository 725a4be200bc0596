import cellxgene_census
import cellxgene_census.experimental.pp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from census_scvi.census import schema
from census_scvi.errors import UserError
from census_scvi.local_census.demo.cells import DemoSource, demo_sources


def small(seed: int) -> list[DemoSource]:
    return demo_sources(seed, scale=0.2, n_genes=400)


def counts_of(source: DemoSource, rows: int = 4096) -> sp.csr_matrix:
    return sp.vstack([block for _, block in source.blocks(rows)], format="csr")


@pytest.fixture(scope="module")
def sources() -> list[DemoSource]:
    return small(3)


def test_counts_do_not_depend_on_the_block_size(sources: list[DemoSource]) -> None:
    for source in sources:
        whole = counts_of(source)
        for rows in (1000, 333, 64):
            starts, blocks = zip(*source.blocks(rows), strict=True)
            assert list(starts) == list(range(0, len(source.obs), rows))
            assert (sp.vstack(blocks) != whole).nnz == 0


def test_the_same_seed_gives_the_same_cells_and_another_seed_others(sources: list[DemoSource]) -> None:
    again, other = small(3), small(4)
    for source, same, different in zip(sources, again, other, strict=True):
        pd.testing.assert_frame_equal(source.obs, same.obs)
        pd.testing.assert_frame_equal(source.var, same.var)
        assert (counts_of(source) != counts_of(same)).nnz == 0
        assert abs(counts_of(source).sum() - counts_of(different).sum()) > 0


def test_copies_are_identical_and_not_primary(sources: list[DemoSource]) -> None:
    by_id = {source.dataset_id: source for source in sources}
    atlas = by_id["demo-human-atlas"]
    first = int(atlas.obs["is_primary_data"].sum())
    assert not atlas.obs["is_primary_data"].iloc[first:].any()
    copied = counts_of(atlas)[first:]
    for name in ("demo-human-blood", "demo-human-lung"):
        origin = by_id[name]
        donors = set(origin.obs["donor_id"])
        mine = atlas.obs["donor_id"].iloc[first:].isin(donors).to_numpy()
        n_cells = int(mine.sum())
        columns = pd.Index(atlas.var["feature_id"]).get_indexer(origin.var["feature_id"])
        assert n_cells > 10
        assert (copied[mine][:, columns] != counts_of(origin)[:n_cells]).nnz == 0
        labels = list(schema.LABEL_COLUMNS)
        left = atlas.obs[labels].iloc[first:][mine].astype(str).reset_index(drop=True)
        pd.testing.assert_frame_equal(left, origin.obs[labels].iloc[:n_cells].astype(str))


def test_shape_of_the_data_is_realistic() -> None:
    human = [source for source in demo_sources(seed=0) if source.organism == "homo_sapiens"]
    obs = pd.concat([source.obs for source in human])
    counts = [counts_of(source) for source in human]
    depth = np.concatenate([np.asarray(part.sum(axis=1)).ravel() for part in counts])
    detected = np.concatenate([np.diff(part.indptr) for part in counts])
    assert len(obs) == 6000
    assert 2500 < np.median(depth) < 3500
    assert 0.83 < 1 - detected.mean() / 3000 < 0.9
    assert 0.01 < (detected < 300).mean() < 0.04
    assert 0.07 < 1 - obs["is_primary_data"].mean() < 0.09
    assert set(obs["suspension_type"]) == {"cell", "nucleus"}
    assert obs["assay"].nunique() == 3
    assert obs["cell_type"].nunique() == 8
    assert obs["donor_id"].value_counts().min() < 30
    assert all(part.data.min() >= 1 for part in counts)


def test_variance_of_a_gene_is_that_of_its_bursts() -> None:
    # One donor's cells of one type are gamma-Poisson: more variance than Poisson, as much as the burst size says.
    source = demo_sources(seed=0, scale=4, n_genes=400)[0]
    cells = (source.obs["donor_id"] == "human-blood-1") & (source.obs["cell_type"] == "B cell")
    counts = counts_of(source)[np.flatnonzero(cells)].toarray()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    burst = source._transcriptome.burst[source._measured]
    known = (mean > 1) & (mean < 8)
    assert known.sum() > 30
    # Depth differs between cells too, which adds its share: the ratio lies above the bursts' own.
    ratio = (variance / mean)[known] * (1 - burst[known])
    assert 0.95 < np.median(ratio) < 1.6


def test_too_small_a_demo_is_refused() -> None:
    with pytest.raises(UserError, match="too small"):
        demo_sources(scale=0.001)
    with pytest.raises(UserError, match="too small"):
        demo_sources(n_genes=10)


def test_the_api_reads_what_the_generator_made(demo_census: str) -> None:
    sources = demo_sources(seed=0, scale=0.25, n_genes=600)
    with cellxgene_census.open_soma(uri=demo_census) as census:
        datasets = census["census_info"]["datasets"].read().concat().to_pandas()
        assert list(datasets["dataset_id"]) == [source.dataset_id for source in sources]
        for source in sources:
            adata = cellxgene_census.get_anndata(
                census, source.organism, obs_value_filter=f"dataset_id == '{source.dataset_id}'"
            )
            adata = adata[:, adata.var.set_index("feature_id").index.get_indexer(source.var["feature_id"])]
            assert (counts_of(source) != adata.X).nnz == 0
            for column in (*schema.LABEL_COLUMNS, "is_primary_data"):
                assert list(adata.obs[column]) == list(source.obs[column]), column


def test_genes_of_the_demo_are_enough_for_the_api(demo_census: str) -> None:
    with cellxgene_census.open_soma(uri=demo_census) as census:
        for organism in ("homo_sapiens", "mus_musculus"):
            genes = cellxgene_census.experimental.pp.get_highly_variable_genes(
                census,
                organism,
                n_top_genes=200,
                batch_key="dataset_id",
                obs_value_filter="is_primary_data == True and nnz >= 300",
            )
            assert genes["highly_variable"].sum() == 200


def proteins_of(source: DemoSource, rows: int = 4096) -> np.ndarray:
    return np.asarray(sp.vstack([block for _, block in source.protein_blocks(rows)]).toarray())


def test_proteins_mark_cell_types_and_leave_the_rna_as_it_is(sources: list[DemoSource]) -> None:
    with_proteins = {source.dataset_id: source for source in demo_sources(3, 0.2, 400, proteins=True)}
    assert not any(source.proteins for source in sources)
    for plain in sources:
        source = with_proteins[plain.dataset_id]
        pd.testing.assert_frame_equal(source.obs, plain.obs)
        assert (counts_of(source) != counts_of(plain)).nnz == 0
    numbers = {name: len(source.proteins) for name, source in with_proteins.items()}
    assert {name: n for name, n in numbers.items() if n} == {
        "demo-human-blood": 12,
        "demo-human-lung": 9,
        "demo-mouse-lung": 12,
    }
    for name, protein, markers in [
        ("demo-human-blood", "CD4", ["CD4-positive, alpha-beta T cell"]),
        ("demo-human-blood", "CD19", ["B cell"]),
        ("demo-human-lung", "CD14", ["classical monocyte", "macrophage"]),
        ("demo-mouse-lung", "CD31", ["endothelial cell"]),
    ]:
        source = with_proteins[name]
        counts = proteins_of(source)[:, source.proteins.index(protein)]
        on = source.obs["cell_type"].isin(markers).to_numpy()
        assert 6 < np.median(counts[on]) / np.median(counts[~on]) < 24
        starts, blocks = zip(*source.protein_blocks(100), strict=True)
        assert list(starts) == list(range(0, len(source.obs), 100))
        assert np.array_equal(sp.vstack(blocks).toarray(), proteins_of(source))
