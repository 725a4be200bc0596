"""The five organisms of the Census: gene names of each, configs, demo data, and all stages for a primate."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pipeline import ROOT, Run

from census_scvi.census.gene_ids import resolve_genes
from census_scvi.census.gene_rows import find_gene_rows
from census_scvi.census.schema import ORGANISMS, PRIMATES
from census_scvi.cli import console
from census_scvi.errors import UserError
from census_scvi.local_census.demo.cells import demo_sources
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells
from census_scvi.settings import load_config

PAIRS = list(itertools.permutations(ORGANISMS, 2))


def ids_of(organism: str, n_genes: int = 60) -> list[str]:
    return [f"{ORGANISMS[organism].gene_id_prefix}{number:011d}" for number in range(n_genes)]


def cells_with(names: list[str]) -> ad.AnnData:
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (20, len(names))), dtype=np.float32)
    return ad.AnnData(counts, var=pd.DataFrame(index=names))


def aligned(names: list[str], organism: str) -> AlignedCells:
    genes = ids_of(organism)
    symbols = {gene: f"GENE{number}" for number, gene in enumerate(genes)}
    return AlignedCells(QueryCells(cells_with(names)), genes, symbols, organism, min_share=0.8)


@pytest.mark.parametrize(("declared", "given"), PAIRS)
def test_ensembl_ids_of_another_organism_are_refused_by_its_name(declared: str, given: str) -> None:
    names = pd.Series(ids_of(given))
    said = f"60 of 60 gene ids are of {given}, but organism is {declared}; if the cells are of {given}, set organism"
    with pytest.raises(UserError, match=said):
        resolve_genes(names, pd.DataFrame(index=names.index), organism=declared, gene_map=None, keep_without_id=False)
    prefix = ORGANISMS[given].gene_id_prefix
    said = rf"Ensembl ids of another organism \({prefix}\.\.\., {given}\), the model is of {declared}"
    with pytest.raises(UserError, match=said):
        aligned(ids_of(given), declared)


@pytest.mark.parametrize("organism", PRIMATES)
def test_symbols_of_primates_are_taken_as_the_config_says(organism: str) -> None:
    names = pd.Series([f"GENE{number}" for number in range(60)])
    found = resolve_genes(
        names, pd.DataFrame(index=names.index), organism=organism, gene_map=None, keep_without_id=True
    )
    assert found.report.under_symbol == 60
    report = aligned(list(names), organism).report
    assert report.by_symbol == 60
    said = f"the cells are taken for those of {organism}: most symbols are the same in all primates"
    assert (said in str(report)) == (organism != "homo_sapiens")
    assert said not in str(aligned(ids_of(organism), organism).report)


def test_symbols_of_primates_do_not_say_which_primate() -> None:
    names = pd.Series([f"GENE{number}" for number in range(60)])
    said = "60 look like symbols of primate genes such as 'GENE0'; symbols do not tell one primate from another: set"
    with pytest.raises(UserError, match=f"{said} organism to homo_sapiens, macaca_mulatta, .* or pan_troglodytes"):
        resolve_genes(
            names, pd.DataFrame(index=names.index), organism="mus_musculus", gene_map=None, keep_without_id=False
        )


@pytest.mark.parametrize(
    ("genome", "organism"),
    [
        ("GRCh38", "homo_sapiens"), ("mm10", "mus_musculus"), ("rheMac10", "macaca_mulatta"),
        ("Mmul_10", "macaca_mulatta"), ("calJac4", "callithrix_jacchus"), ("mCalJac1", "callithrix_jacchus"),
        ("panTro6", "pan_troglodytes"), ("Pan_tro_3.0", "pan_troglodytes"),
    ],
)  # fmt: skip
def test_rows_of_the_genome_of_another_organism_are_no_genes(genome: str, organism: str) -> None:
    var = pd.DataFrame({"genome": [genome] * 3}, index=["TP53", "CD4", "ACTB"])
    for declared in ORGANISMS:
        assert find_gene_rows(var, declared).is_gene.all() == (declared == organism)


@pytest.mark.parametrize("organism", ORGANISMS)
def test_each_organism_has_a_config_and_a_demo(organism: str) -> None:
    config = load_config(ROOT / "configs" / f"{organism}.yaml")
    assert (config.census.organism, config.directory.name) == (organism, f"run-{organism}")
    sources = demo_sources(0, 0.1, 200, organisms=[organism])
    assert {source.organism for source in sources} == {organism}
    assert all(source.var["feature_id"].str.startswith(ORGANISMS[organism].gene_id_prefix).all() for source in sources)


def test_the_cells_of_an_organism_do_not_depend_on_the_others() -> None:
    alone = {source.dataset_id: source for source in demo_sources(0, 0.1, 200, organisms=["macaca_mulatta"])}
    every = {source.dataset_id: source for source in demo_sources(0, 0.1, 200, organisms=list(ORGANISMS))}
    assert len(every) == len(demo_sources(0, 0.1, 200)) + 3 * len(alone)
    for name, source in alone.items():
        for (start, block), (same_start, same) in zip(source.blocks(64), every[name].blocks(64), strict=True):
            assert start == same_start
            assert (block != same).nnz == 0


def test_a_demo_of_no_organism_of_the_census(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "census")
    assert console(["build-census", "--demo", place, "--organisms", "macaca_mulata"]) == 2
    said = "error: 'macaca_mulata' is not an organism of the Census; did you mean macaca_mulatta?"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (tmp_path / "census").exists()


@pytest.mark.slow
def test_all_stages_for_a_primate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "census")
    size = ["--scale", "0.3", "--genes", "600"]
    assert console(["build-census", "--demo", uri, "--organisms", "macaca_mulatta", *size]) == 0
    run = Run(tmp_path, uri, census={"organism": "macaca_mulatta"}, gates={"sample_size": 100})
    for stage in ("prepare", "train", "create-latent-update", "evaluate", "publish"):
        assert run(stage) == 0, capsys.readouterr().err
    with cellxgene_census.open_soma(uri=uri) as census:
        cells = cellxgene_census.get_anndata(census, "Macaca mulatta", obsm_layers=["scvi"], obs_coords=slice(0, 99))
    assert np.isfinite(cells.obsm["scvi"]).all()
    cells.var_names = cells.var["feature_name"].astype(str)
    cells.write_h5ad(tmp_path / "query.h5ad")
    capsys.readouterr()
    quick = ["query.labels=[cell_type]", "query.umap_cells=0", "query.baseline_cells=0"]
    assert run("map-query", f"query.file={tmp_path / 'query.h5ad'}", *quick) == 0
    assert "the cells are taken for those of macaca_mulatta" in capsys.readouterr().err
