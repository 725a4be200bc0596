"""Surgery of SCANVI and TOTALVI: what plain scvi-tools loads and extends gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from test_surgery import ARGUMENTS, LAYER_NORM, generated

from census_scvi import Atlas
from census_scvi.errors import UserError
from census_scvi.model.build import quiet, without_training
from census_scvi.model.safe import ModelDescription, load_safe, save_safe
from census_scvi.query.surgery import pace
from census_scvi.query.surgery.adapt import Reference, plan_surgery
from census_scvi.query.surgery.pace import surgery_seconds
from census_scvi.query.surgery.settings import SurgeryTraining

PROTEINS = [f"protein-{number}" for number in range(12)]
TRAINING = {"max_epochs": 3, "batch_size": 64, "lr": 1e-2}


def with_proteins(cells: ad.AnnData, missing: dict[str, list[str]], seed: int) -> ad.AnnData:
    """The cells with proteins that depend on the type; the missing ones of a batch are 0."""
    numbers = np.random.default_rng(11)
    levels = numbers.gamma(1.0, 20.0, (4, len(PROTEINS))) + 2
    numbers = np.random.default_rng(seed)
    kind = cells.obs["cell_type"].str[-1].astype(int).to_numpy()
    counts = numbers.poisson(levels[kind]).astype(np.float32)
    for batch, names in missing.items():
        counts[np.ix_(cells.obs["batch"] == batch, np.isin(PROTEINS, names))] = 0
    cells = cells.copy()
    cells.obsm["protein_expression"] = pd.DataFrame(counts, cells.obs_names, PROTEINS)
    return cells


def trained(kind: str, cells: ad.AnnData, folder: Path, norm: dict[str, str] = LAYER_NORM, **more: Any) -> Path:
    """The safe form of a model of plain scvi-tools."""
    scvi.settings.seed = 0
    arguments = {**ARGUMENTS, **norm}
    extra: dict[str, Any] = {}
    cells = cells.copy()
    with quiet("scvi"), quiet("lightning.pytorch"), without_training():
        if kind == "SCANVI":
            cells.obs["labels"] = cells.obs["cell_type"]
            setup = {"labels_key": "labels", "unlabeled_category": "unknown"}
            scvi.model.SCANVI.setup_anndata(cells, batch_key="batch", **setup)
            model = scvi.model.SCANVI(cells, **arguments)
            extra = {"labels": sorted(set(cells.obs["cell_type"])), "labels_key": "cell_type"}
            extra |= {"unlabeled_category": "unknown"}
        elif kind == "SCVI":
            scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
            model = scvi.model.SCVI(cells, **arguments)
        else:
            n_layers, dropout = arguments.pop("n_layers"), arguments.pop("dropout_rate")
            arguments |= {"n_layers_encoder": n_layers, "n_layers_decoder": n_layers}
            arguments |= {"dropout_rate_encoder": dropout, "dropout_rate_decoder": dropout}
            scvi.model.TOTALVI.setup_anndata(cells, batch_key="batch", protein_expression_obsm_key="protein_expression")
            model = scvi.model.TOTALVI(cells, **arguments)
            extra = {"proteins": PROTEINS, **more}
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False)
    folder.mkdir()
    batches = sorted(set(cells.obs["batch"]))
    described = ModelDescription(
        list(cells.var_names), batches, arguments, "homo_sapiens", ["batch"], cells.n_obs, model=kind, **extra
    )
    save_safe(model, described, folder)
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    cells = generated({"first": 120, "second": 120}, seed=1)
    lacking = {"second": PROTEINS[:2]}
    return {
        "BatchNorm": trained("SCANVI", cells, folder / "batch-norm", {"use_batch_norm": "both"}),
        "SCANVI": trained("SCANVI", cells, folder / "scanvi"),
        "TOTALVI": trained("TOTALVI", with_proteins(cells, lacking, 3), folder / "totalvi", missing_proteins=lacking),
    }


@pytest.fixture(scope="module")
def query() -> ad.AnnData:
    """Two batches, one of which lacks five proteins."""
    return with_proteins(generated({"z-sample": 90, "a-sample": 60}, seed=2), {"a-sample": PROTEINS[-5:]}, 4)


@pytest.mark.parametrize("kind", ["SCANVI", "TOTALVI"])
@pytest.mark.parametrize("mode", ["joint", "per_batch", "sequential"])
def test_the_extended_model_is_one_of_scvi_tools(
    kind: str, mode: str, references: dict[str, Path], query: ad.AnnData, tmp_path: Path
) -> None:
    atlas = Atlas.open(references[kind])
    adapted = atlas.adapt(query, "batch", mode=mode, training=TRAINING, folder=tmp_path / "saved")
    latent = adapted.embed(query).obsm["X_scvi"]
    assert np.abs(latent - atlas.embed(query).obsm["X_scvi"]).max() > 0.01
    for record in adapted.surgery["trainings"]:
        assert record["moved"]["latent"] <= 1e-6
        assert record["moved"]["weights"] == 0
        assert record["moved"]["changed"] == []
    folders = sorted((tmp_path / "saved").glob("batch-*")) or [tmp_path / "saved"]
    for folder in folders:
        model, description = load_safe(folder)
        rows = query.obs["batch"].isin(description.batches).to_numpy()
        cells = query[rows].copy()
        cells.obs["labels"] = "unknown"
        cells.uns["protein_names"] = np.array(PROTEINS, dtype=object)
        cells.obsm["protein_expression"] = cells.obsm["protein_expression"].to_numpy()
        with without_training():
            plain = getattr(scvi.model, kind).load(str(folder), adata=cells, accelerator="cpu")
            np.testing.assert_allclose(plain.get_latent_representation(), latent[rows], atol=1e-5)
        if kind == "TOTALVI":
            expected = {"second": PROTEINS[:2], "a-sample": PROTEINS[-5:]}
            assert description.missing_proteins == {
                batch: names for batch, names in expected.items() if batch in description.batches
            }
            mask = model.module.protein_batch_mask
            assert {code: int(row.sum()) for code, row in mask.items()} == {
                str(code): 12 - len(expected.get(batch, [])) for code, batch in enumerate(description.batches)
            }


def test_the_prior_of_the_protein_background_is_that_of_the_cells(
    references: dict[str, Path], query: ad.AnnData, tmp_path: Path
) -> None:
    """As scvi-tools takes it; that of the reference does not change."""
    adapted = Atlas.open(references["TOTALVI"]).adapt(
        query, "batch", training={"max_epochs": 1, "lr": 1e-9}, folder=tmp_path / "saved"
    )
    before, _ = load_safe(references["TOTALVI"])
    cells = query.copy()
    cells.obsm["protein_expression"] = cells.obsm["protein_expression"].to_numpy()
    cells.uns["protein_names"] = np.array(PROTEINS, dtype=object)
    scvi.settings.seed = 0
    with without_training():
        theirs = scvi.model.TOTALVI.load_query_data(cells, before, accelerator="cpu")
    for name in ("background_pro_alpha", "background_pro_log_beta"):
        own, others, old = (getattr(each.module, name) for each in (adapted.model, theirs, before))
        assert torch.equal(own[:, :2], old)
        np.testing.assert_allclose(own[:, 2:].detach(), others[:, 2:].detach(), rtol=0.2, atol=0.1)


def test_the_classifier_predicts_for_the_reference_as_before(references: dict[str, Path], query: ad.AnnData) -> None:
    adapted = Atlas.open(references["BatchNorm"]).adapt(query, "batch", training=TRAINING)
    before, _ = load_safe(references["BatchNorm"])
    assert any(isinstance(layer, torch.nn.BatchNorm1d) for layer in before.module.classifier.modules())
    for name, values in before.module.classifier.state_dict().items():
        assert "num_batches" in name or torch.equal(adapted.model.module.classifier.state_dict()[name], values), name
    assert adapted.surgery["trainings"][0]["moved"]["latent"] <= 1e-6
    assert all("decoder" in name for name in adapted.surgery["trainings"][0]["moved"]["changed"])


def test_arguments_of_the_kind(references: dict[str, Path], query: ad.AnnData) -> None:
    """The loss of the adversary is one of TOTALVI only; without it the batches' weights differ."""
    atlas = Atlas.open(references["TOTALVI"])
    weights = [
        atlas.adapt(query, "batch", training=TRAINING | {"arguments": arguments}).model.module.state_dict()
        for arguments in ({}, {"scale_adversarial_loss": 0.0}, {})
    ]
    assert any(not torch.equal(values, weights[1][name]) for name, values in weights[0].items())
    for name, values in weights[0].items():  # the seed is that of the adversary, too
        assert torch.equal(values, weights[2][name]), name
    with pytest.raises(UserError, match="scale_adversarial_loss is not an argument of scvi-tools' SemiSupervised"):
        Atlas.open(references["SCANVI"]).adapt(query, "batch", training={"arguments": {"scale_adversarial_loss": 0.0}})


def as_array(cells: ad.AnnData, _: Path) -> ad.AnnData:
    cells.uns["protein_names"] = np.array(PROTEINS, dtype=object)
    cells.obsm["protein_expression"] = cells.obsm["protein_expression"].to_numpy()
    return cells


def renamed(cells: ad.AnnData, folder: Path) -> Path:
    cells.obsm["ADT"] = cells.obsm.pop("protein_expression").add_suffix("_TotalSeqB")
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def as_features(cells: ad.AnnData, folder: Path) -> Path:
    """Proteins as columns next to those of the genes, before them."""
    proteins = cells.obsm["protein_expression"].to_numpy()
    kinds = ["Antibody Capture"] * len(PROTEINS) + ["Gene Expression"] * cells.n_vars
    var = pd.DataFrame({"feature_types": kinds}, index=[*PROTEINS, *cells.var_names])
    counts = sp.csr_matrix(sp.hstack([sp.csr_matrix(proteins), cells.X]))
    ad.AnnData(counts, obs=cells.obs, var=var).write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def test_proteins_in_any_place_train_the_same_model(
    references: dict[str, Path], query: ad.AnnData, tmp_path: Path
) -> None:
    atlas, training = Atlas.open(references["TOTALVI"]), TRAINING | {"max_epochs": 1}
    expected = atlas.adapt(query, "batch", training=training)
    for number, form in enumerate((as_array, renamed, as_features)):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = form(query.copy(), folder)
        found = atlas.adapt(source, "batch", training=training)
        for name, values in expected.model.module.state_dict().items():
            assert torch.equal(found.model.module.state_dict()[name], values), (form, name)
        assert np.array_equal(found.embed(source).obsm["X_scvi"], expected.embed(query).obsm["X_scvi"]), form


@pytest.mark.parametrize("kind", ["BatchNorm", "SCANVI", "TOTALVI"])
def test_the_time_is_estimated_from_steps_of_the_kind(
    kind: str, references: dict[str, Path], query: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SAMPLE_SECONDS", 0.05)
    reference, labels = Reference(*load_safe(references[kind])), list(query.obs["batch"])
    few, many = (
        surgery_seconds(reference, labels, [plan_surgery(reference, labels, "joint", settings)[0]], "cpu")
        for settings in (SurgeryTraining(max_epochs=1), SurgeryTraining(max_epochs=10_000))
    )
    assert 0.5 < few < 60
    assert 300 < many < 10_000  # two steps of 0.01 to 0.5 seconds, and 0.02 seconds for each epoch


def test_a_query_without_proteins(references: dict[str, Path], query: ad.AnnData, tmp_path: Path) -> None:
    cells = ad.AnnData(sp.csr_matrix(query.X), obs=query.obs, var=query.var)
    atlas = Atlas.open(references["TOTALVI"])
    with pytest.raises(UserError, match="has no proteins, and the model uses 12"):
        atlas.adapt(cells, "batch", training=TRAINING)
    adapted = atlas.adapt(cells, "batch", training=TRAINING, proteins="none")
    assert adapted.description is not None
    assert adapted.description.missing_proteins["a-sample"] == PROTEINS
    assert np.isfinite(adapted.embed(cells, proteins="none").obsm["X_scvi"]).all()
