"""Proteins of a user's cells: the same counts from every format, for a model's proteins, and genes as without them."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import scvi
from hypothesis import given
from hypothesis import strategies as st
from test_proteins import COUNTS, GENES, N_CELLS, NAMES, cells, counts_of, with_array, with_features, with_frame

from census_scvi.counts.protein_names import plain_name
from census_scvi.errors import UserError
from census_scvi.model.build import init_arguments, without_training
from census_scvi.model.encode import extend_batches, reference_latent
from census_scvi.model.safe import ModelDescription
from census_scvi.model.seeded import seeded
from census_scvi.model.settings import ModelSection
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells
from census_scvi.query.denoised import CellModels, denoised
from census_scvi.query.expression import Decoder
from census_scvi.query.mapping import Mapper
from census_scvi.query.protein_alignment import AlignedProteins, match_proteins

RNA = counts_of(0, len(GENES))
# Proteins of a model: another order, a suffix, one that the query does not have, and not all of the query's.
MODEL = ["CD14", "cd4", "CD19", "CD3_TotalSeqB"]
EXPECTED = np.zeros((N_CELLS, 4), np.float32)
EXPECTED[:, [0, 1, 3]] = COUNTS[:, [3, 1, 0]]


def h5ad(folder: Path) -> Path:
    with_frame().write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def h5ad_with_features(folder: Path) -> Path:
    with_features().write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def zarr_store(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_array(sp.csc_matrix).write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def strings(values: list[str]) -> np.ndarray:
    return np.array([value.encode() for value in values])


def ten_x(folder: Path) -> Path:
    adata = with_features()
    by_cell = sp.csc_matrix(adata.X.T)
    with h5py.File(folder / "cells.h5", "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = getattr(by_cell, name).astype("i4" if name == "data" else "i8")
        file["matrix/shape"] = np.array(by_cell.shape)
        file["matrix/barcodes"] = strings(list(adata.obs_names))
        ids = [*GENES, *(f"A{number}" for number in range(len(NAMES)))]
        kinds = list(adata.var["feature_types"])
        for name, values in {"id": ids, "name": list(adata.var_names), "feature_type": kinds}.items():
            file[f"matrix/features/{name}"] = strings(values)
    return folder / "cells.h5"


def ten_x_folder(folder: Path) -> Path:
    adata = with_features()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(adata.X.T.astype(int)))
    rows = "".join(f"{name}\t{name}\t{kind}\n" for name, kind in adata.var["feature_types"].items())
    (folder / "features.tsv").write_text(rows)
    (folder / "barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n")
    return folder


SOURCES: dict[str, Callable[[Path], Path | ad.AnnData]] = {
    "AnnData": lambda _: with_frame(),
    "AnnData with features": lambda _: with_features(),
    "h5ad": h5ad,
    "h5ad with features": h5ad_with_features,
    "zarr": zarr_store,
    "10x": ten_x,
    "10x folder": ten_x_folder,
}


def aligned(
    source: Path | ad.AnnData | QueryCells, proteins: str | None = None, names: list[str] = MODEL
) -> AlignedCells:
    query = source if isinstance(source, QueryCells) else QueryCells(source)
    return AlignedCells(query, GENES, {}, "homo_sapiens", min_share=0.8, protein_names=names, proteins=proteins)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_format_gives_the_same_genes_and_proteins(kind: str, tmp_path: Path) -> None:
    with QueryCells(SOURCES[kind](tmp_path)) as query:
        found = aligned(query)
        starts, counts, proteins = zip(*found.blocks_with_proteins(7), strict=True)
        assert list(starts) == list(range(0, N_CELLS, 7))
        assert np.array_equal(sp.vstack(counts).toarray(), RNA)
        assert np.array_equal(np.concatenate(proteins), EXPECTED)
        assert found.proteins is not None
        report = found.proteins.report
    place = "features" if "features" in kind or "10x" in kind else "obsm/protein_expression"
    assert (report.place, report.n_proteins, report.n_shared) == (place, 4, 3)
    assert report.renamed == {"cd4": "CD4", "CD3_TotalSeqB": "CD3"}
    assert (report.missing, report.extra) == (["CD19"], ["CD8a", "PD-1"])
    assert "missing proteins, which count as 0 and are imputed by the model: CD19" in str(report)
    assert "of these, under another name: CD4 = cd4, CD3 = CD3_TotalSeqB" in str(report)


def test_a_query_without_proteins() -> None:
    with pytest.raises(
        UserError, match=r"no proteins, and the model uses 4 \(CD14, cd4, .* imputes: set query.proteins"
    ):
        aligned(cells())
    for query in (cells(), with_frame()):
        found = aligned(query, "none")
        _, counts, proteins = zip(*found.blocks_with_proteins(25), strict=True)
        assert [part.shape for part in proteins] == [(25, 4), (25, 4), (10, 4)]
        assert not np.concatenate(proteins).any()
        assert np.array_equal(sp.vstack(counts).toarray(), RNA)
        assert found.proteins is not None
        assert found.proteins.report.missing == MODEL
        assert "no proteins: all 4 of the model count as 0 and are imputed" in str(found.proteins.report)
    plain = aligned(with_frame(), names=[])
    assert plain.proteins is None
    assert all(proteins is None for _, _, proteins in plain.blocks_with_proteins(25))


def test_proteins_of_another_panel_and_wrong_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"obsm/protein_expression has none of the model's proteins: it has CD3, CD4, "):
        aligned(with_frame(), names=["CD56", "CD19"])
    late = with_frame().copy()
    late.obsm["protein_expression"].iloc[50, 2] = 0.5
    with pytest.raises(UserError, match=r"not whole numbers, .*: 0\.5 in cell 50, protein 'CD8a'"):
        aligned(late)
    several = with_frame()
    several.obsm["ADT"] = several.obsm["protein_expression"]
    with pytest.raises(UserError, match=r"name the one with the raw counts: proteins=obsm/protein_expression"):
        aligned(several)
    assert aligned(several, "obsm/ADT").proteins is not None


AMBIGUOUS = {
    "two in the query": (["CD3_TotalSeqB", "CD3-ADT"], ["CD3"], "CD3_TotalSeqB or CD3-ADT may be CD3"),
    "two in the model": (["CD3"], ["cd3", "CD3_TotalSeqC"], "CD3 may be cd3 or CD3_TotalSeqC"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_names_are_refused(kind: str) -> None:
    found, names, message = AMBIGUOUS[kind]
    with pytest.raises(UserError, match=f"^mine: {message}; rename the proteins of your cells as in the model"):
        match_proteins(found, names, "mine")


names = st.lists(st.sampled_from(["CD3", "cd3", "CD3_TotalSeqB", "CD4", "CD4-ADT", "CD19", "IgG1"]), unique=True)


@given(found=names, wanted=names)
def test_a_protein_is_matched_with_at_most_one(found: list[str], wanted: list[str]) -> None:
    try:
        columns = match_proteins(found, wanted, "mine")
    except UserError:
        both = [*found, *wanted]
        assert any(plain_name(a) == plain_name(b) for a in both for b in both if a != b)
        return
    used = columns[columns >= 0]
    assert len(set(used.tolist())) == len(used)
    for name, column in zip(wanted, columns, strict=True):
        if name in found:
            assert found[column] == name
        elif column >= 0:
            assert plain_name(found[column]) == plain_name(name)
        else:
            assert plain_name(name) not in {plain_name(own) for own in set(found) - set(wanted)}


def test_a_reader_gives_any_number_of_cells() -> None:
    with QueryCells(with_frame()) as query:
        proteins = AlignedProteins.find(query, "X", NAMES)
        following = proteins.reader(11)
        parts = [following(size) for size in (1, 30, 0, 12, 17)]
    assert [len(part) for part in parts] == [1, 30, 0, 12, 17]
    assert np.array_equal(np.concatenate(parts), COUNTS)
    assert parts[0].dtype == np.float32


@pytest.fixture(scope="module", params=[False, True], ids=["batch not encoded", "batch encoded"])
def totalvi(request: pytest.FixtureRequest) -> tuple[scvi.model.TOTALVI, ModelDescription]:
    """An untrained model of two batches."""
    arguments = {"use_layer_norm": "both", "use_batch_norm": "none"}
    settings = {"kind": "TOTALVI", "n_hidden": 16, "n_latent": 4, "encode_covariates": request.param}
    description = ModelDescription(
        genes=GENES,
        batches=["one", "two"],
        arguments=init_arguments(ModelSection.model_validate({**settings, "arguments": arguments})),
        organism="homo_sapiens",
        batch_key=["study"],
        n_cells=N_CELLS,
        model="TOTALVI",
        proteins=MODEL,
        missing_proteins={"two": ["CD19"]},
    )
    scvi.settings.seed = 0
    return built(description), description


def built(description: ModelDescription) -> scvi.model.TOTALVI:
    model = description.build()
    model.module.eval()
    return model


@pytest.mark.parametrize("kind", ["AnnData", "10x", "without proteins"])
def test_a_mapper_encodes_genes_and_proteins_as_scvi_tools_does(
    kind: str, totalvi: tuple[scvi.model.TOTALVI, ModelDescription], tmp_path: Path
) -> None:
    model, description = totalvi
    source = cells() if kind == "without proteins" else SOURCES[kind](tmp_path)
    asked, proteins = ("none", np.zeros_like(EXPECTED)) if kind == "without proteins" else (None, EXPECTED)
    mapped = Mapper(model, description)(source, proteins=asked)
    batches = ["query"] * N_CELLS if description.arguments["encode_covariates"] else ["one"] * N_CELLS
    known = extend_batches(model, description.genes, batches)
    expected, _ = reference_latent(known, GENES, sp.csr_matrix(RNA), batches, proteins)
    assert np.allclose(mapped.latent, expected, atol=1e-5)
    assert mapped.proteins is not None
    assert mapped.proteins.n_shared == (0 if asked else 3)
    assert np.isfinite(mapped.report.expected_share)


def test_counts_of_genes_need_no_proteins(totalvi: tuple[scvi.model.TOTALVI, ModelDescription]) -> None:
    mapper = Mapper(*totalvi)
    assert np.array_equal(sp.vstack(list(mapper.counts(cells()))).toarray(), RNA)
    with pytest.raises(UserError, match="has no proteins, and the model uses 4"):
        mapper(cells())


def in_batch(source: ad.AnnData, description: ModelDescription, batch: str) -> ad.AnnData:
    """The cells as scvi-tools reads them, in a batch."""
    made = ad.AnnData(source.X.copy(), pd.DataFrame({"batch": batch}, source.obs_names), source.var)
    made.obsm["protein_expression"], made.uns["protein_names"] = EXPECTED[: source.n_obs], description.proteins
    return made


def test_an_unknown_batch_is_encoded_as_in_the_embedding_and_decoded_as_a_trained_one(
    totalvi: tuple[scvi.model.TOTALVI, ModelDescription],
) -> None:
    model, description = totalvi
    found = denoised(
        aligned(with_frame()), CellModels.of_one(totalvi, N_CELLS), [], ["two"], library_size=1, n_samples=2, seed=3
    )
    batch = "query" if description.arguments["encode_covariates"] else "one"
    known = extend_batches(model, description.genes, [batch])
    with seeded(3), without_training():
        cells = in_batch(with_frame(), description, batch)
        _, expected = known.get_normalized_expression(cells, transform_batch=["two"], n_samples=2)
        foreground = known.get_protein_foreground_probability(cells, transform_batch=["two"], n_samples=2)
    np.testing.assert_allclose(found.obsm["protein_expression"], expected, rtol=1e-5)
    np.testing.assert_allclose(found.obsm["protein_foreground"], foreground, rtol=1e-5)


def test_only_cells_of_unknown_batches_get_the_mean_of_the_trained_ones(
    totalvi: tuple[scvi.model.TOTALVI, ModelDescription],
) -> None:
    description = totalvi[1]
    known, found = Decoder(*totalvi).for_untrained(np.array(["two", "lab 7", "one"], dtype=object))
    assert found.tolist() == ["two", "query" if description.arguments["encode_covariates"] else "one", "one"]
    assert known.description.batches[:2] == description.batches
    assert set(found) <= set(known.description.batches)
    same, labels = Decoder(*totalvi).for_untrained(np.array(["two", "one"], dtype=object))
    assert same.model is totalvi[0]
    assert labels.tolist() == ["two", "one"]


def test_each_cell_is_decoded_by_the_model_of_its_batch(totalvi: tuple[scvi.model.TOTALVI, ModelDescription]) -> None:
    other = (built(totalvi[1]), totalvi[1])
    places = np.stack([np.arange(N_CELLS) % 2, np.arange(N_CELLS) // 2 % 2], axis=1)
    drawn = {"genes": GENES[:2], "transform_batch": None, "library_size": 10.0, "n_samples": 1, "seed": 5}
    both = denoised(aligned(with_frame()), CellModels.of_batches([totalvi, other], places), **drawn)
    for number, model in enumerate((totalvi, other)):
        rows = np.flatnonzero(places[:, 0] == number)
        labels = np.array(["one", "two"], dtype=object)[places[rows, 1]]
        own, proteins = Decoder(*model), EXPECTED[rows]
        genes = own.normalised(
            sp.csr_matrix(RNA[rows]), labels, GENES[:2], None, library_size=10.0, n_samples=1, seed=5, proteins=proteins
        )
        assert np.array_equal(both.X[rows], genes)
        denoised_proteins, _ = own.of_proteins(sp.csr_matrix(RNA[rows]), labels, None, proteins, n_samples=1, seed=5)
        assert np.array_equal(both.obsm["protein_expression"].to_numpy()[rows], denoised_proteins)
