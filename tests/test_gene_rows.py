"""Which rows of a file are genes, by which names they are known, and what is said where they do not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.atlas import Atlas
from census_scvi.census.gene_ids import GeneMap
from census_scvi.census.gene_rows import clean_names, find_gene_rows
from census_scvi.errors import UserError
from census_scvi.local_census.sources import open_h5ad
from census_scvi.model.safe import load_safe
from census_scvi.query.alignment import AlignedCells, TooFewGenes
from census_scvi.query.cells import QueryCells
from census_scvi.query.mapping import Mapper

HUMAN, MOUSE = "homo_sapiens", "mus_musculus"
IDS = [f"ENSG{number:011d}" for number in range(1, 41)]
SYMBOLS = ["CD4", "CD8A", "TP53", "ERCC1", "ERCC6L", "CD19", *(f"GENE{number}" for number in range(7, 41))]
KNOWN = dict(zip(IDS, SYMBOLS, strict=True))


def counts(n_genes: int, n_cells: int = 30) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(n_genes).poisson(2.0, (n_cells, n_genes)), dtype=np.float32)


def rows(*extra: str, **columns: object) -> pd.DataFrame:
    """The genes by symbol, and further rows below them; a column gives the value of genes, and those of the others."""
    table = {"gene_ids": [*IDS, *extra]}
    for name, (of_genes, of_others) in columns.items():  # type: ignore[misc]
        table[name] = [of_genes] * len(IDS) + (of_others if isinstance(of_others, list) else [of_others] * len(extra))
    return pd.DataFrame(table, index=[*SYMBOLS, *extra])


ANTIBODIES = ("CD4", "CD8A", "CD19")
MIXED: dict[str, tuple[pd.DataFrame, dict[str, int]]] = {
    "10x": (rows(*ANTIBODIES, feature_types=("Gene Expression", "Antibody Capture")), {"Antibody Capture": 3}),
    "one table": (rows(*ANTIBODIES, feature_type=("GEX", "ADT")), {"ADT": 3}),
    "DropletUtils": (rows(*ANTIBODIES, Type=("Gene Expression", "Custom")), {"Custom": 3}),
    "many kinds": (
        rows("CD4", "CD8A", "chr1:1-500", "TP53", feature_types=(
            "Gene Expression", ["CRISPR Guide Capture", "Multiplexing Capture", "Peaks", "Anything Else"])),
        {"Anything Else": 1, "CRISPR Guide Capture": 1, "Multiplexing Capture": 1, "Peaks": 1},
    ),
    "CELLxGENE": (rows("ERCC-00002", "CD4", feature_biotype=("gene", "spike-in")), {"spike-in": 2}),
    "no column": (
        rows("ERCC-00002", "ERCC_00171", "chr1:1000-2000", "chrX-5-10", "__no_feature", "SIRV101"),
        {"spike-in": 3, "peak": 2, "line of a counting program": 1},
    ),
    "biotypes": (rows(feature_type=("protein_coding", [])), {}),
    "intervals of genes": (rows(interval=("chr1:1-500", [])), {}),
    "nothing known of some": (rows(feature_types=("Gene Expression", [])).assign(
        feature_types=["Gene Expression"] * 30 + [None] * 10), {}),
    "genome": (rows("Cd4", "Trp53", genome=("GRCh38", "mm10")), {"genome mm10": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_only_genes_are_counted(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    var, left_out = MIXED[case]
    values = counts(len(var))
    query = ad.AnnData(values, var=var)
    aligned = AlignedCells(QueryCells(query), IDS, KNOWN, HUMAN, min_share=1.0)
    (found,) = (block for _, block in aligned.blocks(100))
    assert np.array_equal(found.toarray(), values[:, :40].toarray())
    report = aligned.report
    assert report.not_genes == left_out
    assert report.by_id + report.by_symbol + report.ambiguous + report.extra == len(var) - sum(left_out.values())
    assert ("rows that are not genes" in str(report)) == bool(left_out)

    query.write_h5ad(tmp_path / "a.h5ad")
    with caplog.at_level(logging.WARNING):
        (source,) = open_h5ad(tmp_path / "a.h5ad", organism=HUMAN)
    (built,) = (block for _, block in source.blocks(100))
    assert source.var["feature_id"].tolist() == IDS
    assert np.array_equal(built.toarray(), values[:, :40].toarray())
    assert source.genes.not_genes == sum(left_out.values())
    assert source.genes.in_file == len(var) - source.genes.not_genes
    if case == "genome":  # counts of another organism are lost, reads of antibodies and spike-ins are not
        np.testing.assert_allclose(source.kept_counts, values[:, :40].sum(axis=1).A1 / values.sum(axis=1).A1)
    else:
        assert (source.kept_counts == 1).all()
    assert all(f"{number} {kind}" in caplog.text for kind, number in left_out.items())
    assert set(source.var["feature_type"]) == {"protein_coding" if case == "biotypes" else "unknown"}
    assert source.var["feature_name"].tolist() == SYMBOLS


def test_a_symbol_among_ids_is_not_added_to_its_gene(tmp_path: Path) -> None:
    """An antibody of a file that does not say which rows are antibodies."""
    values = counts(42)
    var = pd.DataFrame({"gene_ids": [*IDS, "CD4", "Unknown"]}, index=[*SYMBOLS, "CD4-1", "Unknown"])
    aligned = AlignedCells(QueryCells(ad.AnnData(values, var=var)), IDS, KNOWN, HUMAN, min_share=1.0)
    assert np.array_equal(next(aligned.blocks(100))[1].toarray(), values[:, :40].toarray())
    ids = ad.AnnData(values, var=var.set_index("gene_ids"))
    aligned = AlignedCells(QueryCells(ids), IDS, KNOWN, HUMAN, min_share=1.0)
    assert np.array_equal(next(aligned.blocks(100))[1].toarray(), values[:, :40].toarray())
    assert aligned.report.not_genes == {"symbol of a gene that another row has by id": 1}
    assert (aligned.report.by_id, aligned.report.by_symbol, aligned.report.extra) == (40, 0, 1)
    ids.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "map.tsv").write_text(f"ensembl_id\tsymbol\n{IDS[0]}\tCD4\n")
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=HUMAN, gene_map=GeneMap(tmp_path / "map.tsv"))
    assert np.array_equal(next(source.blocks(100))[1].toarray(), values[:, :40].toarray())
    assert (source.genes.kept, source.genes.dropped, source.genes.not_genes) == (40, 1, 1)


def test_symbols_kept_without_an_id_are_no_proteins(tmp_path: Path) -> None:
    var, _ = MIXED["10x"]
    ad.AnnData(counts(len(var)), var=var).write_h5ad(tmp_path / "a.h5ad")
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=HUMAN, gene_id="index", keep_without_id=True)
    assert source.var["feature_id"].tolist() == SYMBOLS


def barnyard(prefixes: tuple[str, str], ids: bool) -> pd.DataFrame:
    human, mouse = prefixes
    own = IDS if ids else SYMBOLS
    theirs = [name.replace("ENSG", "ENSMUSG") if ids else name for name in own]
    return pd.DataFrame(index=[*(human + name for name in own), *(mouse + name for name in theirs)])


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "symbols"])
@pytest.mark.parametrize(
    "prefixes", [("GRCh38_", "mm10___"), ("hg19_", "mm10_"), ("GRCh38______", "GRCm39______"), ("hg38_", "rn6__")]
)
def test_of_several_genomes_the_organism_s_is_taken(prefixes: tuple[str, str], ids: bool, tmp_path: Path) -> None:
    query = ad.AnnData(counts(80), var=barnyard(prefixes, ids))
    aligned = AlignedCells(QueryCells(query), IDS, KNOWN, HUMAN, min_share=1.0)
    assert np.array_equal(next(aligned.blocks(100))[1].toarray(), query.X[:, :40].toarray())
    assert aligned.report.not_genes == {f"genome {prefixes[1].rstrip('_')}": 40}
    if prefixes[1].startswith("mm"):
        mouse = AlignedCells(
            QueryCells(query), [name.replace("ENSG", "ENSMUSG") for name in IDS],
            {name.replace("ENSG", "ENSMUSG"): symbol for name, symbol in KNOWN.items()}, MOUSE, min_share=1.0,
        )  # fmt: skip
        assert np.array_equal(next(mouse.blocks(100))[1].toarray(), query.X[:, 40:].toarray())
    if ids:
        query.write_h5ad(tmp_path / "a.h5ad")
        (source,) = open_h5ad(tmp_path / "a.h5ad", organism=HUMAN)
        assert source.var["feature_id"].tolist() == IDS
        assert source.genes.not_genes == 40


FORMS = {
    "one genome": "GRCh38_{id}", "padded": "hg19____{id}", "symbol after": "{id}_{symbol}", "before": "{symbol}_{id}",
    "version and symbol": "{id}.12_{symbol}", "bar": "{symbol}|{id}.3", "spaces": "  {id} ",
    "brackets": "{symbol} ({id})", "genome and symbol": "GRCh38_{symbol}",
    "spaces around a symbol": " {symbol}\t", "both": "GRCh38_{id}_{symbol}",
    "small letters": "{small}", "small letters and version": "{small}.7",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_tools_add_to_a_name_is_taken_off(form: str, tmp_path: Path) -> None:
    names = [FORMS[form].format(id=name, small=name.lower(), symbol=symbol) for name, symbol in KNOWN.items()]
    query = ad.AnnData(counts(40), var=pd.DataFrame(index=names))
    aligned = AlignedCells(QueryCells(query), IDS, KNOWN, HUMAN, min_share=1.0)
    assert np.array_equal(next(aligned.blocks(100))[1].toarray(), query.X.toarray())
    query.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "map.tsv").write_text(
        "ensembl_id\tsymbol\n" + "".join(f"{name}\t{symbol}\n" for name, symbol in KNOWN.items())
    )
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=HUMAN, gene_map=GeneMap(tmp_path / "map.tsv"))
    assert source.var["feature_id"].tolist() == IDS


@given(st.lists(st.text("ABerc.-_|12 é", max_size=6) | st.sampled_from([*IDS[:2], "mm10_", "GRCh38_X"]), max_size=8))
def test_other_names_stay_as_they_are(names: list[str]) -> None:
    cleaned = clean_names(pd.Series(names, dtype=object))
    assert cleaned.tolist() == ["X" if name == "GRCh38_X" else name.strip() for name in names]
    assert find_gene_rows(pd.DataFrame(index=pd.Index(names, dtype=object)), HUMAN).is_gene.shape == (len(names),)


def test_a_build_takes_the_column_that_names_most_genes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As scanpy reads 10x files: symbols in the index, of which the map knows some, and ids in `gene_ids`."""
    path = tmp_path / "a.h5ad"
    ad.AnnData(counts(40), var=pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS)).write_h5ad(path)
    (tmp_path / "map.tsv").write_text(
        "ensembl_id\tsymbol\n" + "".join(f"{name}\t{symbol}\n" for name, symbol in [*KNOWN.items()][:25])
    )
    symbols = GeneMap(tmp_path / "map.tsv")
    with caplog.at_level(logging.INFO):
        (source,) = open_h5ad(path, organism=HUMAN, gene_map=symbols)
    assert source.var["feature_id"].tolist() == IDS
    assert "using the genes in var['gene_ids'], which has 40 of 40 genes, var_names 25" in caplog.text
    caplog.clear()
    (source,) = open_h5ad(path, organism=HUMAN, gene_map=symbols, gene_id="index")  # as asked, and said
    assert source.genes.kept == 25
    assert "var['gene_ids'] has 40 genes, var_names 25: use it with gene_id: gene_ids" in caplog.text
    with pytest.raises(UserError, match=r"a\.h5ad: no gene has an Ensembl id.*use it with gene_id: gene_ids"):
        open_h5ad(path, organism=HUMAN, gene_id="index")


def test_a_file_with_genes_as_rows_is_told_from_others(tmp_path: Path) -> None:
    query = ad.AnnData(counts(40).T.tocsr(), obs=pd.DataFrame(index=IDS))
    with pytest.raises(TooFewGenes, match=r"40 of the model's genes are in obs_names: rows and columns are exchanged"):
        AlignedCells(QueryCells(query), IDS, KNOWN, HUMAN, min_share=0.8)
    query.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=r"obs_names has 40 genes: rows and columns are exchanged.*adata\.T"):
        open_h5ad(tmp_path / "a.h5ad", organism=HUMAN)


def test_a_file_without_any_gene_says_what_it_holds(tmp_path: Path) -> None:
    var = pd.DataFrame({"feature_types": "Antibody Capture"}, index=SYMBOLS)
    ad.AnnData(counts(40), var=var).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        UserError, match=r"40 rows that are not genes .* excluded: 40 Antibody Capture; nothing is left"
    ):
        open_h5ad(tmp_path / "a.h5ad", organism=HUMAN)
    with pytest.raises(TooFewGenes, match=r"has 0 of the model's 40 genes.*40 Antibody Capture"):
        AlignedCells(QueryCells(tmp_path / "a.h5ad"), IDS, KNOWN, HUMAN, min_share=0.8)


MANY = {f"ENSG{number:011d}": f"GENE{number}A" for number in range(1, 301)}
HINTS: dict[str, tuple[list[str], str, bool]] = {
    "mouse, few genes of the model": (
        [*(f"Gene{number}a" for number in range(1, 60)), *(f"Other{number}x" for number in range(3000))],
        "another organism: they are written as mouse and rat gene symbols are", True,
    ),
    "mouse, none of the model": ([f"Other{number}x" for number in range(3000)], "another organism", True),
    "lower case": ([f"gene{number}a" for number in range(1, 301)],
                   "300 names in var_names differ .* only in capitals", True),
    "one gene in lower case": (["gene1a"], "only in capitals", False),
    "one gene of a mouse": (["Gene1a"], "another organism", False),
    "half of the genes": ([f"GENE{number}A" for number in range(1, 150)], "only in capitals", False),
    "transcripts": ([f"ENST{number:011d}" for number in range(50)], "holds transcripts", True),
    "mouse genome": ([f"mm10___Gene{number}a" for number in range(50)], "50 genome mm10", True),
}  # fmt: skip


@pytest.mark.parametrize("case", HINTS)
def test_the_likely_matter_is_named(case: str) -> None:
    names, hint, there = HINTS[case]
    query = ad.AnnData(counts(len(names)), var=pd.DataFrame(index=names))
    with pytest.raises(TooFewGenes) as error:
        AlignedCells(QueryCells(query), [*MANY], MANY, HUMAN, min_share=0.8)
    assert bool(pd.Series([str(error.value)]).str.contains(hint)[0]) == there
    assert "80% are needed (min_share=)" in str(error.value)
    assert "(query.min_share)" in str(error.value.named("query.min_share"))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def trained_cells(finished_run: Run) -> ad.AnnData:
    """Cells that the model was trained on, their genes by rising expression."""
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))[:300]
    return cells[:, np.argsort(np.asarray(cells.X.sum(axis=0)).ravel())].copy()


def test_genes_that_hardly_have_counts_may_be_missing(finished_run: Run, trained_cells: ad.AnnData) -> None:
    sums = np.asarray(trained_cells.X.sum(axis=0)).ravel()
    with Atlas.open(finished_run.directory) as atlas:
        whole = atlas.embed(trained_cells).uns["scvi_alignment"]
        assert (whole["share"], whole["expected_share"]) == (1.0, 1.0)
        found = atlas.embed(trained_cells[:, 50:].copy()).uns["scvi_alignment"]  # without the quarter of lowest counts
        assert found["share"] == 0.75
        assert found["expected_share"] == pytest.approx(sums[50:].sum() / sums.sum(), abs=0.02)
        most = trained_cells[:, :150].copy()  # as many genes, without those of highest counts
        with pytest.raises(
            TooFewGenes,
            match=r"\(75\.0%\), 80% are needed \(min_share=\), or 90% of the counts expected in these cells",
        ):
            atlas.embed(most)
        found = atlas.embed(most, min_share=0.5).uns["scvi_alignment"]
        assert found["expected_share"] == pytest.approx(sums[:150].sum() / sums.sum(), abs=0.05)


def test_missing_genes_with_many_counts_are_warned_of(
    finished_run: Run, trained_cells: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    with Atlas.open(finished_run.directory) as atlas, caplog.at_level(logging.WARNING, "census_scvi"):
        logging.getLogger("census_scvi").propagate = True
        report = atlas.embed(trained_cells[:, :170].copy()).uns["scvi_alignment"]
    assert report["share"] == 0.85
    assert report["expected_share"] < 0.8
    assert (
        f"hold {100 * (1 - report['expected_share']):.0f}% of the expected counts of the query's cells" in caplog.text
    )


@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_the_decoder_is_asked_without_a_reference(finished_run: Run, trained_cells: ad.AnnData, kept: float) -> None:
    """A model alone, trained for three epochs: it expects each gene about as often as another."""
    genes = np.random.default_rng(0).random(200) < kept
    report = Mapper(*load_safe(finished_run.path("scvi.model")))(trained_cells[:, genes].copy(), min_share=0.1).report
    assert report.expected_share == pytest.approx(genes.mean(), abs=0.05)
    assert f"with {1 - report.expected_share:.1%} of the counts expected in these cells" in str(report)
