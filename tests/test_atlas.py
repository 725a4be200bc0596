"""The face for notebooks: slices of the embedding, own cells, their types; never an answer that cannot be right."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
import umap.layouts
from numba.core.registry import CPUDispatcher
from pipeline import Run
from scipy.spatial.distance import pdist
from sklearn.metrics import balanced_accuracy_score

from census_scvi import Atlas, load_model
from census_scvi.annotation.labelled import several_values
from census_scvi.errors import UserError
from census_scvi.neighbors.compile_cache import keep_compiled
from census_scvi.neighbors.log_pca import log_pca
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.pictures.umap import draw_on_reference

ORGANISM = "homo_sapiens"


@pytest.fixture(scope="module")
def published(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has published into its own copy of the Census."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(demo_census, folder / "census")
    run = Run(folder, str(folder / "census"), gates={"sample_size": 300})
    shutil.copytree(finished_run.directory, run.directory)
    assert run("publish") == 0
    return run


def census_of(run: Run) -> str:
    return str(run.directory.parent / "census")


@pytest.fixture
def atlas(published: Run) -> Atlas:
    with Atlas.open(published.path("published"), census=census_of(published)) as opened:
        yield opened


@pytest.fixture(scope="module")
def own_cells(published: Run) -> ad.AnnData:
    """Cells as a user has them: symbols, raw counts, none of the Census' labels but the truth."""
    with cellxgene_census.open_soma(uri=census_of(published)) as root:
        adata = cellxgene_census.get_anndata(root, ORGANISM, obs_value_filter="is_primary_data == True")
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:300]].copy()
    kept = {"truth": adata.obs["cell_type"].astype(str).to_numpy(), "soma_joinid": adata.obs["soma_joinid"].to_numpy()}
    adata.obs = pd.DataFrame(kept, index=[f"cell-{number}" for number in range(300)])
    adata.var = pd.DataFrame(index=adata.var["feature_name"].astype(str).to_numpy())
    return adata


def test_a_slice_of_the_embedding(atlas: Atlas, published: Run) -> None:
    latent = np.load(published.path("latent.npy"))
    everything = atlas.embeddings()
    assert everything.X is None
    assert np.array_equal(everything.obsm["scvi"], latent)
    assert everything.obs["soma_joinid"].tolist() == np.load(published.path("latent-idx.npy")).tolist()
    primary = atlas.embeddings("is_primary_data == True and nnz > 200", obs_columns=["cell_type", "nnz"])
    assert primary.obs.columns.tolist() == ["soma_joinid", "cell_type", "nnz"]
    assert (primary.obs["nnz"] > 200).all()
    assert np.array_equal(primary.obsm["scvi"], latent[primary.obs["soma_joinid"]])
    some = atlas.embeddings(max_cells=100, seed=3)
    assert some.n_obs == 100
    assert some.obs["soma_joinid"].is_monotonic_increasing
    assert np.array_equal(some.obsm["scvi"], latent[some.obs["soma_joinid"]])
    assert some.obs_names.tolist() == atlas.embeddings(max_cells=100, seed=3).obs_names.tolist()
    assert some.obs_names.tolist() != atlas.embeddings(max_cells=100, seed=4).obs_names.tolist()


def test_a_slice_works_in_scanpy_and_is_written(atlas: Atlas, tmp_path: Path) -> None:
    cells = atlas.embeddings(max_cells=200)
    sc.pp.neighbors(cells, use_rep="scvi")
    cells.write_h5ad(tmp_path / "slice.h5ad")
    assert np.array_equal(sc.read_h5ad(tmp_path / "slice.h5ad").obsm["scvi"], cells.obsm["scvi"])


def test_from_a_run_directory_alone(published: Run, demo_census: str) -> None:
    """A Census without obsm["scvi"], and a run that has not published: its latent.npy is taken."""
    with Atlas.open(published.directory, census=demo_census) as atlas:
        cells = atlas.embeddings("nnz > 300")
        assert np.array_equal(cells.obsm["scvi"], np.load(published.path("latent.npy"))[cells.obs["soma_joinid"]])
        assert f"census  {demo_census}" in repr(atlas)


def test_two_lines_from_a_file_to_its_types(published: Run, own_cells: ad.AnnData, tmp_path: Path) -> None:
    """The record of the model names the Census and the embedding; the annotators are trained for a few steps."""
    own_cells.write_h5ad(tmp_path / "own.h5ad")
    for model in (published.path("published"), published.directory):
        atlas = Atlas.open(model)
        named = atlas.predict(tmp_path / "own.h5ad", steps=30)
        atlas.close()
        assert named.obs["cell_type_predicted"].notna().all()


def test_own_cells_get_the_embedding_of_the_census(atlas: Atlas, own_cells: ad.AnnData) -> None:
    mapped = atlas.embed(own_cells)
    joinids = own_cells.obs["soma_joinid"].to_numpy()
    reference = atlas.embeddings().obsm["scvi"]
    np.testing.assert_allclose(mapped.obsm["X_scvi"], reference[joinids], atol=1e-5)
    assert mapped.obs_names.equals(own_cells.obs_names)
    assert not mapped.obs["scvi_empty"].any()
    assert mapped.uns["scvi_alignment"]["n_shared"] == 200
    assert "scvi_empty" not in own_cells.obs
    found = atlas.neighbors(mapped, n_neighbors=5, obs_columns=["cell_type"])
    assert found.joinids.shape == found.distances.shape == (300, 5)
    assert (found.distances[:, 0] < 1e-4).all()  # each finds itself, or its copy
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert set(found.obs.index) == set(found.joinids.ravel())


def test_own_cells_are_named(atlas: Atlas, own_cells: ad.AnnData, tmp_path: Path) -> None:
    others = "is_primary_data == True and soma_joinid > 5"
    own_cells.write_h5ad(tmp_path / "own.h5ad")
    from_file = atlas.predict(tmp_path / "own.h5ad", obs_filter=others, steps=30)
    named = atlas.predict(own_cells, obs_filter=others, steps=30)
    pd.testing.assert_frame_equal(from_file.obs, named.obs)
    guess = 1 / named.obs["truth"].nunique()
    assert balanced_accuracy_score(named.obs["truth"], named.obs["cell_type_predicted"].astype(str)) > 1.5 * guess
    assert named.obs["cell_type_probability"].between(0, 1).all()
    assert (named.obs["cell_type_unknown"] == (named.obs["cell_type_predicted"] == "unknown")).all()
    known = named.obs[~named.obs["cell_type_unknown"]]
    assert known["cell_type_best"].astype(str).equals(known["cell_type_predicted"].astype(str))
    for without_model in ("cell_type_pca", "cell_type_logistic_regression", "cell_type_joint"):
        assert balanced_accuracy_score(named.obs["truth"], named.obs[without_model].astype(str)) > 1.5 * guess
    methods = {"consensus", "joint", "logistic_regression", "neighbors", "pca"}
    assert set(named.uns["scvi_prediction"]["cell_type"]["held_out"]) == methods
    assert len(atlas.quality(named).axes) == 2
    tissue = atlas.predict(atlas.embed(own_cells), ["tissue", "assay"])
    for column in ("predicted", "best", "probability", "uncertainty", "unknown"):
        assert {f"tissue_{column}", f"assay_{column}"} <= set(tissue.obs)
    assert "tissue_pca" not in tissue.obs  # what embed returns has no counts
    assert np.array_equal(tissue.obsm["X_scvi"], named.obsm["X_scvi"])
    named.write_h5ad(tmp_path / "named.h5ad")
    assert sc.read_h5ad(tmp_path / "named.h5ad").obs["cell_type_predicted"].equals(named.obs["cell_type_predicted"])


@pytest.mark.parametrize("method", ["fast", "harmony"])
def test_other_methods_and_the_batches_of_the_query(atlas: Atlas, own_cells: ad.AnnData, method: str) -> None:
    batches = own_cells.copy()
    batches.obs["lane"] = np.where(np.arange(300) % 2, "one", "two")
    named = atlas.predict(batches, method=method, batch_key="lane")
    guess = 1 / named.obs["truth"].nunique()
    assert balanced_accuracy_score(named.obs["truth"], named.obs["cell_type_best"].astype(str)) > 1.5 * guess
    quality = named.uns["scvi_prediction"]["cell_type"]
    assert quality["method"] == method
    assert "harmony" in quality["members"]
    assert list(quality["batches"]["batch"]) == ["one", "two"]
    with pytest.raises(UserError, match="batch_key: the cells have no obs column 'lanes'"):
        atlas.predict(batches, method=method, batch_key="lanes")


def test_without_counts_the_embedding_annotates(atlas: Atlas, own_cells: ad.AnnData) -> None:
    named = atlas.predict(own_cells, baseline_cells=0)
    guess = 1 / named.obs["truth"].nunique()
    assert balanced_accuracy_score(named.obs["truth"], named.obs["cell_type_best"].astype(str)) > 1.5 * guess
    assert named.uns["scvi_prediction"]["cell_type"]["method"] == "neighbors"
    assert "cell_type_pca" not in named.obs
    assert len(atlas.quality(named).axes) == 2
    with pytest.raises(UserError, match="these cells have no predicted tissue; predict it first"):
        atlas.quality(named, "tissue")
    with pytest.raises(UserError, match="method is 'random_forrest'; did you mean random_forest"):
        atlas.predict(own_cells, method="random_forrest")


def test_values_of_a_cell_are_split_where_asked(
    atlas: Atlas, own_cells: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several_values, "SEPARATOR", " ")  # the demo has no cell with several values
    named = atlas.predict(own_cells, baseline_cells=0, split_labels=True)
    assert {"cell", "monocyte"} <= set(named.uns["scvi_prediction"]["cell_type"]["classes"])
    assert not any(" " in name for name in named.uns["scvi_prediction"]["cell_type"]["classes"])


def test_an_empty_cell_is_unknown(atlas: Atlas, own_cells: ad.AnnData) -> None:
    cells = own_cells.copy()
    cells.X.data[slice(*cells.X.indptr[7:9])] = 0
    cells.X.eliminate_zeros()
    named = atlas.predict(cells, method="fast")
    assert named.obs["scvi_empty"].to_numpy().nonzero()[0].tolist() == [7]
    assert named.obs.iloc[7][["cell_type_predicted", "cell_type_best"]].tolist() == ["unknown", "unknown"]


def test_the_embedding_of_another_model_is_refused(published: Run, own_cells: ad.AnnData, tmp_path: Path) -> None:
    other = Run(tmp_path, census_of(published), train={"max_epochs": 1})
    assert other("prepare") == other("train") == 0
    with Atlas.open(other.directory, census=census_of(published)) as atlas:
        theirs = atlas.embed(own_cells)  # needs no embedding
        assert theirs.n_obs == 300
        with pytest.raises(UserError, match=r"is not the embedding of this model: the first 64 cells differ by up to"):
            atlas.predict(own_cells)
    with Atlas.open(published.path("published")) as right:
        with pytest.raises(UserError, match="these cells were embedded by another model and have no counts"):
            right.predict(theirs)
        with_counts = own_cells.copy()
        with_counts.obsm["X_scvi"], with_counts.uns["scvi_model"] = theirs.obsm["X_scvi"], theirs.uns["scvi_model"]
        with_counts.obs["scvi_empty"] = False
        np.testing.assert_array_equal(
            right.predict(with_counts, method="neighbors").obsm["X_scvi"], right.embed(own_cells).obsm["X_scvi"]
        )
    narrow = Run(tmp_path / "narrow", census_of(published), train={"max_epochs": 1}, model={"n_latent": 3})
    assert narrow("prepare") == narrow("train") == 0
    with (
        Atlas.open(narrow.directory, census=census_of(published)) as atlas,
        pytest.raises(UserError, match="has 4 dimensions, the model 3"),
    ):
        atlas.neighbors(own_cells)


def test_what_is_missing_is_said(published: Run, demo_census: str, own_cells: ad.AnnData) -> None:
    with pytest.raises(UserError, match=r"an atlas needs a model, a Census or both"):
        Atlas.open()
    with pytest.raises(UserError, match="give it with census="):
        Atlas.open(published.path("scvi.model"), embedding="scvi")
    with pytest.raises(UserError, match="the model is of homo_sapiens, not mus_musculus"):
        Atlas.open(published.directory, organism="mus_musculus")
    with Atlas.open(published.path("scvi.model")) as model_alone:
        assert model_alone.embed(own_cells).obsm["X_scvi"].shape == (300, 4)
        assert "census  none" in repr(model_alone)
        for call in (model_alone.embeddings, lambda: model_alone.predict(own_cells)):
            with pytest.raises(UserError, match=r"this needs the Census: Atlas.open\(..., census=...\)"):
                call()
    with Atlas.open(census=demo_census) as census_alone:
        with pytest.raises(UserError, match=r"this needs a model"):
            census_alone.embed(own_cells)
        with pytest.raises(UserError, match=r"has no obsm\['scvi'\]; give another embedding, or a run"):
            census_alone.embeddings()
    with Atlas.open(census=census_of(published)) as without_model:
        assert without_model.embeddings(max_cells=10).n_obs == 10
    with pytest.raises(UserError, match=r"has no obsm\['umap'\]"):
        Atlas.open(census=census_of(published), embedding="umap")


def test_mistakes_in_names_and_filters(atlas: Atlas, own_cells: ad.AnnData) -> None:
    with pytest.raises(
        UserError, match=r"labels contains 'cell_tipe', which is not an obs column.*did you mean cell_type\?"
    ):
        atlas.predict(own_cells, "cell_tipe")
    with pytest.raises(UserError, match=r"obs_columns contains 'nzz'"):
        atlas.embeddings(obs_columns=["nzz"])
    with pytest.raises(UserError, match=r"obs_filter \"tissue == 'Blut'\" matches no cell of"):
        atlas.embeddings("tissue == 'Blut'")
    with pytest.raises(UserError, match="cannot be used on obs"):
        atlas.embeddings("tissue = 'blood'")


def test_a_run_on_another_census_is_refused(published: Run, demo_census: str, tmp_path: Path) -> None:
    from census_scvi.local_census.demo.cells import write_demo_census

    write_demo_census(str(tmp_path / "census"), seed=1, scale=0.1, n_genes=600)
    with pytest.raises(UserError, match=r"embeds another Census than .* soma_joinids are valid within one Census only"):
        Atlas.open(census=tmp_path / "census", embedding=published.directory)


def test_cells_without_embedding_are_left_out_with_a_warning(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "nnz > 200 and soma_joinid >= 700"  # the cells that come first have none
    run = Run(tmp_path, demo_census, census={"obs_query": first, "obs_query_model": "is_primary_data == True"})
    assert run("prepare", "train.max_epochs=1") == 0
    assert run("train", "train.max_epochs=1") == 0
    assert run("create-latent-update") == 0
    with Atlas.open(run.directory, census=demo_census) as atlas:
        cells = atlas.embeddings()
        assert (cells.obs["nnz"] > 200).all()
        assert atlas.reference(max_cells=50).n_obs <= 50  # proven with cells that have one
        with pytest.raises(UserError, match=r"none of the .* cells has an embedding"):
            atlas.embeddings("nnz <= 200")
    assert "cells have no embedding and are excluded" in capsys.readouterr().err


# --- pictures, clusters, expression


def test_a_picture_and_clusters_of_a_slice(atlas: Atlas) -> None:
    cells = atlas.embeddings("is_primary_data == True")
    figure = atlas.umap(cells, "tissue")
    assert cells.obsm["X_umap"].shape == (cells.n_obs, 2)
    legend = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert legend == set(cells.obs["tissue"].unique())
    table = atlas.clusters(cells, resolution=0.5, columns=["cell_type", "tissue"])
    assert table["n_cells"].sum() == cells.n_obs
    assert table["n_cells"].is_monotonic_decreasing
    assert table.index.tolist() == cells.obs["leiden"].cat.categories.tolist()
    biggest = cells.obs.loc[cells.obs["leiden"] == "0", "cell_type"].value_counts(normalize=True)
    assert (table["cell_type"].iloc[0], table["cell_type_share"].iloc[0]) == (biggest.index[0], biggest.iloc[0])
    again = atlas.clusters("is_primary_data == True", resolution=0.5, columns=["cell_type", "tissue"])
    pd.testing.assert_frame_equal(again, table)
    assert len(atlas.clusters(cells, resolution=3.0)) > len(table)
    with pytest.raises(UserError, match=r"color is 'tisue', which is not a column of obs; did you mean tissue\?"):
        atlas.umap(cells, "tisue")


def test_clusters_are_as_good_as_scanpys() -> None:
    """The same modularity on the same graph, within what another seed changes."""
    from census_scvi.neighbors.clusters import leiden

    points = np.concatenate([np.random.default_rng(n).normal(6 * n, 1, (150, 5)) for n in range(4)]).astype(np.float32)
    found = leiden(points, 0.2, 0)
    assert len(found.categories) == 4
    assert all(len(set(found[start : start + 150])) == 1 for start in range(0, 600, 150))
    cells = ad.AnnData(points)
    sc.pp.neighbors(cells, use_rep="X", n_neighbors=15)
    sc.tl.leiden(cells, flavor="igraph", n_iterations=2, directed=False, resolution=1.0, random_state=0)
    ours = pd.Series(np.asarray(leiden(points, 1.0, 0)))
    assert abs(ours.nunique() - cells.obs["leiden"].nunique()) <= 3


TRAINED = "is_primary_data == True and nnz >= 50"  # what the run trained on


def test_normalized_expression_is_scvi_tools_own(atlas: Atlas, published: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = atlas.description.symbols[3:6]
    batch = atlas.description.batches[2]
    found = atlas.normalized_expression("tissue == 'blood'", symbols, batch, n_samples=1)
    assert found.var_names.tolist() == symbols
    assert found.var["feature_id"].tolist() == atlas.description.genes[3:6]
    assert found.X.dtype == np.float32
    with cellxgene_census.open_soma(uri=census_of(published)) as root:
        plain = cellxgene_census.get_anndata(root, ORGANISM, obs_coords=found.obs["soma_joinid"].tolist())
    plain.var_names = plain.var["feature_id"].astype(str)
    plain = plain[:, atlas.description.genes].copy()
    plain.obs["batch"] = batch  # the encoder does not look at it
    model = load_model(str(published.path("published")))
    torch.manual_seed(0)
    expected = model.get_normalized_expression(
        plain, transform_batch=[batch], gene_list=found.var["feature_id"].tolist(), library_size=1e4, n_samples=1
    )
    correlation = np.corrcoef(found.X.ravel(), expected[found.var["feature_id"]].to_numpy().ravel())[0, 1]
    assert correlation > 0.9  # other draws from the posterior
    if found.n_obs <= 4096:
        np.testing.assert_allclose(found.X, expected[found.var["feature_id"]], rtol=1e-4)
    everywhere = atlas.normalized_expression("tissue == 'blood'", symbols, atlas.description.batches)
    assert everywhere.shape == found.shape
    assert not np.allclose(everywhere.X, found.X)


def test_batches_that_were_not_trained_are_refused_with_a_way_out(atlas: Atlas) -> None:
    gene = atlas.description.genes[:1]
    with pytest.raises(UserError, match=r"cells are from batches that the model was not trained on .*transform_batch"):
        atlas.normalized_expression(None, gene, None)
    assert atlas.normalized_expression(None, gene, atlas.description.batches[0]).n_obs == 1500
    own = atlas.normalized_expression(TRAINED, gene, None)
    assert np.isfinite(own.X).all()
    with pytest.raises(UserError, match=r"transform_batch 'lab 7' is not one of the \d+ trained batches"):
        atlas.normalized_expression(None, gene, "lab 7")
    with pytest.raises(UserError, match=r"'CD33X' is not one of the model's 200 genes"):
        atlas.normalized_expression(None, ["CD33X"], None)
    with pytest.raises(UserError, match=r"not trained on .* Exclude them from group_a and group_b"):
        atlas.differential_expression("tissue == 'blood'", "tissue != 'blood'")


def test_differential_expression_is_scvi_tools_own(
    atlas: Atlas, published: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    types = atlas.embeddings(TRAINED).obs["cell_type"].value_counts().index[:2]
    groups = [f"{TRAINED} and cell_type == '{name}'" for name in types]
    found = atlas.differential_expression(*groups, seed=5)
    assert found.index.isin(atlas.description.genes).all()
    assert found["symbol"].tolist() == [
        atlas.description.symbols[atlas.description.genes.index(gene)] for gene in found.index
    ]
    with cellxgene_census.open_soma(uri=census_of(published)) as root:
        parts = [cellxgene_census.get_anndata(root, ORGANISM, obs_value_filter=group) for group in groups]
    plain = ad.concat(parts, merge="same", index_unique="-")
    plain.var_names = plain.var["feature_id"].astype(str)
    plain = plain[:, atlas.description.genes].copy()
    plain.obs["batch"] = plain.obs[atlas.description.batch_key].astype(str).agg("|".join, axis=1)
    model = load_model(str(published.path("published")))
    first = np.arange(plain.n_obs) < parts[0].n_obs
    torch.manual_seed(5)
    np.random.seed(5)
    expected = model.differential_expression(
        plain, idx1=first, idx2=~first, mode="change", batch_correction=True, silent=True
    )
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_names=False, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match=r"cells are in both groups"):
        atlas.differential_expression(groups[0], TRAINED)


def test_groups_that_are_batches_are_warned_of(atlas: Atlas, caplog: pytest.LogCaptureFixture) -> None:
    datasets = atlas.embeddings(TRAINED).obs["dataset_id"].value_counts().index[:2]
    groups = [f"{TRAINED} and dataset_id == '{name}'" for name in datasets]
    project = logging.getLogger("census_scvi")
    project.addHandler(caplog.handler)
    atlas.differential_expression(*groups)
    project.removeHandler(caplog.handler)
    assert "the groups share no batch" in caplog.text


# --- few cells, and arguments that are none


@pytest.mark.parametrize("n_cells", [1, 2, 3, 4])
def test_few_cells_of_the_census(atlas: Atlas, n_cells: int) -> None:
    few = f"soma_joinid < {n_cells}"
    cells = atlas.embeddings(few)
    figure = atlas.umap(cells, "tissue")
    assert np.isfinite(cells.obsm["X_umap"]).all()
    assert len(figure.axes[0].collections[0].get_offsets()) == n_cells
    assert atlas.clusters(cells)["n_cells"].sum() == n_cells
    assert atlas.clusters(few)["n_cells"].sum() == n_cells


def test_own_cells_few_or_against_few(atlas: Atlas, own_cells: ad.AnnData) -> None:
    for n_cells in (1, 2):
        named = atlas.predict(own_cells[:n_cells].copy(), baseline_cells=100, steps=2)
        assert named.obs["cell_type_predicted"].notna().all()
    near = atlas.neighbors(own_cells[:5].copy(), obs_filter="soma_joinid < 3")
    assert near.joinids.shape == (5, 3)  # all that there are
    with pytest.raises(UserError, match=r"the reference has 3 labelled cells and n_neighbors=10 needs 11 or more"):
        atlas.predict(own_cells[:5].copy(), obs_filter="soma_joinid < 3")
    assert (
        atlas.predict(
            own_cells[:5].copy(), obs_filter="soma_joinid < 3", n_neighbors=1, baseline_cells=2, steps=2
        ).n_obs
        == 5
    )
    assert "cell_type_predicted" not in atlas.predict(own_cells[:2].copy(), []).obs


def test_expression_of_single_cells(atlas: Atlas) -> None:
    one, other = atlas.embeddings(TRAINED, max_cells=2).obs["soma_joinid"]
    found = atlas.differential_expression(f"soma_joinid == {one}", f"soma_joinid == {other}")
    assert len(found) == 200
    genes = atlas.description.genes[:2]
    assert np.isfinite(atlas.normalized_expression(f"soma_joinid == {one}", genes, None, n_samples=2).X).all()


@pytest.mark.parametrize("method", ["predict", "neighbors"])
def test_options_are_checked_for_embedded_cells_too(atlas: Atlas, own_cells: ad.AnnData, method: str) -> None:
    embedded = atlas.embed(own_cells)
    with_counts = own_cells.copy()
    with_counts.obs, with_counts.uns = embedded.obs, embedded.uns
    with_counts.obsm.update(embedded.obsm)
    for cells in (own_cells, embedded, with_counts):
        call = getattr(atlas, method)
        with pytest.raises(TypeError, match="unexpected keyword argument 'min_shares'"):
            call(cells, min_shares=0.5)
        with pytest.raises(UserError, match=r"min_share is 1\.5; expected a number of 0 or more and at most 1"):
            call(cells, min_share=1.5)
        if cells is not embedded:
            with pytest.raises(UserError, match=r"has no layers/count"):
                call(cells, counts="layers/count")


CELLS = ad.AnnData(obsm={"scvi": np.zeros((5, 4), np.float32)}, obs=pd.DataFrame(index=list("abcde")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, own: a.predict(own, n_neighbors=0), "n_neighbors is 0; expected a whole number of 1 or more"),
        (lambda a, own: a.predict(own, n_neighbors=1.5), "n_neighbors is 1.5; expected a whole number"),
        (lambda a, own: a.predict(own, baseline_cells=-1), "baseline_cells is -1; expected a whole number of 0 or"),
        (lambda a, own: a.predict(own, steps=0), "steps is 0; expected a whole number of 1 or more"),
        (lambda a, own: a.predict(own, max_cells=0), "max_cells is 0; expected a whole number of 1 or more"),
        (lambda a, own: a.neighbors(own, n_neighbors=0), "n_neighbors is 0; expected a whole number of 1 or more"),
        (lambda a, _: a.embeddings(max_cells=0), "max_cells is 0; expected a whole number of 1 or more"),
        (lambda a, _: a.embeddings(seed=-1), "seed is -1; expected a whole number of 0 or more"),
        (lambda a, _: a.umap(CELLS[:0]), "there are no cells: the AnnData is empty"),
        (lambda a, _: a.umap(CELLS, seed=-1), "seed is -1; expected a whole number of 0 or more"),
        (lambda a, _: a.clusters(CELLS[:0]), "there are no cells: the AnnData is empty"),
        (lambda a, _: a.clusters(CELLS, resolution=0), "resolution is 0; expected a number above 0"),
        (lambda a, _: a.clusters(CELLS, resolution=float("nan")), "resolution is nan; expected a number above 0"),
        (lambda a, _: a.normalized_expression(None, [], None), "expected a list of one or more, by feature_id"),
        (lambda a, _: a.normalized_expression(None, "CD4", None), "genes is 'CD4'; expected a list"),
        (lambda a, _: a.normalized_expression(None, a.description.genes[:1], []), "transform_batch is empty; give"),
        (lambda a, _: a.normalized_expression(None, ["x"], None, n_samples=0), "n_samples is 0; expected a whole"),
        (lambda a, _: a.normalized_expression(None, ["x"], None, library_size=0), "library_size is 0; expected a"),
        (
            lambda a, _: a.differential_expression("tissue == 'blod'", "tissue == 'lung'"),
            "group_a \"tissue == 'blod'\" matches no cell of .*; change it",
        ),
        (
            lambda a, _: a.differential_expression("tissue == 'blood'", "tissue == 'lnug'"),
            "group_b \"tissue == 'lnug'\" matches no cell of .*; change it",
        ),
        (
            lambda a, _: a.differential_expression("tissue == 'blood'", "tisue == 'lung'"),
            "group_b .* did you mean tissue",
        ),
        (lambda a, _: a.differential_expression("x", "y", fdr=2), "fdr is 2; expected a number above 0 and at most 1"),
        (lambda a, _: a.differential_expression("x", "y", delta=-1), "delta is -1; expected a number of 0 or more"),
        (lambda a, _: a.differential_expression("x", "y", max_cells=0), "max_cells is 0; expected a whole number"),
    ],
)  # fmt: skip
def test_arguments_that_are_none(atlas: Atlas, own_cells: ad.AnnData, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(atlas, own_cells)


@pytest.mark.parametrize("n_cells", [0, 1, 2, 3])
def test_a_map_of_fewer_cells_than_umap_takes(n_cells: int) -> None:
    """Three cells lie in a plane: their distances are kept."""
    points = np.random.default_rng(0).normal(size=(n_cells, 7)).astype(np.float32)
    umap = UmapMap(points)
    np.testing.assert_allclose(pdist(umap.positions), pdist(points), rtol=1e-4)
    assert umap.positions.shape == (n_cells, 2)
    if n_cells:
        np.testing.assert_allclose(
            umap.place(points), np.tile(np.median(umap.positions, axis=0), (n_cells, 1)), atol=1e-6
        )
    assert UmapMap(np.ones((n_cells, 7), np.float32)).positions.tolist() == [[0, 0]] * n_cells


def test_what_is_compiled_of_umap_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or compiled in each process, where no folder can be written."""
    functions = [each for each in vars(umap.layouts).values() if isinstance(each, CPUDispatcher)]
    assert functions
    assert all(function.stats.cache_path for function in functions)

    def nowhere(_: CPUDispatcher) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(CPUDispatcher, "enable_caching", nowhere)
    keep_compiled("umap")


@pytest.mark.parametrize("counts", [np.zeros((6, 5)), np.ones((6, 1)), np.ones((1, 5)), np.full((6, 5), 3), np.eye(6)])
def test_a_pca_of_counts_that_hardly_differ(counts: np.ndarray) -> None:
    for matrix in (sp.csr_matrix(counts, dtype=np.float32), counts.astype(np.float32)):
        found = log_pca(matrix)
        assert len(found) == len(counts)
        assert np.isfinite(found).all()
        assert (np.ptp(found) > 0) == (counts.shape == (6, 6))


def test_few_cells_on_a_map_are_large_and_on_top() -> None:
    reference = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    labels = pd.Series(np.where(reference[:, 0] > 0, "B cell", "T cell"))
    sizes = []
    for n_cells in (1, 100, 1000, 5000):
        named = pd.Series(["unknown", *["B cell"] * (n_cells - 1)])
        axes = draw_on_reference(reference, labels, reference[:n_cells], named, "cell type").axes[1]
        below, above = axes.collections[:2]
        assert (len(below.get_offsets()), len(above.get_offsets())) == (5000, n_cells)
        sizes.append(above.get_sizes()[0] / below.get_sizes()[0])
        greys = np.ptp(above.get_facecolors()[:, :3], axis=1) == 0
        assert greys.sum() == 1  # unknown is no type
    assert sizes[0] > 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
