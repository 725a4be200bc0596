"""Kinds of models: one table; what cannot be built yet is refused by name wherever a model is read."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
import yaml
from pipeline import Run
from test_hostile_folders import REFUSALS, edit_model, has_kind

import census_scvi
from census_scvi.atlas import Atlas
from census_scvi.errors import UserError
from census_scvi.model.build import init_arguments, known_arguments
from census_scvi.model.facts import built_facts
from census_scvi.model.families import FAMILIES, SCVI
from census_scvi.model.safe import ModelDescription, load_safe, save_safe
from census_scvi.model.settings import ModelSection
from census_scvi.workspace.identity import identities


@pytest.fixture(scope="module", params=sorted(REFUSALS))
def run_of_kind(request: pytest.FixtureRequest, finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run directory whose train stage wrote a model of another kind."""
    run = Run.given(
        tmp_path_factory.mktemp("run"), yaml.safe_load(finished_run.config.read_text()), finished_run.directory
    )
    edit_model(run.path("scvi.model"), has_kind(request.param))
    manifest = run.manifest()
    manifest["stages"]["train"]["outputs"] |= identities(run.directory, ["scvi.model/model.json"])
    run.path("manifest.json").write_text(json.dumps(manifest))
    return run, REFUSALS[request.param]


def test_a_run_directory_with_another_kind_is_refused(
    run_of_kind: tuple[Run, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = run_of_kind
    model = run.path("scvi.model")
    for read in (
        lambda: load_safe(model),
        lambda: census_scvi.load_model(str(model)),
        lambda: census_scvi.load_model(str(run.directory)),
        lambda: Atlas.open(run.directory),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == f"{model} {words}"
    for stage in ("create-latent-update", "publish"):
        assert run(stage, "--force") == 2
        assert f"{model} {words}" in capsys.readouterr().err


def test_a_pickle_of_another_kind_is_loaded_as_that_kind(tmp_path: Path) -> None:
    labels = pd.DataFrame({"label": pd.Categorical(["a", "b"] * 5)}, index=[str(i) for i in range(10)])
    cells = ad.AnnData(sp.csr_matrix(np.ones((10, 3), np.float32)), obs=labels)
    scvi.model.SCANVI.setup_anndata(cells, labels_key="label", unlabeled_category="unknown")
    scvi.model.SCANVI(cells).save(str(tmp_path / "model"), save_anndata=True)
    assert type(census_scvi.load_model(str(tmp_path / "model"), trust=True)) is scvi.model.SCANVI


def test_a_model_without_a_kind_is_scvi(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path("scvi.model"), tmp_path / "model")
    edit_model(tmp_path / "model", lambda values: values.pop("model") and None)
    model, description = load_safe(tmp_path / "model")
    assert (type(model), description.model) == (scvi.model.SCVI, SCVI)
    edit_model(tmp_path / "model", lambda values: values.update(model=["SCVI"]))
    with pytest.raises(UserError, match=r"model.json is damaged \(model is \['SCVI'\]"):
        load_safe(tmp_path / "model")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_table_is_what_scvi_tools_has(kind: str) -> None:
    family = FAMILIES[kind]
    assert family.model_class._module_cls is family.module_class
    assert family.model_class._training_plan_cls is family.plan_class
    assert family.settings.keys() <= known_arguments(kind)
    assert set(family.settings.values()) <= ModelSection.model_fields.keys()
    if family.latent_keys:
        assert family.latent_keys == (family.model_class._LATENT_QZM_KEY, family.model_class._LATENT_QZV_KEY)
    train = inspect.signature(family.model_class.train).parameters
    plan = inspect.signature(family.plan_class).parameters
    own = {n: each.default for n, each in train.items() if n in plan and each.default != plan[n].default}
    assert dict(family.plan_defaults) == {name: value for name, value in own.items() if value is not None}
    setup = inspect.signature(family.model_class.setup_anndata).parameters
    required = {
        name for name, each in setup.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    assert {*family.cell_data, "adata"} == required


def described(kind: str, **changes: Any) -> ModelDescription:
    """A small model of a kind: SCANVI with three labels, TOTALVI with twelve proteins, one of them missing."""
    settings = ModelSection.model_validate(
        {"kind": kind, "n_hidden": 8, "n_latent": 3, "arguments": {"use_layer_norm": "both"}}
    )
    inputs: dict[str, dict[str, Any]] = {
        "SCANVI": {"labels": ["B", "NK", "T"], "labels_key": "cell_type", "unlabeled_category": "unknown"},
        "TOTALVI": {"proteins": [f"p{i}" for i in range(12)], "missing_proteins": {"y": ["p3"]}},
    }
    return ModelDescription(
        genes=["a", "b", "c"],
        batches=["x", "y"],
        arguments=init_arguments(settings),
        organism="homo_sapiens",
        batch_key=["donor_id"],
        n_cells=100,
        model=kind,
        **inputs.get(kind, {}) | changes,
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_survives_its_safe_form(kind: str, tmp_path: Path) -> None:
    description = described(kind)
    built = description.build()
    save_safe(built, description, tmp_path)
    loaded, read = load_safe(tmp_path)
    assert read == description
    assert (type(loaded).__name__, type(loaded.module)) == (kind, FAMILIES[kind].module_class)
    weights = built.module.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.module.state_dict().items())
    assert built_facts(loaded, description.genes) == built_facts(built, description.genes)
    assert loaded.adata_manager.registry["setup_args"] == built.adata_manager.registry["setup_args"]


def test_scanvi_has_the_labels_in_their_order_and_totalvi_the_missing_proteins() -> None:
    scanvi = described("SCANVI").build()
    mapping = scanvi.adata_manager.get_state_registry("labels")
    assert list(mapping.categorical_mapping) == ["B", "NK", "T", "unknown"]
    assert (scanvi.module.n_labels, mapping.unlabeled_category) == (3, "unknown")
    totalvi = described("TOTALVI").build()
    mask = totalvi.module.protein_batch_mask
    assert {batch: list(np.flatnonzero(~measured)) for batch, measured in mask.items()} == {"0": [], "1": [3]}
    complete = described("TOTALVI", missing_proteins={}).build()
    assert complete.module.protein_batch_mask is None
    assert list(totalvi.adata_manager.get_state_registry("proteins").column_names) == described("TOTALVI").proteins


WRONG_DESCRIPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("SCANVI", {"labels": []}, "a model of kind SCANVI without labels"),
    ("SCANVI", {"labels": ["a", "a"]}, "labels are not unique"),
    ("SCVI", {"proteins": ["p"]}, "a model of kind SCVI with proteins"),
    ("TOTALVI", {"proteins": []}, "a model of kind TOTALVI without proteins"),
    ("TOTALVI", {"arguments": {"n_hidden": 8}}, "its arguments lack dropout_rate_decoder"),
    ("SCVI", {"more": {"use_layer_norms": "both"}}, "'use_layer_norms' is not an argument of SCVI in scvi-tools"),
    ("SCVI", {"more": {"batch_embedding_kwargs": {"embedding_dim": 10**9}}}, "the number 1,000,000,000, expected"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), WRONG_DESCRIPTIONS)
def test_a_wrong_description_is_damaged(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    description = described(kind)
    save_safe(description.build(), description, tmp_path)
    arguments = description.arguments | changes.get("more", {})
    values = {"arguments": arguments} | {name: value for name, value in changes.items() if name != "more"}
    edit_model(tmp_path, lambda found: found.update(values))
    with pytest.raises(UserError, match=r"model\.json is damaged") as caught:
        load_safe(tmp_path)
    assert words in str(caught.value)
