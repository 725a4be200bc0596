"""From a Census with proteins to a TOTALVI model, and to a user's CITE-seq cells that it embeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
from pipeline import Run

from census_scvi.atlas import Atlas
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.model.seeded import seeded

N_CELLS = 200


@pytest.fixture(scope="module")
def run(protein_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A TOTALVI model and the embedding of the Census' cells."""
    model = {"kind": "TOTALVI", "n_hidden": 16, "n_latent": 4}
    folder = tmp_path_factory.mktemp("totalvi")
    return Run(folder, protein_census, model=model, anndata={"protein_measurement": "protein"}).all()


@pytest.fixture(scope="module")
def query(protein_census: str) -> ad.AnnData:
    """The first cells of the Census as a user may have them: proteins in obsm, with names of an antibody panel."""
    with cellxgene_census.open_soma(uri=protein_census) as root:
        options = {"obs_value_filter": f"soma_joinid < {N_CELLS}"}
        cells = cellxgene_census.get_anndata(root, "homo_sapiens", **options)
        proteins = cellxgene_census.get_anndata(root, "homo_sapiens", measurement_name="protein", **options)
    names = [f"{name}_TotalSeqB" for name in proteins.var["feature_id"]]
    index = [f"cell-{number}" for number in range(N_CELLS)]
    made = ad.AnnData(cells.X, pd.DataFrame(index=index), pd.DataFrame(index=cells.var["feature_id"].astype(str)))
    made.obsm["protein_expression"] = pd.DataFrame(proteins.X.toarray(), index, names)
    return made


def map_query(run: Run, cells: ad.AnnData, folder: Path, *settings: str) -> int:
    cells.write_h5ad(folder / "cells.h5ad")
    file = f"query.file={folder / 'cells.h5ad'}"
    small = ("query.umap_cells=0", "query.labels=[]", "query.baseline_cells=0", "annotate.method=neighbors")
    return main("map-query", ["--config", str(run.config), file, *small, *settings])


def test_cells_of_the_census_get_their_positions_from_a_file(run: Run, query: ad.AnnData, tmp_path: Path) -> None:
    assert map_query(run, query, tmp_path, "query.labels=[cell_type]") == 0
    mapped = ad.read_h5ad(tmp_path / "cells-mapped.h5ad")
    np.testing.assert_allclose(mapped.obsm["X_scvi"], np.load(run.path("latent.npy"))[:N_CELLS], atol=1e-5)
    assert np.array_equal(mapped.obsm["protein_expression"], query.obsm["protein_expression"])
    report = json.loads((tmp_path / "cells-mapped.json").read_text())["proteins"]
    assert (report["place"], report["n_shared"], report["missing"]) == ("obsm/protein_expression", 12, [])
    assert "CD3 = CD3_TotalSeqB" in report["renamed"]
    assert list(mapped.uns["scvi_proteins"]["renamed"]) == report["renamed"]
    assert mapped.obs["cell_type_predicted"].notna().all()


def test_cells_without_proteins_are_refused_unless_asked(
    run: Run, query: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = ad.AnnData(query.X, query.obs, query.var)
    assert map_query(run, without, tmp_path) == 2
    assert "has no proteins, and the model uses 12 (CD45, CD3, CD4" in capsys.readouterr().err
    assert map_query(run, without, tmp_path, "query.proteins=none") == 0
    mapped = ad.read_h5ad(tmp_path / "cells-mapped.h5ad")
    assert len(mapped.uns["scvi_proteins"]["missing"]) == 12
    assert "all 12 of the model count as 0 and are imputed by it" in capsys.readouterr().err
    moved = np.linalg.norm(mapped.obsm["X_scvi"] - np.load(run.path("latent.npy"))[:N_CELLS], axis=1)
    assert np.median(moved) > 0.01


def test_a_prepared_protein_is_that_of_the_census(run: Run, query: ad.AnnData) -> None:
    prepared = ad.read_h5ad(run.path("anndata_model.h5ad"))
    expected = query.obsm["protein_expression"].to_numpy()
    rows = prepared.obs["soma_joinid"].to_numpy()
    some = rows < N_CELLS
    assert some.sum() > 100
    names = [f"{name}_TotalSeqB" for name in prepared.uns["protein_names"]]
    assert names == list(query.obsm["protein_expression"])
    assert np.array_equal(prepared.obsm["protein_expression"][some], expected[rows[some]])


@pytest.fixture(scope="module")
def atlas(run: Run, protein_census: str) -> Iterator[Atlas]:
    with Atlas.open(run.directory, census=protein_census) as opened:
        yield opened


def as_trained(atlas: Atlas, query: ad.AnnData, batch: str) -> ad.AnnData:
    """The cells as scvi-tools reads them, in a trained batch."""
    model, description = atlas.model, atlas.description
    assert model is not None
    assert description is not None
    obs = pd.DataFrame(
        {"batch": pd.Categorical([batch] * query.n_obs, categories=description.batches)}, query.obs_names
    )
    cells = ad.AnnData(query[:, description.genes].X.copy(), obs, pd.DataFrame(index=description.genes))
    cells.obsm["protein_expression"] = query.obsm["protein_expression"].to_numpy(np.float32)
    cells.uns["protein_names"] = description.proteins
    return cells


def test_denoised_expression_is_scvi_tools_own(atlas: Atlas, query: ad.AnnData) -> None:
    model, description = atlas.model, atlas.description
    assert model is not None
    assert description is not None
    genes, batches = [description.symbols[3], *description.genes[:2]], description.batches[:2]
    found = atlas.denoised(query, genes, batches, seed=4)
    cells = as_trained(atlas, query, batches[0])
    with seeded(4):
        of_genes, _ = model.get_normalized_expression(cells, transform_batch=batches, gene_list=description.genes)
    with seeded(4):
        _, of_proteins = model.get_normalized_expression(cells, transform_batch=batches)
        foreground = model.get_protein_foreground_probability(cells, transform_batch=batches)
    expected = of_genes[[description.genes[3], *description.genes[:2]]].to_numpy() * 1e4
    np.testing.assert_allclose(found.X, expected, rtol=1e-5)
    np.testing.assert_allclose(found.obsm["protein_expression"], of_proteins, rtol=1e-5)
    np.testing.assert_allclose(found.obsm["protein_foreground"], foreground, rtol=1e-5)
    assert list(found.obsm["protein_foreground"]) == description.proteins
    assert found.obs_names.equals(query.obs_names)
    without = atlas.denoised(query, transform_batch=batches[0], proteins="none")
    assert without.shape == (N_CELLS, 0)
    assert np.isfinite(without.obsm["protein_expression"].to_numpy()).all()
    with pytest.raises(
        UserError, match=r"not trained on the batches of these cells: give trained batches in transform"
    ):
        atlas.denoised(query, genes)
    with pytest.raises(UserError, match=r"transform_batch 'lab 7' is not one of the"):
        atlas.denoised(query, genes, "lab 7")


def test_expression_of_census_cells_by_a_model_of_proteins(atlas: Atlas, query: ad.AnnData) -> None:
    model, description = atlas.model, atlas.description
    assert model is not None
    assert description is not None
    batches = description.batches[:2]
    found = atlas.normalized_expression(f"soma_joinid < {N_CELLS}", description.genes[:3], batches, seed=2)
    with seeded(2):
        cells = as_trained(atlas, query, batches[0])
        expected, _ = model.get_normalized_expression(cells, transform_batch=batches, gene_list=description.genes[:3])
    np.testing.assert_allclose(found.X, expected.to_numpy() * 1e4, rtol=1e-5)
    groups = (f"soma_joinid < {N_CELLS} and cell_type {sign} 'B cell'" for sign in ("==", "!="))
    table = atlas.differential_expression(*groups)
    assert {f"{name}_protein" for name in description.proteins} <= set(table.index)
    assert len(table) == len(description.genes) + len(description.proteins)
