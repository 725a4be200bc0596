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
import yaml
from pipeline import Run
from test_hostile_folders import REFUSALS, edit_model, has_kind

import census_scvi
from census_scvi.atlas import Atlas
from census_scvi.errors import UserError
from census_scvi.model.build import build_model, init_arguments
from census_scvi.model.families import FAMILIES, SCVI
from census_scvi.model.safe import load_safe
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


def test_a_pickle_of_another_kind_is_refused(tmp_path: Path) -> None:
    labels = pd.DataFrame({"label": pd.Categorical(["a", "b"] * 5)}, index=[str(i) for i in range(10)])
    cells = ad.AnnData(sp.csr_matrix(np.ones((10, 3), np.float32)), obs=labels)
    scvi.model.SCANVI.setup_anndata(cells, labels_key="label", unlabeled_category="unknown")
    scvi.model.SCANVI(cells).save(str(tmp_path / "model"))
    with pytest.raises(UserError) as caught:
        census_scvi.load_model(str(tmp_path / "model"), trust=True)
    assert str(caught.value) == f"{tmp_path / 'model'} {REFUSALS['SCANVI']}"


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
    taken = {*inspect.signature(family.model_class).parameters, *inspect.signature(family.module_class).parameters}
    taken |= set(inspect.signature(scvi.module.VAE).parameters) if kind == "SCANVI" else set()  # passed on
    assert family.arguments <= taken
    setup = inspect.signature(family.model_class.setup_anndata).parameters
    required = {
        name for name, each in setup.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    assert {*family.cell_data, "adata"} == required


def test_what_is_built_is_what_the_table_says() -> None:
    family = FAMILIES[SCVI]
    arguments = init_arguments(ModelSection())
    model = build_model(["a", "b"], ["x"], arguments)
    assert (type(model), type(model.module)) == (family.model_class, family.module_class)
    assert arguments.keys() == family.arguments
    with pytest.raises(
        UserError, match="this is a TOTALVI model, which this version does not support yet; expected SCVI"
    ):
        build_model(["a"], ["x"], arguments, kind="TOTALVI")
