import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import cellxgene_census.experimental.pp
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiledbsoma as soma
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census import schema
from census_scvi.census.gene_ids import GeneMap, resolve_genes
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.cli import main
from census_scvi.counts import h5ad
from census_scvi.errors import UserError
from census_scvi.files import partial_folder
from census_scvi.local_census import experiment
from census_scvi.local_census import write as census
from census_scvi.local_census.experiment import observation_joinids
from census_scvi.local_census.h5ad_labels import census_labels
from census_scvi.local_census.settings import load_build_config
from census_scvi.local_census.sources import open_h5ad, regroup
from census_scvi.local_census.write import build_census
from census_scvi.stages.build_census import build_from_config

GENES = [f"ENSG{number:011d}" for number in range(1, 41)]


def make_counts(n_cells: int, n_genes: int, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(0.7, (n_cells, n_genes)).astype(np.float32))


def write_h5ad(
    path: Path, counts: Any = None, *, genes: list[str] | None = None, obs: dict[str, Any] | None = None, **more: Any
) -> ad.AnnData:
    counts = make_counts(50, len(genes or GENES)) if counts is None else counts
    n_cells = counts.shape[0]
    table = pd.DataFrame(
        obs or {"annotation": pd.Categorical(["T", "B"] * (n_cells // 2)), "patient": ["p1"] * n_cells},
        index=[f"{path.stem}-{cell}" for cell in range(n_cells)],
    )
    adata = ad.AnnData(counts, obs=table, var=pd.DataFrame(index=genes or GENES), **more)
    adata.write_h5ad(path)
    return adata


def write_config(folder: Path, *datasets: dict[str, Any], **keys: Any) -> Path:
    path = folder / "build.yaml"
    defaults = {"organism": "homo_sapiens"}
    path.write_text(yaml.safe_dump({"uri": "census", "datasets": [{**defaults, **d} for d in datasets], **keys}))
    return path


def build_yaml(path: Path, **options: Any) -> Any:
    return build_from_config(load_build_config(path), **options)


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, dict[str, ad.AnnData]]:
    """A config of a human file split into two datasets, a human file with other genes, and a mouse file."""
    obs = {
        "annotation": ["T", "B", None, "T"] * 15,
        "patient": np.repeat(["p1", "p2"], 30),
        "study": ["s1", "s2", "s2"] * 20,
        "assay": ["10x 3' v3"] * 60,
        "is_primary_data": [True, True, False] * 20,
    }
    other = GENES[10:] + [f"ENSG{number:011d}" for number in range(50, 60)]
    mouse = [f"ENSMUSG{number:011d}" for number in range(1, 21)]
    files = {
        "a": write_h5ad(tmp_path / "a.h5ad", make_counts(60, 40, 1), obs=obs),
        "b": write_h5ad(tmp_path / "b.h5ad", make_counts(30, 40, 2), genes=other),
        "m": write_h5ad(tmp_path / "m.h5ad", make_counts(20, 20, 3), genes=mouse),
    }
    config = write_config(
        tmp_path,
        {
            "file": "a.h5ad",
            "dataset_id": {"column": "study"},
            "obs": {"cell_type": "annotation", "donor_id": "patient"},
            "values": {"suspension_type": "cell", "tissue": "blood"},
        },
        {"file": "b.h5ad", "values": {"assay": "Smart-seq2", "donor_id": 7}},
        {"file": "m.h5ad", "dataset_id": "mouse", "organism": "Mus musculus"},
    )
    return config, files


def test_the_api_reads_the_counts_of_the_files(two_files: tuple[Path, dict[str, ad.AnnData]]) -> None:
    config, files = two_files
    report = build_yaml(config)
    assert report.n_cells == {"homo_sapiens": 90, "mus_musculus": 20}
    assert report.n_genes == {"homo_sapiens": 50, "mus_musculus": 20}
    study = files["a"].obs["study"].astype(str)
    expected = {"s1": files["a"][study == "s1"], "s2": files["a"][study == "s2"], "b": files["b"], "mouse": files["m"]}
    with cellxgene_census.open_soma(uri=report.uri) as census:
        for name, file in expected.items():
            organism = "Mus musculus" if name == "mouse" else "Homo sapiens"
            adata = cellxgene_census.get_anndata(census, organism, obs_value_filter=f"dataset_id == '{name}'")
            adata.var_names = adata.var["feature_id"]
            absent = ~adata.var_names.isin(file.var_names)
            assert adata.X[:, absent].nnz == 0
            assert (adata[:, file.var_names].X != file.X).nnz == 0


def test_labels_defaults_and_statistics(two_files: tuple[Path, dict[str, ad.AnnData]]) -> None:
    report = build_yaml(two_files[0])
    with cellxgene_census.open_soma(uri=report.uri) as census:
        obs = cellxgene_census.get_obs(census, "Homo sapiens")
        mouse = cellxgene_census.get_obs(census, "mus_musculus")
        layers = census["census_data"]["homo_sapiens"].ms["RNA"].X
        raw = layers["raw"].read().coos().concat().to_scipy().tocsr()
        normalized = layers["normalized"].read().coos().concat().to_scipy().tocsr()
        var = cellxgene_census.get_var(census, "homo_sapiens")
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens").toarray()
    assert list(obs["soma_joinid"]) == list(range(90))
    assert (obs["dataset_id"].astype(str).ne(obs["dataset_id"].astype(str).shift())).sum() == 3
    assert obs["cell_type"].value_counts()[["T", "B", "unknown"]].to_dict() == {"T": 30, "B": 15, "unknown": 45}
    assert set(obs["donor_id"]) == {"p1", "p2", "7"}
    assert set(obs["assay"]) == {"10x 3' v3", "Smart-seq2"}
    assert set(obs["tissue_general"]) == {"blood", "unknown"}
    assert set(obs["suspension_type"]) == {"cell", "na"}
    assert set(obs["tissue_type"]) == {"tissue"}
    assert set(mouse["self_reported_ethnicity"]) == {"na"}
    assert int((~obs["is_primary_data"]).sum()) == 20
    assert obs["observation_joinid"].is_unique
    assert np.array_equal(obs["raw_sum"], np.asarray(raw.sum(axis=1)).ravel())
    assert np.array_equal(obs["nnz"], np.diff(raw.indptr))
    for cell in range(0, 90, 7):
        values = raw[cell].data
        assert obs["raw_mean_nnz"][cell] == pytest.approx(values.mean())
        assert obs["raw_variance_nnz"][cell] == pytest.approx(values.var(ddof=1))
    assert np.array_equal(var["nnz"], np.bincount(raw.indices, minlength=50))
    n_cells = obs["dataset_id"].value_counts()[["s1", "s2", "b"]].to_numpy()
    assert presence.shape[1] == 50
    assert np.array_equal(var["n_measured_obs"], n_cells @ presence[:3].astype(int))
    assert set(obs.loc[obs["dataset_id"] == "b", "n_measured_vars"]) == {int(presence[2].sum())}
    assert np.allclose(np.asarray(normalized.sum(axis=1)).ravel(), 1, atol=1e-5)
    assert np.allclose(normalized[0].data, raw[0].data / raw[0].data.sum())


def test_full_gene_assays_are_normalized_by_length(tmp_path: Path) -> None:
    length = pd.Series(range(100, 4100, 100), index=GENES)
    genes = tmp_path / "genes.tsv"
    genes.write_text("ensembl_id\tsymbol\tlength\n" + "".join(f"{g}\tS{g[-2:]}\t{n}\n" for g, n in length.items()))
    adata = write_h5ad(tmp_path / "a.h5ad")
    dataset = {"file": "a.h5ad", "values": {"assay": "Smart-seq2"}}
    report = build_yaml(write_config(tmp_path, dataset, genes={"map": {"homo_sapiens": "genes.tsv"}}))
    with cellxgene_census.open_soma(uri=report.uri) as census:
        layer = census["census_data"]["homo_sapiens"].ms["RNA"].X["normalized"]
        found = layer.read().coos().concat().to_scipy().toarray()
        var = cellxgene_census.get_var(census, "homo_sapiens")
    per_base = adata.X.toarray() / length.to_numpy()
    assert np.allclose(found, per_base / per_base.sum(axis=1, keepdims=True), rtol=1e-5)
    assert list(var["feature_name"]) == [f"S{gene[-2:]}" for gene in GENES]
    assert list(var["feature_length"]) == list(length)


def test_lengths_that_are_none_are_not_known(tmp_path: Path) -> None:
    genes = [f"{gene}.1" for gene in GENES]
    lengths = [np.inf, -np.inf, np.nan, -5.0, 0.0, 1e300, 2e9, *[900.5] * (len(GENES) - 7)]
    adata = write_h5ad(tmp_path / "a.h5ad", genes=genes)
    adata.var["feature_length"] = lengths
    adata.write_h5ad(tmp_path / "a.h5ad")
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens")
    assert source.var["feature_length"].tolist() == [0] * 7 + [900] * (len(GENES) - 7)


def test_a_file_without_a_matrix_is_refused(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X"]
    with pytest.raises(UserError, match=r"a\.h5ad: has no X, raw or layers; nothing to build from"):
        open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens")


@pytest.mark.parametrize("kind", ["h5ad", "demo"])
def test_schema(kind: str, request: pytest.FixtureRequest, two_files: tuple[Path, dict[str, ad.AnnData]]) -> None:
    uri = request.getfixturevalue("demo_census") if kind == "demo" else build_yaml(two_files[0]).uri
    with cellxgene_census.open_soma(uri=uri) as census:
        assert set(census.metadata) >= {"created_on", "git_commit_sha", "soma_encoding_version", "soma_object_type"}
        info = census["census_info"]
        assert set(info) == {"summary", "datasets", "organisms", "summary_cell_counts"}
        summary = info["summary"].read().concat().to_pandas().set_index("label")["value"]
        assert summary["census_schema_version"] == "2.4.0"
        organisms = info["organisms"].read().concat().to_pandas()
        assert list(organisms["organism"]) == ["homo_sapiens", "mus_musculus"]
        datasets = info["datasets"].read().concat().to_pandas()
        cells = 0
        for organism in ("homo_sapiens", "mus_musculus"):
            experiment = census["census_data"][organism]
            assert experiment.metadata["soma_object_type"] == "SOMAExperiment"
            assert set(experiment.ms["RNA"]) == {"X", "var", "feature_dataset_presence_matrix"}
            assert _types(experiment.obs.schema) == _types(schema.OBS_SCHEMA)
            assert len(experiment.obs.schema) == 28
            assert _types(experiment.ms["RNA"].var.schema) == _types(schema.VAR_SCHEMA)
            layers = experiment.ms["RNA"].X
            assert set(layers) == {"raw", "normalized"}
            assert {str(layers[name].schema.field("soma_data").type) for name in layers} == {"float"}
            presence = experiment.ms["RNA"]["feature_dataset_presence_matrix"]
            assert str(presence.schema.field("soma_data").type) == "bool"
            assert presence.shape == (len(datasets), experiment.ms["RNA"].var.count)
            obs = experiment.obs.read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
            assert list(obs["soma_joinid"]) == list(range(layers["raw"].shape[0]))
            cells += len(obs)
        assert int(summary["total_cell_count"]) == cells == datasets["dataset_total_cell_count"].sum()
        counts = info["summary_cell_counts"].read().concat().to_pandas()
        for _, group in counts.groupby(["organism", "category"], observed=True):
            assert group["total_cell_count"].sum() in {90, 20, 1500, 500}


def _types(table: Any) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in table]


@pytest.mark.parametrize("kind", ["h5ad", "demo"])
def test_gene_selection_of_the_api(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "demo":
        uri = request.getfixturevalue("demo_census")
    else:
        genes = [f"ENSG{number:011d}" for number in range(300)]
        rates = np.random.default_rng(0).gamma(1, 1, 300)
        counts = np.random.default_rng(1).poisson(rates, (200, 300)).astype(np.float32)
        obs = {"study": ["s1", "s2"] * 100}
        write_h5ad(tmp_path / "a.h5ad", sp.csr_matrix(counts), genes=genes, obs=obs)
        uri = build_yaml(write_config(tmp_path, {"file": "a.h5ad", "dataset_id": {"column": "study"}})).uri
    with cellxgene_census.open_soma(uri=uri) as census:
        with census["census_data"]["homo_sapiens"].axis_query("RNA") as query:
            genes_found = cellxgene_census.experimental.pp.highly_variable_genes(
                query, n_top_genes=50, batch_key="dataset_id"
            )
    assert int(genes_found["highly_variable"].sum()) == 50


BAD = {
    "fraction": (0.5, "0.5"),
    "negative": (-1.0, "-1"),
    "nan": (np.nan, "nan"),
    "infinite": (np.inf, "inf"),
    "huge": (2.0**25, "larger than"),
}


@pytest.mark.parametrize("row", [3, 700], ids=["first-look", "later-block"])
@pytest.mark.parametrize(("value", "text"), BAD.values(), ids=BAD)
def test_what_is_no_count_is_refused_by_name(tmp_path: Path, value: float, text: str, row: int) -> None:
    counts = make_counts(800, 40).tolil()
    counts[row, 5] = value
    write_h5ad(tmp_path / "bad.h5ad", counts.tocsr())
    config = write_config(tmp_path, {"file": "bad.h5ad"})
    with pytest.raises(UserError, match=f"bad.h5ad: X holds .*{text}|bad.h5ad: X holds .* row {row}") as error:
        build_yaml(config)
    assert f"row {row}, column 5" in str(error.value)
    assert not (tmp_path / "census").exists()
    assert not (tmp_path / "census.partial").exists()


def test_missing_truncated_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "whole.h5ad")
    content = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with h5py.File(tmp_path / "foreign.h5ad", "w") as file:
        file["X"] = np.zeros((2, 2))
    for name, text in {
        "absent.h5ad": "no such file",
        "cut.h5ad": "not a complete",
        "text.h5ad": "not a complete",
        "foreign.h5ad": "expected an .h5ad",
    }.items():
        with pytest.raises(UserError, match=f"{name}: .*{text}"):
            open_h5ad(tmp_path / name, organism="homo_sapiens")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "integers"])
@pytest.mark.parametrize("counts", ["X", "raw", "layers/counts"])
def test_every_layout_and_place_of_the_counts(
    tmp_path: Path, layout: str, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h5ad, "_CSC_WINDOW", 300)
    monkeypatch.setattr(h5ad, "_DENSE_WINDOW", 400)
    matrix = make_counts(50, 40)
    stored = {
        "csr": matrix,
        "csc": matrix.tocsc(),
        "dense": matrix.toarray(),
        "integers": matrix.astype(np.int32),
    }[layout]
    if counts == "X":
        write_h5ad(tmp_path / "a.h5ad", stored)
    else:
        adata = write_h5ad(tmp_path / "a.h5ad", stored, layers={"counts": stored})
        adata.raw = adata.copy()
        adata.X = np.log1p(matrix.toarray())
        adata.write_h5ad(tmp_path / "a.h5ad")
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens", counts=counts)
    for rows in (7, 16, 1000):
        starts, blocks = zip(*source.blocks(rows), strict=True)
        assert list(starts) == list(range(0, 50, rows))
        assert (sp.vstack(blocks) != matrix).nnz == 0


def test_wrong_place_of_the_counts_lists_the_right_ones(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", layers={"counts": make_counts(50, 40)})
    with pytest.raises(UserError, match=r"no layers/count; did you mean layers/counts\?"):
        open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens", counts="layers/count")


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=8), rows=st.integers(1, 12))
def test_regroup_keeps_every_row_once_in_order(sizes: list[int], rows: int) -> None:
    total = sum(sizes)
    matrix = sp.csr_matrix(np.arange(1, total + 1)[:, None])
    edges = np.cumsum([0, *sizes])
    blocks = list(regroup((matrix[a:b] for a, b in pairwise(edges)), rows))
    assert [start for start, _ in blocks] == list(range(0, total, rows))
    assert [int(v) for _, block in blocks for v in block.toarray().ravel()] == list(range(1, total + 1))


def test_versions_duplicates_and_symbols(tmp_path: Path) -> None:
    genes = [f"{GENES[0]}.12", GENES[1], "TP53", f"{GENES[0]}_PAR_Y", "NOWHERE", "TWICE"]
    (tmp_path / "map.tsv").write_text(
        f"ensembl_id\tsymbol\tlength\tgene_type\n{GENES[1]}.3\tTP53\t77\tprotein_coding\n"
        f"{GENES[2]}\tTWICE\t1\tx\n{GENES[3]}\tTWICE\t1\tx\n"
    )
    counts = make_counts(50, 6)
    write_h5ad(tmp_path / "a.h5ad", counts, genes=genes)
    config = {"genes": {"map": {"homo_sapiens": "map.tsv"}}}
    report = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}, **config))
    genes_report = report.datasets[0].genes
    assert (genes_report.kept, genes_report.dropped, genes_report.summed, genes_report.by_symbol) == (2, 2, 2, 1)
    with cellxgene_census.open_soma(uri=report.uri) as census:
        adata = cellxgene_census.get_anndata(census, "homo_sapiens")
    dense = counts.toarray()
    assert list(adata.var["feature_id"]) == GENES[:2]
    assert list(adata.var["feature_name"]) == [GENES[0], "TP53"]
    assert list(adata.var["feature_type"]) == ["unknown", "protein_coding"]
    assert np.array_equal(adata.X.toarray(), np.c_[dense[:, 0] + dense[:, 3], dense[:, 1] + dense[:, 2]])

    config["genes"]["without_id"] = "keep"  # type: ignore[assignment]
    kept = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}, **config), force=True)
    assert kept.datasets[0].genes.under_symbol == 2
    with cellxgene_census.open_soma(uri=kept.uri) as census:
        assert list(cellxgene_census.get_var(census, "homo_sapiens")["feature_id"]) == [*GENES[:2], "NOWHERE", "TWICE"]


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from([*GENES[:3], f"{GENES[0]}.1", "A", "B", ""]), min_size=1, max_size=12))
def test_every_column_is_kept_dropped_or_summed(names: list[str]) -> None:
    for keep in (False, True):
        try:
            genes = resolve_genes(
                pd.Series(names),
                pd.DataFrame(index=names),
                organism="homo_sapiens",
                gene_map=None,
                keep_without_id=keep,
            )
        except UserError:
            assert not any(name.startswith("ENSG") for name in names)
            continue
        report = genes.report
        assert report.in_file == len(names) == report.kept + report.dropped + report.summed
        assert genes.var["feature_id"].is_unique
        assert set(genes.column_to_gene[genes.column_to_gene >= 0]) == set(range(len(genes.var)))


def test_genes_of_another_organism_are_refused(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=r"a\.h5ad: .*ids are of homo_sapiens, but organism is mus_musculus"):
        open_h5ad(tmp_path / "a.h5ad", organism="mus_musculus")


HUMAN = [f"HUM{number}" for number in range(40)]
MOUSE = [f"Mus{number}" for number in range(40)]
NOT_ENOUGH: dict[str, tuple[list[str], str]] = {
    "mouse symbols": (
        MOUSE,
        r"no gene has .*40 look like symbols of mouse genes such as 'Mus0'; if .* set organism: mus_m",
    ),
    "mostly mouse symbols": (
        MOUSE[:37] + HUMAN[:3],
        r"only 3 of 40 genes .*\(7.5%, genes.min_recognised is 50.0%\): 37 .*mouse",
    ),
    "mouse ids": (
        [f"ENSMUSG{n:011d}" for n in range(40)],
        r"40 of 40 gene ids are of mus_musculus, but organism is homo_s",
    ),
    "rat ids": (
        [f"ENSRNOG{n:011d}" for n in range(40)],
        r"40 look like Ensembl ids of rat .* holds cells of homo_sapiens, .* and pan_troglodytes",
    ),
    "transcripts": ([f"ENST{n:011d}.2" for n in range(40)], "40 look like transcript ids .*; sum the counts by gene"),
    "numbers": (
        [str(n) for n in range(40)],
        "40 look like numbers, as of Entrez or of rows .* give the genes as Ensembl id",
    ),
    "probes": (
        [f"{n}_s_at" for n in range(40)],
        "40 look like probes of a microarray .* give the genes as Ensembl ids or sym",
    ),
    "ids of two organisms": (
        GENES[:30] + [f"ENSMUSG{n:011d}" for n in range(10)],
        "genes of two organisms: 30 of 40 are of homo_sapiens, 10 look like Ensembl ids of mus_musculus .* a"
        " separate file",
    ),
    "symbols of two organisms": (
        HUMAN[:28] + MOUSE[:12],
        "genes of two organisms: 28 of 40 are of homo_sapiens, 12 look",
    ),
    "unknown symbols": (
        [f"GENE{n}" for n in range(25)] + HUMAN[:15],
        "only 15 of 40 .*; check organism, gene_id and genes.map",
    ),
}


@pytest.mark.parametrize("names", NOT_ENOUGH)
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
def test_a_file_of_few_recognised_genes_is_refused_with_what_they_look_like(
    names: str, keep: bool, tmp_path: Path
) -> None:
    genes, message = NOT_ENOUGH[names]
    write_h5ad(tmp_path / "a.h5ad", genes=genes)
    (tmp_path / "map.tsv").write_text("ensembl_id\tsymbol\n" + "".join(map("{}\t{}\n".format, GENES, HUMAN)))
    genes_config = {"map": {"homo_sapiens": "map.tsv"}, "without_id": "keep" if keep else "drop"}
    config = write_config(tmp_path, {"file": "a.h5ad"}, genes=genes_config)
    if keep and names == "unknown symbols":  # they may be the organism's
        assert build_yaml(config).datasets[0].genes.under_symbol == 25
        return
    with pytest.raises(UserError, match=r"a\.h5ad: .*" + message.replace("no gene has ", "(no gene has|only) ")):
        build_yaml(config)
    assert not (tmp_path / "census").exists()


def test_fewer_recognised_genes_are_taken_where_the_config_says_so(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", genes=[*GENES[:8], *(f"GENE{number}" for number in range(32))])
    with pytest.raises(
        UserError, match=r"only 8 of 40 genes are recognised .* \(20.0%, genes.min_recognised is 50.0%\)"
    ):
        build_yaml(write_config(tmp_path, {"file": "a.h5ad"}))
    report = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}, genes={"min_recognised": 0.2}))
    assert report.datasets[0].genes.kept == 8


def test_cells_that_lose_most_of_their_counts_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = np.ones((50, 40), dtype=np.float32)
    counts[7:10, :30], counts[10] = 0, 0  # all counts in the last ten genes, which are dropped; no counts at all
    counts[20:22, 30:] = 9
    write_h5ad(tmp_path / "a.h5ad", sp.csr_matrix(counts), genes=[*GENES[:30], *(f"GENE{n}" for n in range(10))])
    with caplog.at_level(logging.WARNING, "census_scvi"):
        report = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}))
    (dataset,) = report.datasets
    assert (dataset.n_lost_most, dataset.n_emptied) == (5, 3)
    assert str(dataset).endswith(
        "10 without Ensembl id dropped; 5 cells lost most of their counts with them, 3 lost all"
    )
    text = "a: 5 of 50 cells lost more than half of their counts with excluded genes, 3 of them all; the first"
    assert f"{text} is cell 8." in caplog.text
    with soma.open(report.uri) as root:
        (record,) = json.loads(root.metadata[census.BUILD])["datasets"]
    assert (record["file"], record["n_lost_most"], record["n_emptied"]) == ("a.h5ad", 5, 3)


def test_cells_that_are_primary_twice_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = make_counts(50, 40, 5).toarray()
    dense[40:44] = dense[:4]
    dense[44:] = 0  # cells of few counts say nothing
    counts = sp.csr_matrix(dense)
    write_h5ad(tmp_path / "a.h5ad", counts)
    order = np.random.default_rng(0).permutation(40)
    write_h5ad(tmp_path / "b.h5ad", counts[4:30][:, order], genes=[GENES[gene] for gene in order])
    write_h5ad(tmp_path / "c.h5ad", counts[:20])
    datasets = [{"file": "a.h5ad"}, {"file": "b.h5ad"}, {"file": "c.h5ad", "values": {"is_primary_data": False}}]
    with caplog.at_level(logging.WARNING, "census_scvi"):
        report = build_yaml(write_config(tmp_path, *datasets))
    assert [(cells.dataset_id, cells.same_as, cells.n_cells) for cells in report.repeated] == [
        ("a", "a", 4),
        ("b", "a", 26),
    ]
    assert "b: 26 primary cells have exactly the counts of cells of a: the same cells twice?" in caplog.text
    assert "a: 4 primary cells have exactly the counts of other cells of it: the same cells twice?" in caplog.text
    with soma.open(report.uri) as root:
        assert json.loads(root.metadata[census.BUILD])["repeated"][1] == {
            "dataset_id": "b", "same_as": "a", "n_cells": 26,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.0, 2.0, np.nan], ["1", "2", "unknown"]),
        (pd.Categorical([1.0, 2.0, np.nan]), ["1", "2", "unknown"]),
        (pd.Categorical([1, 2, 1]), ["1", "2", "1"]),
        (pd.array([1, 2, None], dtype="Int64"), ["1", "2", "unknown"]),
        (np.array([1, 2, 3], np.uint8), ["1", "2", "3"]),
        (np.array([8.5, 9.0, np.nan], np.float32), ["8.5", "9", "unknown"]),
        ([True, False, True], ["True", "False", "True"]),
        (pd.array([True, None, False], dtype="boolean"), ["True", "unknown", "False"]),
        (["1.0", "01", ""], ["1.0", "01", "unknown"]),
        (pd.Series([1, 1.0, "1"], dtype=object), ["1", "1", "1"]),
        (pd.Series([2.0, None, "x"], dtype=object), ["2", "unknown", "x"]),
        ([1e15, -3.0, np.nan], ["1000000000000000", "-3", "unknown"]),
    ],
)
def test_numbers_are_labels_as_a_person_writes_them(values: Any, labels: list[str]) -> None:
    table = pd.DataFrame({"donor": values, "sex": values})
    made = census_labels(
        table, path=Path("a.h5ad"), organism="homo_sapiens", columns={"donor_id": "donor", "tissue": "sex"}, values={}
    )
    assert list(made["donor_id"]) == list(made["tissue"]) == list(made["sex"]) == labels


def test_datasets_named_by_numbers_are_those_of_other_files(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", obs={"study": np.repeat([1.0, 2.0], 25), "donor_id": [1.0] * 49 + [np.nan]})
    report = build_yaml(write_config(tmp_path, {"file": "a.h5ad", "dataset_id": {"column": "study"}}))
    assert [dataset.dataset_id for dataset in report.datasets] == ["1", "2"]


def test_text_of_pandas_3_is_read(tmp_path: Path) -> None:
    obs = {"cell_type": pd.array(["T", None] * 25, dtype="string"), "assay": pd.Categorical(["x"] * 50)}
    adata = write_h5ad(tmp_path / "a.h5ad", obs=obs)  # type: ignore[arg-type]
    adata.obs.index, adata.var.index = adata.obs.index.astype("string"), adata.var.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "a.h5ad")
    report = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}))
    with cellxgene_census.open_soma(uri=report.uri) as census:
        found = cellxgene_census.get_anndata(census, "homo_sapiens")
    assert found.obs["cell_type"].tolist() == ["T", "unknown"] * 25
    assert found.var["feature_id"].tolist() == GENES
    assert (found.X != adata.X).nnz == 0


def test_symbols_without_a_map_are_refused(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", genes=[f"GENE{number}" for number in range(40)])
    with pytest.raises(UserError, match=r"a\.h5ad: no gene has an Ensembl id .* give a symbol map"):
        open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens")


def test_a_gene_map_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.tsv").write_text("gene,name\n1,2\n")
    with pytest.raises(UserError, match=r"map.tsv: a gene map needs the columns ensembl_id and symbol"):
        GeneMap(tmp_path / "map.tsv")
    with pytest.raises(UserError, match="no such gene map"):
        GeneMap(tmp_path / "absent.tsv")


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ({"obs": {"cell_type": "anotation"}}, "obs has no column 'anotation'; did you mean annotation?"),
        ({"gene_id": "ensembl"}, "var has no column 'ensembl'"),
        ({"dataset_id": {"column": "studdy"}}, "obs has no column 'studdy'"),
        ({"obs": {"is_primary_data": "annotation"}}, "is_primary_data has B, T; expected true or false"),
    ],
)
def test_wrong_columns_are_named_with_the_nearest(tmp_path: Path, dataset: dict[str, Any], text: str) -> None:
    write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError) as error:
        build_yaml(write_config(tmp_path, {"file": "a.h5ad", **dataset}))
    assert text in str(error.value)
    assert "a.h5ad" in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"urri": "x"}, "urri is not a setting; did you mean uri?"),
        ({"genes": {"mapp": {}}}, "genes.mapp is not a setting; did you mean genes.map?"),
        ({"genes": {"without_id": "maybe"}}, "genes.without_id is 'maybe'"),
        ({"genes": {"map": {"human": "x"}}}, "is 'human', expected one of homo_sapiens, mus_musculus"),
        ({"dataset": {"cuonts": "X"}}, "datasets[1].cuonts is not a setting; did you mean datasets[1].counts?"),
        ({"dataset": {"organism": ["x"]}}, "datasets[1].organism is ['x'], expected one of homo_sapiens"),
        ({"dataset": {"organism": "rat"}}, "datasets[1].organism is 'rat', expected one of homo_sapiens"),
        (
            {"dataset": {"obs": {"celltype": "x"}}},
            "celltype is not a column of the Census that a file can fill",
        ),
        ({"dataset": {"obs": {"raw_sum": "x"}}}, "raw_sum is not a column of the Census that a file can fill"),
        ({"dataset": {"obs": {"sex": "x"}, "values": {"sex": "male"}}}, "sex is set in obs and in values"),
        ({"dataset": {"values": {"is_primary_data": "perhaps"}}}, "values.is_primary_data is 'perhaps', expected true"),
        (
            {"dataset": {"dataset_id": {"colum": "x"}}},
            "colum is not a setting; did you mean datasets[1].data",
        ),
        ({"datasets": []}, "datasets is [], expected a list of one dataset or more"),
        ({"datasets": "a.h5ad"}, "datasets is 'a.h5ad', expected a list"),
        ({"dataset": {"dataset_id": [5]}}, "datasets[1].dataset_id is [5], expected a name in quotes or {column: "),
        (
            {"dataset": {"dataset.id": "x"}},
            "dataset.id is not a setting; did you mean datasets[1].dataset_id?",
        ),
        ({"dataset": {"data set": "x"}}, "'datasets[1].data set' is not a setting"),
        ({"data": "$NOWHERE/x"}, "data is '$NOWHERE/x': the environment variable NOWHERE is not set"),
        (
            {"dataset": {"file": "~nobody-here/a.h5ad"}},
            "datasets[1].file is '~nobody-here/a.h5ad': there is no",
        ),
        (
            {"genes": {"map": {"homo_sapiens": "${}"}}},
            "genes.map.homo_sapiens is '${}': ${} is not an environment",
        ),
        ({"data": ["x"]}, "data is ['x'], expected a path"),
        ({"genes": 5}, "genes is 5, expected a section of keys"),
        ({"genes": {"min_recognised": "half"}}, "genes.min_recognised is 'half', expected a number"),
        ({"dataset": {"values": {"sex": ["x"]}}}, "datasets[1].values.sex is ['x'], expected text"),
        ({"dataset": {"title": None, "organism": None}}, "datasets[1].organism is null, expected one of homo_sapiens"),
        ({"uri": "s3://bucket/census"}, "uri is 's3://bucket/census', expected a local folder"),
    ],
)
def test_mistakes_in_the_yaml_are_one_line(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    dataset = {"file": "a.h5ad", "organism": "homo_sapiens", **change.pop("dataset", {})}
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump({"uri": "census", "datasets": [dataset], **change}))
    with pytest.raises(UserError) as error:
        load_build_config(path)
    assert text in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


AS_WRITTEN = """
uri: $PLACE/census
data: ~/files
genes: {map: {homo_sapiens: "${PLACE}/map.tsv"}}
datasets:
- &first
  file: 010.h5ad
  dataset_id: 1.10
  title: 12:30:45
  organism: homo_sapiens
  obs: {cell_type: 1e3, tissue: no}
  values: &values {donor_id: 010, assay: 1_0, sex: no, disease: 2024-01-01, is_primary_data: No}
- <<: *first
  dataset_id: 2.0
  values: {<<: *values, donor_id: 1, is_primary_data: true}
"""


def test_labels_names_and_paths_are_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/place")
    path = tmp_path / "build.yaml"
    path.write_text(AS_WRITTEN)
    config = load_build_config(path)
    assert (str(config.uri), str(config.data)) == ("/place/census", "/home/me/files")
    assert str(config.genes.map["homo_sapiens"]) == "/place/map.tsv"
    first, second = config.datasets
    assert (str(first.file), first.dataset_id, first.title) == ("/home/me/files/010.h5ad", "1.10", "12:30:45")
    assert first.obs == {"cell_type": "1e3", "tissue": "no"}
    labels = {"donor_id": "010", "assay": "1_0", "sex": "no", "disease": "2024-01-01", "is_primary_data": False}
    assert first.values == labels
    assert (second.file, second.dataset_id, second.title) == (first.file, "2.0", "12:30:45")
    assert second.values == {**labels, "donor_id": "1", "is_primary_data": True}


def test_arguments_of_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("urri: x")
    for arguments in ([str(path), "--force"], ["--force", str(path), "--data", "x"], ["--data", "x", str(path)]):
        assert main("build-census", arguments) == 2
        assert "urri is not a setting; did you mean uri?" in capsys.readouterr().err
    for arguments in ([], [str(path), "--demo", "x"], [str(path), "other.yaml"]):
        assert main("build-census", arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_settings_of_the_command_line_and_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").mkdir()
    write_h5ad(tmp_path / "files" / "in.h5ad")
    config = str(write_config(tmp_path / "files", {"file": "in.h5ad"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    arguments = ["--config", config, "uri=mine", "genes.min_recognised=0.25"]
    assert main("build-census", [*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/elsewhere/mine" in said
    assert "min_recognised: 0.25" in said
    assert "with   50 cells x 40 genes" in said
    assert not list(Path().iterdir())
    assert main("build-census", arguments) == 0
    assert Path("mine/__group").is_dir()
    assert main("build-census", [*arguments, "genes.min_recognized=1"]) == 2
    assert (
        "command line: genes.min_recognized is not a setting; did you mean genes.min_recognised?"
        in (capsys.readouterr().err.splitlines()[-1])
    )


def test_paths_are_relative_to_the_yaml_and_to_data(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"file": "a.h5ad"}, data="files", genes={"map": {"homo_sapiens": "map.tsv"}})
    config = load_build_config(path)
    assert config.uri == tmp_path / "census"
    assert config.datasets[0].file == tmp_path / "files" / "a.h5ad"
    assert config.genes.map["homo_sapiens"] == tmp_path / "files" / "map.tsv"
    assert load_build_config(path, data=tmp_path / "other").datasets[0].file == tmp_path / "other" / "a.h5ad"


def test_existing_target_is_kept_unless_forced(two_files: tuple[Path, dict[str, ad.AnnData]]) -> None:
    config, _ = two_files
    report = build_yaml(config)
    created = _created_on(report.uri)
    with pytest.raises(UserError, match="exists; choose another uri, or replace it with --force"):
        build_yaml(config)
    assert _created_on(report.uri) == created
    assert build_yaml(config, force=True).n_cells == report.n_cells
    assert sorted(path.name for path in config.parent.iterdir()) == [
        "a.h5ad",
        "b.h5ad",
        "build.yaml",
        "census",
        "m.h5ad",
    ]


# What a shell, a URL, TileDB, fsspec or a format string may take for more than a name.
NAMES = [
    "a b", "100%", "a%20b", "a#b", "a?b", "a;b", "a\nb", "a&b+c=d,e@f!g$h~i^j`k|l<m>", "a'b\"c", "a[b]{c}*",
    "na\u00efve-\u65e5\u672c-e\u0301", "-a", "s3:a", "a::b", "a\\b", " a ",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    """The folder is the one of that name and no other; readers open it by its path, and so does this project."""
    write_h5ad(tmp_path / "in.h5ad", make_counts(12, 40))
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / name / name
    config = write_config(tmp_path, {"file": "in.h5ad"}, uri=f"out/{name}/{name}".replace("$", "$$"))
    assert build_yaml(config).uri == str(target)
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert {path.parts[0] for path in files} == {name}
    assert {path.parts[1] for path in files if len(path.parts) > 1} == {name}
    report = build_yaml(config, force=True)
    for uri in (report.uri, f"file://{target}"):
        with cellxgene_census.open_soma(uri=uri) as opened:
            assert cellxgene_census.get_anndata(opened, "homo_sapiens").shape == (12, 40)
    for uri in (str(target), f"file://{target}", target.as_uri(), f"{target}/"):
        with open_census(CensusSection(uri=uri)) as found:
            assert found.identity["cells"] == 12
    left = {path.relative_to(tmp_path / "out").parts[:2] for path in (tmp_path / "out").rglob("*")}
    assert left == {(name,), (name, name)}


@pytest.mark.parametrize("name", ["a:", os.fsdecode(b"a\xff"), "a\0b"])
def test_a_name_that_tiledb_cannot_open_is_refused_by_name(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main("build-census", ["--demo", f"{tmp_path}/{name}"]) == 2
    with (
        pytest.raises(UserError, match=r"census\.uri .*TileDB"),
        open_census(CensusSection.model_construct(uri=f"{tmp_path}/{name}")),
    ):
        pass
    assert "TileDB" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_census_is_followed(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "census", target_is_directory=True)
    config = write_config(tmp_path, {"file": "in.h5ad"}, uri="link")
    for force in (False, True):
        assert build_yaml(config, force=force).uri == str(tmp_path / "disk" / "census")
        assert _created_on(str(tmp_path / "link"))
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["census"]


@pytest.mark.parametrize("swap", [True, False], ids=["in-one-step", "in-two-renames"])
def test_killed_while_it_replaces_a_census(swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each step the old Census or the new one is there, or comes back when the command is repeated."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_h5ad(folder / "in.h5ad")
    build_yaml(write_config(folder, {"file": "in.h5ad"}))
    snapshots: list[Path] = []

    def take_snapshot() -> None:
        snapshots.append(tmp_path / str(len(snapshots)))
        shutil.copytree(folder, snapshots[-1])

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            take_snapshot()
            result = step(*arguments)
            take_snapshot()
            return result

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", watched(Path.rename))
        patch.setattr(census, "exchange", watched(census.exchange if swap else lambda *_: False))
        patch.setattr(partial_folder, "remove", watched(partial_folder.remove))
        build_yaml(folder / "build.yaml", force=True)
    missing = [snapshot for snapshot in snapshots if not (snapshot / "census").exists()]
    assert len(snapshots) >= 6
    assert bool(missing) != swap
    for snapshot in snapshots:
        with pytest.raises(UserError, match="exists; choose another uri, or replace it with --force"):
            build_yaml(snapshot / "build.yaml")
        with cellxgene_census.open_soma(uri=str(snapshot / "census")) as opened:
            assert cellxgene_census.get_anndata(opened, "homo_sapiens").shape == (50, 40)


@pytest.mark.parametrize("swap", [True, False], ids=["in-one-step", "in-two-renames"])
def test_a_census_that_cannot_be_read_in_its_place_does_not_replace_another(
    swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_h5ad(tmp_path / "in.h5ad")
    config = write_config(tmp_path, {"file": "in.h5ad"})
    build_yaml(config)
    real = census._check_census

    def unreadable(folder: Path, sources: Any) -> None:
        if folder.name == "census":
            shutil.rmtree(folder / "census_data" / "homo_sapiens" / "obs")
        real(folder, sources)

    write_h5ad(tmp_path / "in.h5ad", make_counts(10, 40))
    with monkeypatch.context() as patch:
        if not swap:
            patch.setattr(census, "exchange", lambda *_: False)
        patch.setattr(census, "_check_census", unreadable)
        with pytest.raises((soma.SOMAError, KeyError)):
            build_yaml(config, force=True)
    with cellxgene_census.open_soma(uri=str(tmp_path / "census")) as opened:
        assert cellxgene_census.get_anndata(opened, "homo_sapiens").shape == (50, 40)
    assert build_yaml(config, force=True).n_cells == {"homo_sapiens": 10}


def test_a_folder_of_the_user_with_the_name_that_a_build_needs_is_left_alone(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "in.h5ad")
    for name in ("census.partial", "census.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    config = write_config(tmp_path, {"file": "in.h5ad"})
    with pytest.raises(UserError, match=r"census\.partial exists and is not left of an earlier run"):
        build_yaml(config)
    shutil.rmtree(tmp_path / "census.partial")
    build_yaml(config)
    build_yaml(config, force=True)
    assert (tmp_path / "census.old" / "thesis.txt").exists()


def test_force_replaces_no_folder_that_is_no_census(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "census").mkdir()
    (tmp_path / "census" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a Census"):
        build_yaml(write_config(tmp_path, {"file": "a.h5ad"}), force=True)
    assert (tmp_path / "census" / "thesis.txt").exists()


def _created_on(uri: str) -> str:
    with soma.open(uri) as census:
        return str(census.metadata["created_on"])


STEPS: dict[str, tuple[Any, str]] = {
    "obs": (experiment, "_obs_tables"),
    "counts": (experiment, "write_block"),
    "census_info": (census, "write_info"),
    "root": (census, "_write_root"),
}


@pytest.mark.parametrize("killed", [False, True], ids=["failed", "killed"])
@pytest.mark.parametrize("step", STEPS)
def test_a_build_that_stops_leaves_nothing_that_opens(
    two_files: tuple[Path, dict[str, ad.AnnData]], step: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = two_files
    partial = config.parent / "census.partial"
    as_left_by_kill = config.parent / "snapshot"

    def stop(*_: Any, **__: Any) -> None:
        shutil.copytree(partial, as_left_by_kill)
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[step], stop)
        with pytest.raises(RuntimeError, match="stopped"):
            build_yaml(config)
    assert not (config.parent / "census").exists()
    assert not partial.exists()
    if killed:
        as_left_by_kill.rename(partial)
        with pytest.raises(soma.DoesNotExistError):
            cellxgene_census.open_soma(uri=str(partial))
    assert build_yaml(config).n_cells["homo_sapiens"] == 90
    assert not partial.exists()


def test_a_second_build_of_the_same_census_is_refused(
    two_files: tuple[Path, dict[str, ad.AnnData]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = two_files
    write_info: Callable[..., None] = census.write_info

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(UserError, match=r"is in use by scvi-build-census\.py"):
            build_yaml(config)
        write_info(*arguments)

    monkeypatch.setattr(census, "write_info", meanwhile)
    assert build_yaml(config).n_cells["homo_sapiens"] == 90


def test_a_census_can_be_moved(two_files: tuple[Path, dict[str, ad.AnnData]]) -> None:
    report = build_yaml(two_files[0])
    moved = Path(report.uri).with_name("moved")
    Path(report.uri).rename(moved)
    with cellxgene_census.open_soma(uri=str(moved)) as census:
        assert cellxgene_census.get_anndata(census, "homo_sapiens").shape == (90, 50)


def test_cells_without_any_count_stay(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", sp.csr_matrix((6, 40), dtype=np.float32))
    report = build_yaml(write_config(tmp_path, {"file": "a.h5ad"}))
    with cellxgene_census.open_soma(uri=report.uri) as census:
        obs = cellxgene_census.get_obs(census, "homo_sapiens")
        assert list(obs["nnz"]) == [0] * 6
        assert np.isfinite(obs[["raw_mean_nnz", "raw_variance_nnz"]]).all(axis=None)


def test_two_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad")
    config = write_config(tmp_path, {"file": "a.h5ad", "dataset_id": "x"}, {"file": "a.h5ad", "dataset_id": "x"})
    with pytest.raises(UserError, match="dataset_id 'x' is used more than once"):
        build_yaml(config)


def test_blocks_smaller_than_the_data_give_the_same_census(
    two_files: tuple[Path, dict[str, ad.AnnData]], tmp_path: Path
) -> None:
    assert two_files[0].exists()
    sources = [s for name in ("a", "b") for s in open_h5ad(tmp_path / f"{name}.h5ad", organism="homo_sapiens")]
    found = []
    for rows in (1000, 7):
        build_census(tmp_path / f"rows-{rows}", sources, block_rows=rows)
        with cellxgene_census.open_soma(uri=str(tmp_path / f"rows-{rows}")) as census:
            found.append(cellxgene_census.get_anndata(census, "homo_sapiens"))
    assert (found[0].X != found[1].X).nnz == 0
    pd.testing.assert_frame_equal(found[0].obs, found[1].obs)
    pd.testing.assert_frame_equal(found[0].var, found[1].var)


def test_tiles_of_x_do_not_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks begin and end anywhere in a tile, and hold several tiles of genes."""
    monkeypatch.setattr(schema, "X_TILE", 16)
    adata = write_h5ad(tmp_path / "a.h5ad", make_counts(50, 40))
    build_census(tmp_path / "census", open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens"), block_rows=11)
    with cellxgene_census.open_soma(uri=str(tmp_path / "census")) as census:
        assert (cellxgene_census.get_anndata(census, "homo_sapiens").X != adata.X).nnz == 0


def test_observation_joinids_are_unique_and_the_same_in_every_build() -> None:
    first, second = observation_joinids("a", 1000), observation_joinids("b", 1000)
    assert len({*first, *second}) == 2000
    assert observation_joinids("a", 10) == first[:10]


def test_own_columns_are_taken_but_term_ids_follow_their_label(tmp_path: Path) -> None:
    obs = {
        "cell_type": ["T cell"] * 50,
        "cell_type_ontology_term_id": ["CL:0000084"] * 50,
        "fine": ["Treg"] * 50,
        "tissue": ["blood"] * 50,
        "tissue_ontology_term_id": ["UBERON:0000178"] * 50,
    }
    write_h5ad(tmp_path / "a.h5ad", obs=obs)
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens", values={"tissue_general": "immune system"})
    assert source.obs["tissue_general_ontology_term_id"].iloc[0] == "unknown"
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism="homo_sapiens", obs_columns={"cell_type": "fine"})
    assert source.obs["tissue_general_ontology_term_id"].iloc[0] == "UBERON:0000178"
    first = source.obs.iloc[0]
    assert (first["cell_type"], first["cell_type_ontology_term_id"]) == ("Treg", "unknown")
    assert (first["tissue"], first["tissue_ontology_term_id"]) == ("blood", "UBERON:0000178")


@pytest.fixture
def arguments(two_files: tuple[Path, dict[str, ad.AnnData]]) -> Iterator[list[str]]:
    yield [str(two_files[0])]
    logging.getLogger().handlers.clear()


def test_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("build-census", arguments) == 0
    assert "s1 (homo_sapiens): 20 cells" in capsys.readouterr().out
    assert main("build-census", arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "--force" in error
    assert main("build-census", [*arguments, "--force"]) == 0


def test_command_for_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main("build-census", ["--demo", str(tmp_path / "demo"), "--scale", "0.05", "--genes", "120", "--seed", "1"])
        == 0
    )
    assert "400 cells, 6 datasets" in capsys.readouterr().out
    assert main("build-census", ["--demo", str(tmp_path / "demo2"), "--scale", "0.0001"]) == 2


def test_a_defect_shows_its_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "write_info", lambda *_: 1 / 0)
    assert main("build-census", arguments) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blood", "pancreas"])
def test_example_configs_on_real_data(real_data: Path, tmp_path: Path, name: str) -> None:
    config = load_build_config(Path(__file__).parents[1] / "configs" / f"build-{name}.yaml", data=real_data)
    report = build_from_config(config.model_copy(update={"uri": tmp_path / "census"}))
    file = ad.read_h5ad(config.datasets[0].file)
    organism = config.datasets[0].organism
    with cellxgene_census.open_soma(uri=report.uri) as census:
        adata = cellxgene_census.get_anndata(census, organism)
        for dataset in report.datasets:
            cells = (adata.obs["dataset_id"] == dataset.dataset_id).to_numpy()
            own = file if len(report.datasets) == 1 else file[file.obs["dataset"] == dataset.dataset_id]
            adata.var_names = adata.var["feature_id"]
            shared = own.var_names.intersection(adata.var_names)
            assert len(shared) == report.n_genes[organism]
            assert (adata[cells][:, shared].X != own[:, shared].X).nnz == 0
            labels = own.obs["cell_type_coarse" if name == "blood" else "cell_type"]
            assert list(adata.obs.loc[cells, "cell_type"]) == list(labels)
    dropped = {"blood": 0, "pancreas": 965}[name]
    assert report.datasets[0].genes.dropped == dropped


def flip_a_bit(folder: Path, rng: np.random.Generator) -> Path:
    """Change one bit of one data file below a folder; returns the file."""
    files = sorted(path for path in folder.glob("__fragments/*/[ad]*.tdb") if path.stat().st_size)
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("array", ["ms/RNA/X/raw", "obs", "ms/RNA/var"])
def test_a_damaged_census_is_never_read_as_another(
    array: str, finished_run: Run, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """prepare and create-latent-update say in one line which array is damaged, or give what they gave before."""
    shutil.copytree(demo_census, tmp_path / "census")
    folder = tmp_path / "census" / "census_data" / "homo_sapiens" / array
    rng = np.random.default_rng(len(array))
    told = 0
    for _ in range(2):
        file = flip_a_bit(folder, rng)
        for stage, name in (("prepare", "hv_genes.pkl"), ("create-latent-update", "latent.npy")):
            run = Run(tmp_path, str(tmp_path / "census"))
            shutil.rmtree(run.directory, ignore_errors=True)
            shutil.copytree(finished_run.directory, run.directory)
            code = run(stage, "--force")
            error = capsys.readouterr().err
            if code:
                assert code == 2
                (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
                assert f"homo_sapiens/{array} cannot be read (" in line
                assert "): a file is damaged or missing; restore it, or build the Census again" in line
                assert "Traceback" not in error
                told += 1
            else:  # none of the damaged bytes is read
                assert run.path(name).read_bytes() == finished_run.path(name).read_bytes()
        shutil.copyfile(Path(demo_census) / file.relative_to(tmp_path / "census"), file)
    assert told >= 2


@pytest.mark.parametrize(
    "part", ["census_data/homo_sapiens/obs", "census_data/homo_sapiens/ms/RNA/X/raw", "census_info"]
)
@pytest.mark.parametrize("how", ["removed", "group", "fragments"])
def test_missing_parts_of_a_census_are_one_line(
    part: str, how: str, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    folder = tmp_path / "census" / part
    if how == "removed":
        shutil.rmtree(folder)
    elif how == "group":  # a byte of the record of the members, or of the metadata
        for path in [*folder.parent.glob("__group/*"), *folder.glob("__meta/*")]:
            path.write_bytes(bytes([*path.read_bytes()[:40], 1, 2, *path.read_bytes()[42:]]))
    else:
        for path in folder.rglob("__fragments/*/d0.tdb"):
            path.unlink()
    run = Run(tmp_path, str(tmp_path / "census"))
    assert run("prepare") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_every_array_of_a_census_carries_a_checksum(demo_census: str) -> None:
    """All filters of all dimensions, attributes, offsets and validities: one without would be read damaged."""
    seen = []

    def look(item: Any) -> None:
        if isinstance(item, soma.Collection | soma.Experiment | soma.Measurement):
            for member in item.values():
                look(member)
            return
        options = item.schema_config_options()
        chains = [options.offsets_filters, options.validity_filters] if isinstance(item, soma.DataFrame) else []
        chains += [column["filters"] for part in (options.dims, options.attrs) for column in json.loads(part).values()]
        for chain in chains:
            assert "CHECKSUM_SHA256" in str(chain), (item.uri, chain)
        seen.append(item.uri)

    with soma.open(demo_census) as root:
        look(root)
    assert len(seen) >= 12
