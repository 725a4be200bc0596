"""Protein counts: found in files of every kind, refused where they are wrong, and read from a Census as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given
from hypothesis import strategies as st
from test_build_census import build_yaml, write_config

from census_scvi.census.gene_rows import find_gene_rows
from census_scvi.census.open import open_census
from census_scvi.census.protein_rows import find_protein_rows
from census_scvi.census.proteins import read_protein_names, stream_proteins
from census_scvi.census.settings import CensusSection
from census_scvi.cli import main
from census_scvi.counts.array_matrix import ArrayMatrix
from census_scvi.counts.protein_names import joined_names, plain_name
from census_scvi.counts.proteins import Proteins, find_proteins, protein_features
from census_scvi.errors import UserError
from census_scvi.local_census.demo.cells import demo_sources
from census_scvi.local_census.settings import load_build_config
from census_scvi.local_census.sources import open_h5ad
from census_scvi.local_census.write import build_census

GENES = [f"ENSG{number:011d}" for number in range(1, 41)]
NAMES = ["CD3", "CD4", "CD8a", "CD14", "PD-1"]
N_CELLS = 60


def counts_of(seed: int, n_columns: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(2.0, (N_CELLS, n_columns)).astype(np.float32)


COUNTS = counts_of(1, len(NAMES))


def cells(**parts: Any) -> ad.AnnData:
    obs = pd.DataFrame({"study": ["one", "two", "two"] * (N_CELLS // 3)}, [f"cell-{n}" for n in range(N_CELLS)])
    return ad.AnnData(sp.csr_matrix(counts_of(0, len(GENES))), obs, pd.DataFrame(index=GENES), **parts)


def with_frame(counts: np.ndarray = COUNTS, names: list[str] = NAMES, key: str = "protein_expression") -> ad.AnnData:
    made = cells()
    made.obsm[key] = pd.DataFrame(counts.copy(), made.obs_names, names)
    return made


def with_array(convert: Callable[[np.ndarray], Any] = np.asarray, names: Any = NAMES) -> ad.AnnData:
    made = cells()
    made.obsm["protein_expression"] = convert(COUNTS.copy())
    if names is not None:
        made.uns["protein_names"] = np.array(names, dtype=object) if isinstance(names, list) else names
    return made


def with_features(names: list[str] = NAMES, kind: str = "Antibody Capture") -> ad.AnnData:
    """Genes and proteins in X, as scanpy reads a file of Cell Ranger."""
    everything = sp.csr_matrix(np.hstack([counts_of(0, len(GENES)), COUNTS]))
    var = pd.DataFrame({"feature_types": ["Gene Expression"] * len(GENES) + [kind] * len(names)}, [*GENES, *names])
    return ad.AnnData(everything, cells().obs, var)


PLACES: dict[str, Callable[[], ad.AnnData]] = {
    "frame": with_frame,
    "array": with_array,
    "CSR": lambda: with_array(sp.csr_matrix),
    "CSC": lambda: with_array(sp.csc_matrix),
    "integers": lambda: with_frame(COUNTS.astype(np.uint16)),
}


def found_in(data: Any, asked: str | None = None, features: Proteins | None = None) -> Proteins:
    proteins = find_proteins(data, features, asked, n_cells=N_CELLS, name="cells", setting="proteins=")
    assert proteins is not None
    return proteins


def read(proteins: Proteins, rows: int = 7, **span: int) -> np.ndarray:
    starts, blocks = zip(*proteins.blocks(rows, **span), strict=True)
    assert list(starts) == list(range(span.get("first", 0), span.get("last", N_CELLS), rows))
    return np.asarray(sp.vstack(blocks).toarray())


@pytest.mark.parametrize("kind", PLACES)
def test_every_place_gives_the_counts_from_memory_and_from_files(kind: str, tmp_path: Path) -> None:
    adata = PLACES[kind]()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(tmp_path / "cells.zarr")
    with h5py.File(tmp_path / "cells.h5ad") as file:
        for data in (adata, file, zarr.open_group(str(tmp_path / "cells.zarr"), mode="r")):
            proteins = found_in(data)
            assert (proteins.place, proteins.names) == ("obsm/protein_expression", NAMES)
            assert np.array_equal(read(proteins), COUNTS)
            assert np.array_equal(read(proteins, first=10, last=31), COUNTS[10:31])


def test_whole_numbers_with_a_mask_are_numbers() -> None:
    adata = with_frame()
    adata.obsm["protein_expression"] = adata.obsm["protein_expression"].astype("Int64")
    assert np.array_equal(read(found_in(adata)), COUNTS)
    adata.obsm["protein_expression"].iloc[3, 2] = pd.NA
    with pytest.raises(UserError, match=r"missing values \(NaN\): nan in cell 3, protein 'CD8a'"):
        found_in(adata)


def features_of(adata: ad.AnnData) -> Proteins | None:
    return protein_features(ArrayMatrix(adata.X, "X"), *find_protein_rows(adata.var), "cells: X")


def test_features_are_proteins_and_never_genes() -> None:
    adata = with_features()
    proteins = found_in(None, features=features_of(adata))
    assert (proteins.place, proteins.names) == ("features", NAMES)
    assert np.array_equal(read(proteins, first=3, last=50), COUNTS[3:50])
    assert find_gene_rows(adata.var, "homo_sapiens").left_out == {"Antibody Capture": len(NAMES)}


def test_names_of_features() -> None:
    kinds = ["Gene Expression", "Antibody Capture", "Antibody Capture", "CRISPR Guide Capture", "Antibody Capture"]
    names = ["CD4", "CD4-1", "PD-1", "guide", "Hashtag_2"]
    rows, found = find_protein_rows(pd.DataFrame({"feature_types": kinds}, names))
    assert (rows.tolist(), found) == ([1, 2], ["CD4", "PD-1"])
    by_id = pd.DataFrame({"feature_types": kinds, "gene_symbols": names}, ["ENSG00000010610", "A1", "A2", "g", "H2"])
    assert find_protein_rows(by_id)[1] == ["CD4-1", "PD-1"]
    assert find_protein_rows(pd.DataFrame(index=names))[1] == []


def changed(value: float) -> np.ndarray:
    counts = COUNTS.copy()
    counts[41, 1] = value
    return counts


CLR = np.log1p(COUNTS) - np.log1p(COUNTS).mean(axis=0)
RAW = r"; expected raw protein counts \(whole numbers, 0 or more\); name the place that holds them"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "negative": (lambda: with_frame(changed(-3)), rf"holds negative values: -3 in cell 41, protein 'CD4'{RAW}"),
    "CLR": (lambda: with_frame(CLR), "holds negative values, as after CLR or DSB normalisation: -"),
    "logarithm": (lambda: with_frame(np.log1p(COUNTS)), "not whole numbers, as after a logarithm or CLR: "),
    "NaN": (lambda: with_frame(changed(np.nan)), r"holds missing values \(NaN\): nan in cell 41, protein 'CD4'"),
    "too large": (lambda: with_frame(changed(2.0**25)), r"holds values above 16,777,216: 3.35544e\+07 in cell 41"),
    "no names": (lambda: with_array(names=None), r"5 columns without names; put .* into uns\['protein_names'\], or"),
    "few names": (lambda: with_array(names=NAMES[:4]), r"has 5 columns, uns\['protein_names'\] 4 names"),
    "no list": (lambda: with_array(names=np.arange(5)), r"uns\['protein_names'\] is not a list of names; expected 5"),
    "twice": (lambda: with_frame(names=["CD3", "CD4", "CD3", "X", "Y"]), "1 names .* more than once, such as 'CD3'"),
    "empty name": (lambda: with_array(names=["CD3", "", "A", "B", "C"]), "column 2 has no name"),
    "no column": (lambda: with_frame(COUNTS[:, :0], []), "has no columns; expected one per protein"),
    "three dimensions": (
        lambda: with_array(lambda counts: counts[:, :, None]),
        "3 dimensions|stored as 'array' of shape",
    ),
    "text": (lambda: with_frame(np.full((N_CELLS, 5), "high", dtype=object)), "expected raw"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_proteins_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    adata = make()
    with pytest.raises(UserError, match=message):
        found_in(adata)
    if kind == "twice":  # anndata does not write them
        return
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(UserError, match=message):
        open_h5ad(tmp_path / "cells.h5ad", organism="homo_sapiens")


def test_a_missing_column_is_damage(tmp_path: Path) -> None:
    with_frame().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["obsm/protein_expression/CD4"]
    with pytest.raises(UserError, match=r"obsm/protein_expression: column 'CD4' is missing; the file is damaged"):
        open_h5ad(tmp_path / "cells.h5ad", organism="homo_sapiens")


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    with_frame().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        for name in NAMES:
            del file[f"obsm/protein_expression/{name}"]
            file[f"obsm/protein_expression/{name}"] = np.ones(N_CELLS - 1)
    with pytest.raises(UserError, match=r"obsm/protein_expression has 59 rows, obs 60; expected one row per cell"):
        open_h5ad(tmp_path / "cells.h5ad", organism="homo_sapiens")


def test_the_place_is_found_if_there_is_one() -> None:
    assert find_proteins(cells(), None, None, n_cells=N_CELLS, name="cells", setting="") is None
    assert find_proteins(with_frame(), None, "none", n_cells=N_CELLS, name="cells", setting="") is None
    both = with_frame()
    both.obsm["ADT"] = both.obsm["protein_expression"] + 1
    both.obsm["X_pca"] = COUNTS
    several = "several places: obsm/protein_expression, obsm/ADT; name the one with the raw counts: proteins=obsm/prot"
    with pytest.raises(UserError, match=several):
        found_in(both)
    assert np.array_equal(read(found_in(both, "obsm/ADT")), COUNTS + 1)
    with pytest.raises(UserError, match=r"several places: obsm/protein_expression, features; name"):
        found_in(with_frame(), features=features_of(with_features()))
    with pytest.raises(UserError, match=r"no obsm/AD; did you mean obsm/ADT\? \(obsm has protein_exp"):
        found_in(both, "obsm/AD")
    with pytest.raises(UserError, match=r"no features of type Antibody Capture \(obsm has nothing\)"):
        found_in(cells(), "features")


@given(
    panels=st.lists(
        st.lists(st.sampled_from(["CD3", "cd3", "CD3_TotalSeqB", "CD4-ADT", "CD4", "CD4_TotalC"]), unique=True),
        max_size=4,
    )
)
def test_columns_of_one_file_stay_apart_when_names_are_joined(panels: list[list[str]]) -> None:
    known = joined_names(panels)
    assert set(known) == {name for panel in panels for name in panel}
    for panel in panels:
        assert len({known[name] for name in panel}) == len(panel)
    for name, joined in known.items():
        assert plain_name(name) == plain_name(joined)
    unclear = {
        plain_name(a) for panel in panels for a in panel for b in panel if a != b and plain_name(a) == plain_name(b)
    }
    for plain in {plain_name(name) for name in known} - unclear:
        assert len({joined for name, joined in known.items() if plain_name(name) == plain}) == 1


def test_names_without_suffixes() -> None:
    same = ["CD3", "CD3_TotalSeqB", "CD3-TotalSeq-C", "CD3_TotalC", "cd3_ADT", "CD3 TotalSeq A", "CD3_prot"]
    assert {plain_name(name) for name in same} == {"cd3"}
    others = ["CD3", "CD3e", "PD-1", "TotalSeqB", "IgG1", "IgG", "IgG_total", "HLA-DR", "CD8", "CD8a"]
    assert len({plain_name(name) for name in others}) == len(others)


SUFFIXED = ["CD3_TotalSeqB", "CD4_TotalSeqB", "CD56-TotalSeqB"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Census of two datasets with proteins, one without, and one with Antibody Capture and names with suffixes."""
    folder = tmp_path_factory.mktemp("proteins")
    first = with_frame()
    first.obsm["protein_expression"].loc[first.obs["study"] == "one", "CD14"] = 0
    first.write_h5ad(folder / "obsm.h5ad")
    cells().write_h5ad(folder / "rna.h5ad")
    third = with_features()[:, [*GENES, *NAMES[:3]]].copy()
    third.var_names = [*GENES, *SUFFIXED]
    third.write_h5ad(folder / "features.h5ad")
    config = write_config(
        folder,
        {"file": "obsm.h5ad", "dataset_id": {"column": "study"}},
        {"file": "rna.h5ad"},
        {"file": "features.h5ad", "proteins": "features"},
        {"file": "obsm.h5ad", "dataset_id": "excluded", "proteins": False, "values": {"is_primary_data": False}},
    )
    report = build_yaml(config)
    assert report.n_proteins == {"homo_sapiens": 6}
    assert [dataset.n_proteins for dataset in report.datasets] == [5, 5, 0, 3, 0]
    assert str(report.datasets[3]).endswith("3 columns that are not genes excluded; 3 proteins")
    return report.uri


def expected_proteins() -> np.ndarray:
    """Counts of the cells of `built` (cells, 6 proteins), in the order of the Census."""
    one = np.arange(N_CELLS) % 3 == 0
    counts = np.zeros((4 * N_CELLS, 6), np.float32)
    counts[:20, :5], counts[20:60, :5] = COUNTS[one], COUNTS[~one]
    counts[:20, 3] = 0
    counts[120:180, [0, 1, 5]] = COUNTS[:, :3]
    return counts


@pytest.mark.parametrize("size", [1, 13, 60, 240])
def test_the_census_has_the_proteins_of_the_files(built: str, size: int) -> None:
    rng, expected = np.random.default_rng(size), expected_proteins()
    joinids = np.sort(rng.choice(240, 200, replace=False))
    some = np.sort(rng.choice(200, (size + 1) // 2, replace=False))  # cells that are not neighbors
    groups = [some, *np.array_split(np.arange(200), max(200 // size, 1)), some[:0]]
    with open_census(CensusSection(uri=built)) as census:
        assert read_protein_names(census, "protein") == [*NAMES, "CD56-TotalSeqB"]
        for group, counts in zip(groups, stream_proteins(census, "protein", joinids, groups), strict=True):
            assert counts.dtype == np.float32
            assert np.array_equal(counts, expected[joinids[group]])


def test_the_measurement_says_which_dataset_measured_which_protein(built: str) -> None:
    expected = expected_proteins()
    with open_census(CensusSection(uri=built)) as census:
        measurement = census.experiment.ms["protein"]
        var = measurement.var.read().concat().to_pandas()
        presence = measurement["feature_dataset_presence_matrix"].read().coos().concat().to_scipy().toarray()
        assert measurement.X["raw"].shape == (240, 6)
        assert measurement.X["raw"].nnz == np.count_nonzero(expected)
    present = np.array([[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 1], [0] * 6], bool)
    assert np.array_equal(presence, present)
    assert var["nnz"].tolist() == np.count_nonzero(expected, axis=0).tolist()
    assert var["n_measured_obs"].tolist() == (np.array([20, 40, 60, 60, 60]) @ present).tolist()


def test_a_census_without_proteins_says_so(demo_census: str) -> None:
    with open_census(CensusSection(uri=demo_census)) as census:
        for name in ("protein", "RNA"):
            with pytest.raises(
                UserError, match=rf"no measurement '{name}' with proteins \(measurements next to RNA: none"
            ):
                read_protein_names(census, name)


def test_the_demo_has_proteins_where_its_sources_have_them(protein_census: str) -> None:
    sources = demo_sources(0, 0.25, 600, proteins=True)
    human = [source for source in sources if source.organism == "homo_sapiens"]
    with open_census(CensusSection(uri=protein_census)) as census:
        names = read_protein_names(census, "protein")
        cells = np.arange(int(census.experiment.obs.count))
        (found,) = stream_proteins(census, "protein", cells, [cells])
    first = 0
    for source in human:
        here = pd.DataFrame(found[first : first + len(source.obs)], columns=names)
        for _, block in source.protein_blocks(len(source.obs)):
            assert np.array_equal(here[source.proteins], block.toarray())
        assert not here.drop(columns=source.proteins).to_numpy().any()
        first += len(source.obs)


def test_real_proteins_are_those_of_the_file(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "citeseq_pbmc_2batch_human.h5ad"
    if not path.exists():
        pytest.skip(f"needs the CITE-seq cells of {path}")
    file = ad.read_h5ad(path)
    build_census(tmp_path / "census", open_h5ad(path, dataset_column="batch", organism="homo_sapiens"), block_rows=128)
    with open_census(CensusSection(uri=str(tmp_path / "census"))) as census:
        assert read_protein_names(census, "protein") == list(file.obsm["protein_expression"])
        obs = census.experiment.obs.read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
        groups = np.array_split(np.arange(file.n_obs), 3)
        found = np.concatenate(list(stream_proteins(census, "protein", obs["soma_joinid"].to_numpy(), groups)))
    for batch in file.obs["batch"].unique():
        expected = file.obsm["protein_expression"][file.obs["batch"] == batch].to_numpy()
        assert np.array_equal(found[obs["dataset_id"] == batch], expected)


def test_the_command_says_which_proteins_it_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_frame(CLR).write_h5ad(tmp_path / "cells.h5ad")
    config = str(write_config(tmp_path, {"file": "cells.h5ad"}))
    assert main("build-census", [config]) == 2
    assert "as after CLR or DSB normalisation" in (error := capsys.readouterr().err)
    assert "exclude the proteins with proteins: none" in error
    with_frame().write_h5ad(tmp_path / "cells.h5ad")
    assert main("build-census", [config, "--dry-run"]) == 0
    assert "40 of 40 genes; 5 proteins" in capsys.readouterr().out
    for value, message in {"ADT": "expected obsm/<name>, features or none", "obsm/ADT": "has no obsm/ADT"}.items():
        assert main("build-census", [str(write_config(tmp_path, {"file": "cells.h5ad", "proteins": value}))]) == 2
        assert message in capsys.readouterr().err
    for value in ("none", False):
        assert (
            load_build_config(write_config(tmp_path, {"file": "x", "proteins": value})).datasets[0].proteins == "none"
        )
    demo = ["--demo", str(tmp_path / "demo"), "--scale", "0.05", "--genes", "120", "--proteins"]
    assert main("build-census", demo) == 0
    assert "demo-human-lung (homo_sapiens): 90 cells, 117 of 117 genes; 9 proteins" in capsys.readouterr().out
