"""From a Census with proteins to a TOTALVI model, and to a user's CITE-seq cells that it embeds."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
from pipeline import Run

from census_scvi.cli import main

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
    small = ("query.umap_cells=0", "query.labels=[]", "query.baseline_cells=0")
    return main("map-query", ["--config", str(run.config), file, *small, *settings])


def test_cells_of_the_census_get_their_positions_from_a_file(run: Run, query: ad.AnnData, tmp_path: Path) -> None:
    assert map_query(run, query, tmp_path) == 0
    mapped = ad.read_h5ad(tmp_path / "cells-mapped.h5ad")
    np.testing.assert_allclose(mapped.obsm["X_scvi"], np.load(run.path("latent.npy"))[:N_CELLS], atol=1e-5)
    assert np.array_equal(mapped.obsm["protein_expression"], query.obsm["protein_expression"])
    report = json.loads((tmp_path / "cells-mapped.json").read_text())["proteins"]
    assert (report["place"], report["n_shared"], report["missing"]) == ("obsm/protein_expression", 12, [])
    assert "CD3 = CD3_TotalSeqB" in report["renamed"]
    assert list(mapped.uns["scvi_proteins"]["renamed"]) == report["renamed"]


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
