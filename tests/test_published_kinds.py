"""SCANVI and TOTALVI from a Census to a published folder: gates, verification, hub, card, plain scvi-tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from pipeline import Run
from scvi.hub import HubModel
from sklearn.metrics import silhouette_score

import census_scvi
from census_scvi.atlas import Atlas
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.local_census.demo.cells import write_demo_census
from census_scvi.model.build import Proteins, build_model, init_arguments, set_protein_priors, skeleton
from census_scvi.model.encode import reference_latent
from census_scvi.model.published import seal_of
from census_scvi.model.safe import load_safe
from census_scvi.model.seeded import seeded
from census_scvi.model.settings import ModelSection
from census_scvi.publication.chain import verify
from census_scvi.report.named import embeddings_of
from census_scvi.settings import load_config
from census_scvi.workspace.identity import identities

KINDS: dict[str, dict[str, Any]] = {
    "SCANVI": {"model": {"kind": "SCANVI"}, "anndata": {"labels_key": "tissue"}},
    "TOTALVI": {
        "model": {
            "kind": "TOTALVI",
            "arguments": {"empirical_protein_background_prior": False},
        },
        "anndata": {"protein_measurement": "protein"},
    },
}
SAME = 1e-5


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo Census with proteins."""
    uri = tmp_path_factory.mktemp("kinds") / "census"
    write_demo_census(uri, seed=0, scale=0.1, n_genes=300, proteins=True)
    return uri


@pytest.fixture(scope="module", params=KINDS)
def published(request: pytest.FixtureRequest, census: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a kind whose embedding is published; tests only read it."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(census, folder / "census")
    settings = {"hvg": {"top_n_hvg": 100}, "gates": {"sample_size": 60, "min_active_units": 0.0}}
    run = Run(folder, str(folder / "census"), **settings, **KINDS[request.param])
    assert run.all()("publish") == 0
    return run


def kind_of(run: Run) -> str:
    return str(json.loads(run.path("scvi.model/model.json").read_text())["model"])


def sealed_of(run: Run) -> ad.AnnData:
    return ad.read_h5ad(run.path("published/sealed_sample.h5ad"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_link_is_valid(published: Run) -> None:
    folder = str(published.path("published"))
    links = verify(folder, str(published.directory.parent / "census"), n_cells=50, seed=0)
    assert {link.name: link.finding for link in links if not link.valid} == {}
    assert [link.name for link in links][-1] == "fresh_sample"
    record = json.loads(published.path("published/provenance.json").read_text())
    sizes = {"SCANVI": {"n_labels"}, "TOTALVI": {"n_proteins"}}[kind_of(published)]
    assert {"kind", *sizes} <= record["model"].keys()
    assert record["predictions"]["cell_variation"]["validation"]["pearson"] > 0
    assert any(gate["name"] == "order" and gate["passed"] for gate in record["gates"]["gates"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_load_model_and_plain_scvi_tools_give_the_published_embedding(published: Run) -> None:
    folder, sealed = published.path("published"), sealed_of(published)
    model = census_scvi.load_model(str(folder))
    assert type(model) is getattr(scvi.model, kind_of(published))
    trained = sealed.obs["batch"].isin(model.adata.obs["batch"].cat.categories).to_numpy()
    cells, latent = sealed[trained].copy(), sealed.obsm["X_scvi"][trained]
    batches = cells.obs["batch"].astype(str).to_numpy()
    mean, _ = reference_latent(model, list(cells.var_names), cells.X, batches, cells.obsm.get("protein_expression"))
    np.testing.assert_allclose(mean, latent, atol=SAME)
    for plain in (HubModel(str(folder)).model, type(model).load(str(folder), accelerator="cpu")):
        assert plain.adata.n_obs == trained.sum()
        np.testing.assert_allclose(plain.get_latent_representation(), latent, atol=SAME)
    if kind_of(published) == "SCANVI":
        assert set(plain.adata.obs["labels"]) <= {*model.adata.obs["labels"]}
        assert plain.adata.obs["labels"].tolist() == plain.adata.obs["tissue"].tolist()


def test_the_card_names_the_kind(published: Run) -> None:
    card = published.path("published/README.md").read_text()
    description = json.loads(published.path("published/model.json").read_text())
    title, article, measured, row, paper = {
        "SCANVI": (
            "scANVI",
            "An",
            ["RNA"],
            f"| labels | {len(description.get('labels', []))} of tissue; unknown is no label |",
            "Xu et al. (2021)",
        ),
        "TOTALVI": (
            "totalVI",
            "A",
            ["RNA", "protein"],
            f"| proteins | {len(description.get('proteins', []))}; {len(description.get('missing_proteins', []))}"
            " batches lack some of them |",
            "Gayoso et al. (2021)",
        ),
    }[description["model"]]
    assert f"# {title} embedding of " in card
    assert f"{article} {title} model of single-cell {' and '.join(measured)} counts and its embedding" in card
    assert f"- model_cls_name:{description['model']}\n" in card
    assert [line for line in card.splitlines() if "modality:" in line] == [
        f"- modality:{each.lower()}" for each in measured
    ]
    assert row in card
    assert f"The method is {paper}" in card
    assert "\n\n\n" not in card
    embeddings = embeddings_of(load_config(published.config).evaluate, published.directory)
    assert embeddings == {title: str(published.directory)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_atlas_reads_and_embeds(published: Run, census: Path) -> None:
    kind = kind_of(published)
    with Atlas.open(published.path("published")) as atlas:
        sizes = {"SCANVI": "labels, 4 dimensions", "TOTALVI": "12 proteins, 4 dimensions"}[kind]
        assert {"SCANVI": "scANVI", "TOTALVI": "totalVI"}[kind] + " of homo_sapiens, 100 genes, " in repr(atlas)
        assert sizes in repr(atlas)
        latent = np.load(published.path("latent.npy"))
        np.testing.assert_array_equal(atlas.embeddings("soma_joinid < 9").obsm["scvi"], latent[:9])
        own = sealed_of(published)
        own = ad.AnnData(own.X, obs=own.obs[["soma_joinid"]], var=own.var, obsm=own.obsm, uns=own.uns)
        joinids = own.obs["soma_joinid"].to_numpy()
        np.testing.assert_allclose(atlas.embed(own).obsm["X_scvi"], latent[joinids], atol=SAME)
        found = atlas.neighbors(own, n_neighbors=1)
        np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_labels_by_the_model_are_those_of_scvi_tools(published: Run, tmp_path: Path) -> None:
    own = sealed_of(published)
    cells = ad.AnnData(own.X, var=own.var, obsm={}, uns={})
    with Atlas.open(published.path("published")) as atlas:
        if kind_of(published) != "SCANVI":
            with pytest.raises(UserError, match="is the classifier of a scANVI model, and this is a totalVI model"):
                atlas.predict(cells, "tissue", method="model")
            return
        with pytest.raises(UserError, match="predicts tissue, which the model has learned, not cell_type"):
            atlas.predict(cells, method="model")
        found = atlas.predict(cells, "tissue", method="model", report=tmp_path / "report.html")
        model = atlas.model
    assert (tmp_path / "report-tissue.html").exists()
    cells.obs["batch"] = model.adata.obs["batch"].iloc[0]
    cells.obs["labels"] = "unknown"
    expected = model.predict(cells, soft=True)
    assert found.obs["tissue_best"].tolist() == expected.idxmax(axis=1).tolist()
    np.testing.assert_allclose(found.obs["tissue_probability"], expected.max(axis=1), atol=SAME)
    assert not found.obs["tissue_unknown"].any()
    assert "not calibrated" in found.uns["scvi_prediction"]["tissue"]["warnings"][0]
    cells.write_h5ad(tmp_path / "own.h5ad")
    arguments = ["query.labels=[tissue]", "annotate.method=model", f"query.file={tmp_path / 'own.h5ad'}"]
    assert published("map-query", *arguments, "query.umap_cells=0", f"query.output={tmp_path / 'mapped.h5ad'}") == 0
    mapped = ad.read_h5ad(tmp_path / "mapped.h5ad")
    assert mapped.obs["tissue_best"].tolist() == found.obs["tissue_best"].tolist()
    assert published("annotate", *arguments, f"query.output={tmp_path / 'mapped.h5ad'}", "--force") == 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_expression_of_the_census_is_that_of_scvi_tools(published: Run) -> None:
    """Normalised and differential expression of the cells that the model was trained on, with the same seed."""
    trained = ad.read_h5ad(published.path("anndata_model.h5ad"))
    trained = trained[np.argsort(trained.obs["soma_joinid"])].copy()
    trained.obs_names = trained.obs["soma_joinid"].astype(str)
    plain = getattr(scvi.model, kind_of(published)).load(str(published.path("scvi.model")), adata=trained)
    few, genes = list(range(0, trained.n_obs, 40)), list(trained.var_names[:20])
    joinids = trained.obs["soma_joinid"].iloc[few].tolist()
    first, second = trained.obs["cell_type"].value_counts().index[:2]
    with Atlas.open(published.path("published")) as atlas:
        for batches in (atlas.description.batches[:2], atlas.description.batches[1], None):
            found = atlas.normalized_expression(f"soma_joinid in {joinids}", genes, batches, library_size=1, seed=3)
            with seeded(3):
                expected = plain.get_normalized_expression(indices=few, gene_list=genes, transform_batch=batches)
            expected = expected[0] if kind_of(published) == "TOTALVI" else expected
            np.testing.assert_allclose(found.X, expected[genes], rtol=1e-4, atol=1e-6)
        of_training = f"soma_joinid in {trained.obs['soma_joinid'].tolist()}"
        groups = [f"cell_type == '{name}' and {of_training}" for name in (first, second)]
        table = atlas.differential_expression(*groups, seed=5)
    cells = [np.flatnonzero(trained.obs["cell_type"] == name) for name in (first, second)]
    with seeded(5):
        expected = plain.differential_expression(
            trained[np.concatenate(cells)].copy(),
            idx1=np.arange(len(cells[0])),
            idx2=np.arange(len(cells[0]), sum(map(len, cells))),
            mode="change",
            batch_correction=True,
            silent=True,
        )
    pd.testing.assert_frame_equal(table[expected.columns], expected, check_names=False, rtol=1e-3, atol=1e-4)
    n_proteins = 12 if kind_of(published) == "TOTALVI" else 0
    assert table.index.str.endswith("_protein").sum() == n_proteins == len(table) - trained.n_vars


def test_an_evaluation_measures_the_embedding(published: Run, tmp_path: Path) -> None:
    title = {"SCANVI": "scANVI", "TOTALVI": "totalVI"}[kind_of(published)]
    trained = ad.read_h5ad(published.path("anndata_model.h5ad"), backed="r").obs
    settings = [f"evaluate.measured_cells={len(trained)}", "evaluate.baseline=false", "evaluate.batches=[]"]
    assert published("evaluate", *settings, f"evaluate.folder={tmp_path}") == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert list(record["scores"]) == [title]
    assert record["cells"]["measured"] == len(trained)
    (width,) = (score["value"] for score in record["scores"][title] if score["metric"] == "silhouette_label")
    latent = np.load(published.path("latent.npy"))[trained["soma_joinid"]]
    assert width == pytest.approx((silhouette_score(latent, trained["cell_type"]) + 1) / 2, abs=1e-4)
    page = (tmp_path / "report.html").read_text()
    assert title in page
    assert "3 epochs in" in page


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_proteins_are_found(published: Run, tmp_path: Path) -> None:
    if kind_of(published) != "TOTALVI":
        pytest.skip("only TOTALVI has proteins")
    shutil.copytree(published.path("published"), tmp_path / "published")
    cells = sealed_of(published)
    proteins = cells.obsm["protein_expression"]
    for change, name, finding in (
        (lambda: proteins + 1, "sealed_counts", f"{cells.n_obs} of {cells.n_obs} sealed cells have changed counts"),
        (lambda: proteins[:, :3], "sealed_counts", f"the protein counts of its cells are float32 ({cells.n_obs}, 3)"),
        (lambda: -proteins, "sealed_embedding", "its cells have protein values that are not counts"),
    ):
        cells.obsm["protein_expression"] = change()
        cells.write_h5ad(tmp_path / "published" / "sealed_sample.h5ad")
        record = json.loads((tmp_path / "published" / "provenance.json").read_text())
        record["files"] |= identities(tmp_path / "published", ["sealed_sample.h5ad"])
        del record["seal"]
        record["seal"] = seal_of(record)
        (tmp_path / "published" / "provenance.json").write_text(json.dumps(record))
        broken = {link.name: link.finding for link in verify(str(tmp_path / "published")) if not link.valid}
        assert finding in broken[name]


def test_priors_of_proteins_with_a_batch_of_two_cells() -> None:
    """scvi-tools turns its own warning about such a batch into an error there."""
    names = [f"p{number}" for number in range(11)]
    model = build_model(
        ["a"], ["x", "y"], init_arguments(ModelSection(kind="TOTALVI")), kind="TOTALVI", proteins=Proteins(names, {})
    )
    before = model.module.background_pro_alpha.detach().clone()
    cells = skeleton(["a"], ["x", "y"], proteins=Proteins(names, {}))[[0, 1, 2, 3, 4]].copy()
    cells.obsm["protein_expression"] = np.random.default_rng(0).poisson(9, (5, 11)).astype(np.float32)
    set_protein_priors(model, cells)
    assert not np.allclose(before, model.module.background_pro_alpha.detach())


REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SCANVI": (
        {
            "file": "pbmc_multi_human.h5ad",
            "dataset_id": {"column": "dataset"},
            "obs": {"cell_type": "cell_type_coarse", "donor_id": "batch"},
        },
        {
            "census": {"obs_query": "dataset_id in ['pbmc3k', 'kang_GSE96583']", "obs_query_model": "nnz >= 300"},
            "anndata": {"labels_key": "cell_type"},
        },
    ),
    "TOTALVI": (
        {"file": "citeseq_pbmc_2batch_human.h5ad", "proteins": "obsm/protein_expression", "obs": {"donor_id": "batch"}},
        {"census": {"obs_query_model": "nnz >= 300"}, "anndata": {"protein_measurement": "protein"}},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", REAL)
def test_real_cells_are_published_verified_and_imported_again(kind: str, real_data: Path, tmp_path: Path) -> None:
    dataset, sections = REAL[kind]
    build = {
        "uri": "census",
        "genes": {"map": {"homo_sapiens": "gene_map_human.tsv.gz"}},
        "datasets": [dataset | {"organism": "homo_sapiens"}],
    }
    (tmp_path / "build.yaml").write_text(json.dumps(build))
    assert main("build-census", [str(tmp_path / "build.yaml"), "--data", str(real_data)]) == 0
    gates = {"sample_size": 100, "min_active_units": 0.0, "min_effective_rank": 1.0}  # of a model of three epochs
    settings = {"hvg": {"top_n_hvg": 500, "hvg_batch": []}, "gates": gates}
    model = {"kind": kind, "n_hidden": 32, "n_latent": 5}
    run = Run(tmp_path, str(tmp_path / "census"), **settings, **sections, model=model)
    assert run.all()("publish") == 0
    folder = run.path("published")
    assert {link.name for link in verify(str(folder), str(tmp_path / "census"), seed=0) if not link.valid} == set()
    sealed, plain = sealed_of(run), getattr(scvi.model, kind).load(str(folder), accelerator="cpu")
    np.testing.assert_allclose(plain.get_latent_representation(), sealed.obsm["X_scvi"], atol=SAME)
    (tmp_path / "foreign").mkdir()
    shutil.copy(folder / "model.pt", tmp_path / "foreign")  # as somebody else has it: a pickle alone
    imported = census_scvi.import_model(tmp_path / "foreign", tmp_path / "imported", trust=True)
    _, description = load_safe(folder)
    for name in ("genes", "batches", "labels", "proteins", "missing_proteins", "arguments"):
        assert getattr(imported, name) == getattr(description, name), name
    with Atlas.open(tmp_path / "imported") as atlas:
        own = ad.AnnData(sealed.X, var=sealed.var, obsm=sealed.obsm, uns=sealed.uns)
        np.testing.assert_allclose(atlas.embed(own).obsm["X_scvi"], sealed.obsm["X_scvi"], atol=SAME)
