"""Models that scvi-tools saved: imported from its pickles into the safe form, or refused with the reason.

`data/scvi-tools/make.py` made the models of earlier versions with these versions themselves.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from pipeline import ROOT

from census_scvi import Atlas, import_model, load_model
from census_scvi.cli import console, main
from census_scvi.errors import UserError
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import ModelDescription

VERSIONS = ("0.14.6", "0.20.3", "1.0.4", "1.1.6", "1.2.2", "1.3.3", "1.5.1")
SAME = 1e-5


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the models of earlier versions, and of their cells."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ROOT / "tests" / "data" / "scvi-tools" / "models.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def cells(earlier: Path) -> ad.AnnData:
    """90 cells of two donors, with labels and with proteins, one of which the second donor lacks."""
    return ad.read_h5ad(earlier / "cells.h5ad")


def for_imported(cells: ad.AnnData) -> ad.AnnData:
    """The cells with the names that models in the safe form have for batch, labels and proteins."""
    proteins = cells.obsm["protein"]
    return ad.AnnData(
        cells.X.copy(),
        obs=cells.obs.rename(columns={"donor": "batch", "type": "labels"}),
        var=cells.var,
        obsm={"protein_expression": proteins.to_numpy(np.float32)},
        uns={"protein_names": np.array(proteins.columns, dtype=object)},
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_of_an_earlier_version_gives_the_latent_of_that_version(
    version: str, earlier: Path, cells: ad.AnnData, tmp_path: Path
) -> None:
    computed = np.load(earlier / version / "latents.npz")
    for kind in ("SCVI", "SCANVI", "TOTALVI"):
        source, output = earlier / version / kind, tmp_path / kind
        if kind == "TOTALVI" and version < "1.3.1":
            with pytest.raises(UserError, match=f"TOTALVI of scvi-tools {version}: since 1.3.1 "):
                import_model(source, output, trust=True)
            assert not output.exists()
            continue
        description = import_model(source, output, trust=True)
        assert (description.genes, description.batches) == (cells.var_names.tolist(), ["d1", "d2"])
        assert (description.batch_key, description.model) == (["donor"], kind)
        labels = (description.labels, description.labels_key, description.unlabeled_category)
        assert labels == ((["B cell", "T cell"], "type", "unassigned") if kind == "SCANVI" else ([], "", ""))
        assert description.missing_proteins == ({"d2": ["CD19"]} if kind == "TOTALVI" else {})
        own = for_imported(cells)
        for model in (load_model(str(output)), getattr(scvi.model, kind).load(str(output), own, accelerator="cpu")):
            np.testing.assert_allclose(model.get_latent_representation(own), computed[kind], atol=SAME)
            if kind == "SCANVI":
                np.testing.assert_allclose(model.predict(own, soft=True), computed["predicted"], atol=SAME)


def trained(kind: str, cells: ad.AnnData, **arguments: Any) -> Any:
    """A model that the installed scvi-tools trained on the cells."""
    model_class = getattr(scvi.model, kind)
    of_kind = {
        "SCVI": {},
        "SCANVI": {"labels_key": "type", "unlabeled_category": "unassigned"},
        "TOTALVI": {"protein_expression_obsm_key": "protein"},
    }[kind]
    setup = {name: arguments.pop(name) for name in list(arguments) if name.endswith("_key")}
    scvi.settings.seed = 0
    model_class.setup_anndata(cells, **{"batch_key": "donor"} | of_kind | setup)
    model = model_class(cells, n_hidden=8, n_latent=3, **arguments)
    model.train(max_epochs=1, batch_size=45, accelerator="cpu", enable_progress_bar=False)
    return model


ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer norm": ("SCVI", {"use_layer_norm": "both", "use_batch_norm": "none", "encode_covariates": True}),
    "layer norm, no batch in the encoder": ("SCVI", {"use_layer_norm": "both", "use_batch_norm": "none"}),
    "counts without logarithm": ("SCVI", {"log_variational": False}),
    "batch only in the first layer": (
        "SCVI",
        {"deeply_inject_covariates": False, "encode_covariates": True, "n_layers": 2},
    ),
    "no norm": ("SCVI", {"use_batch_norm": "none", "n_layers": 2}),
    "logistic normal": ("SCVI", {"latent_distribution": "ln"}),
    "learned library size": ("SCVI", {"use_observed_lib_size": False, "dispersion": "gene-batch"}),
    "batch embedding": ("SCVI", {"batch_representation": "embedding", "encode_covariates": True}),
    "labels that SCVI does not use": ("SCVI", {"labels_key": "type", "gene_likelihood": "poisson"}),
    "linear classifier": ("SCANVI", {"linear_classifier": True, "dispersion": "gene-batch"}),
    "deep classifier": ("SCANVI", {"classifier_parameters": {"n_layers": 2, "n_hidden": 5}}),
    "totalVI, all proteins as measured": ("TOTALVI", {"override_missing_proteins": True, "n_layers_encoder": 1}),
    "totalVI, layer norm": ("TOTALVI", {"use_layer_norm": "both", "use_batch_norm": "none"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_are_kept_and_cells_are_embedded_alike(case: str, cells: ad.AnnData, tmp_path: Path) -> None:
    kind, arguments = ARGUMENTS[case]
    saved = trained(kind, cells.copy(), **arguments)
    saved.save(str(tmp_path / "saved"))
    description = import_model(tmp_path / "saved", tmp_path / "imported", trust=True)
    not_kept = {"labels_key", "override_missing_proteins"}
    assert {name: value for name, value in arguments.items() if name not in not_kept}.items() <= (
        description.arguments.items()
    )
    assert bool(description.missing_proteins) == (kind == "TOTALVI" and "override_missing_proteins" not in arguments)
    own = for_imported(cells)
    mean, variance = saved.get_latent_representation(return_dist=True)
    model = load_model(str(tmp_path / "imported"))
    again = getattr(scvi.model, kind).load(str(tmp_path / "imported"), own, accelerator="cpu")
    for each in (model, again):
        for found, expected in zip(
            each.get_latent_representation(own, return_dist=True), (mean, variance), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=SAME)
    codes = own.obs["batch"].cat.codes.to_numpy()
    latent = Encoder(model)(own.X, codes, *([own.obsm["protein_expression"]] if kind == "TOTALVI" else []))
    np.testing.assert_allclose(latent.mean, mean, atol=SAME)
    np.testing.assert_allclose(latent.variance, variance, atol=SAME)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_of_mudata_has_the_genes_of_its_counts(cells: ad.AnnData, tmp_path: Path) -> None:
    proteins = cells.obsm["protein"]
    adt = ad.AnnData(proteins.to_numpy(np.float32), obs=cells.obs, var=pd.DataFrame(index=proteins.columns))
    both = mudata.MuData({"adt": adt, "rna": ad.AnnData(cells.X.copy(), obs=cells.obs, var=cells.var)})
    modalities = {"rna_layer": "rna", "protein_layer": "adt", "batch_key": "rna"}
    scvi.model.TOTALVI.setup_mudata(both, rna_layer=None, protein_layer=None, batch_key="donor", modalities=modalities)
    saved = scvi.model.TOTALVI(both, n_latent=3, n_hidden=8)
    saved.module.eval()
    saved.is_trained_ = True
    for legacy in (False, True):
        saved.save(str(tmp_path / f"saved-{legacy}"), legacy_mudata_format=legacy)
        description = import_model(tmp_path / f"saved-{legacy}", tmp_path / f"imported-{legacy}", trust=True)
        assert description.genes == cells.var_names.tolist()
        assert (description.proteins, description.batches) == (proteins.columns.tolist(), ["d1", "d2"])
        found = load_model(str(tmp_path / f"imported-{legacy}")).get_latent_representation(for_imported(cells))
        np.testing.assert_allclose(found, saved.get_latent_representation(), atol=SAME)


def test_a_minified_model_and_one_without_a_batch(cells: ad.AnnData, tmp_path: Path) -> None:
    cells = cells.copy()
    cells.obs["donor"] = "the only one"
    saved = trained("SCVI", cells, batch_key=None)
    mean, variance = saved.get_latent_representation(return_dist=True)
    cells.obsm["X_latent_qzm"], cells.obsm["X_latent_qzv"] = mean, variance
    saved.minify_adata()
    saved.save(str(tmp_path / "saved"), save_anndata=True)
    description = import_model(tmp_path / "saved", tmp_path / "imported", trust=True)
    assert (description.batches, description.batch_key) == (["0"], [])
    own = for_imported(cells)
    own.obs["batch"] = "0"
    found = load_model(str(tmp_path / "imported")).get_latent_representation(own)
    np.testing.assert_allclose(found, mean, atol=SAME)


@pytest.fixture(scope="module")
def saved(earlier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SCVI model of scvi-tools 1.5.1."""
    return earlier / "1.5.1" / "SCVI"


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved model with changes in its dictionary."""
    content = torch.load(folder / "model.pt", weights_only=False)
    edit(content)
    target.mkdir()
    torch.save(content, target / "model.pt")
    return target


def registry(content: dict[str, Any]) -> dict[str, Any]:
    return content["attr_dict"]["registry_"]


def fields(content: dict[str, Any]) -> dict[str, Any]:
    return registry(content)["field_registries"]


def mapping(content: dict[str, Any], field: str, categories: list[Any]) -> None:
    fields(content)[field]["state_registry"]["categorical_mapping"] = np.array(categories, dtype=object)


def covariates(kind: str, number: int) -> Callable[[dict[str, Any]], Any]:
    return lambda content: fields(content)[kind]["summary_stats"].update({f"n_{kind}": number})


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "another class": (
        "SCVI",
        lambda content: registry(content).update(model_name="MULTIVI"),
        "its class is MULTIVI; expected SCVI, SCANVI, TOTALVI",
    ),
    "no registry": (
        "SCVI",
        lambda content: content["attr_dict"].pop("registry_"),
        "it has no registry, which names its genes and batches",
    ),
    "no scvi-tools": ("SCVI", lambda content: content.pop("var_names"), "its model.pt was not written by scvi-tools"),
    "data module": (
        "SCVI",
        lambda content: registry(content).update(setup_method_name="setup_datamodule"),
        "it was trained from a data module, and its registry does not name its genes",
    ),
    "categorical covariates": (
        "SCVI",
        covariates("extra_categorical_covs", 2),
        "it has 2 categorical covariates; expected only a batch",
    ),
    "continuous covariate": (
        "SCVI",
        covariates("extra_continuous_covs", 1),
        "it has 1 continuous covariate; expected only a batch",
    ),
    "size factor": (
        "SCVI",
        lambda content: fields(content)["size_factor"].update(data_registry={"attr_name": "obs", "attr_key": "s"}),
        "it gets a size factor of each cell (setup_anndata(size_factor_key=...)); expected only a batch",
    ),
    "panel": (
        "TOTALVI",
        lambda content: fields(content).update(panel={"data_registry": {"attr_name": "obs", "attr_key": "p"}}),
        "it gets a panel of proteins of each cell (setup_anndata(panel_key=...)); expected only a batch",
    ),
    "no batches": (
        "SCVI",
        lambda content: fields(content)["batch"]["state_registry"].clear(),
        "its registry does not list the batches",
    ),
    "batches of the same name": (
        "SCVI",
        lambda content: fields(content)["batch"]["state_registry"].update(
            categorical_mapping=np.array([1, "1"], object)
        ),
        "two of its batch categories have the same name as text",
    ),
    "genes not unique": (
        "SCVI",
        lambda content: content.update(var_names=np.array(["ENSG00000000001"] * 20)),
        "its genes are not unique: 'ENSG00000000001' is there 20 times",
    ),
    "genes without names": (
        "SCVI",
        lambda content: (content.update(var_names=[]), fields(content)["X"]["state_registry"].pop("column_names")),
        "it has 20 genes, and names of 0",
    ),
    "genes of two versions": (
        "SCVI",
        lambda content: content.update(var_names=np.array([f"ENSG{n // 2:011d}.{n}" for n in range(20)])),
        "its genes ENSG00000000000.0, ENSG00000000000.1 are all ENSG00000000000; each gene must be there once",
    ),
    "another organism": (
        "SCVI",
        lambda content: content.update(var_names=np.array([f"ENSMUSG{n:011d}" for n in range(20)])),
        "20 of its 20 genes are of mus_musculus, and the organism is homo_sapiens; set census.organism=mus_musculus",
    ),
    "no arguments": (
        "SCVI",
        lambda content: content["attr_dict"].pop("init_params_"),
        "it has no init arguments",
    ),
    "an argument of another version": (
        "SCVI",
        lambda content: content["attr_dict"]["init_params_"]["kwargs"].update(kwargs={"use_magic": True}),
        f"'use_magic' is not an argument of SCVI in scvi-tools {scvi.__version__}",
    ),
    "an argument that is code": (
        "SCVI",
        lambda content: content["attr_dict"]["init_params_"]["kwargs"].update(kwargs={"var_activation": torch.exp}),
        "its argument var_activation holds a Python object, which the safe form cannot store",
    ),
    "another likelihood": (
        "SCVI",
        lambda content: content["attr_dict"]["init_params_"]["non_kwargs"].update(gene_likelihood="normal"),
        "the argument gene_likelihood is 'normal': Input should be 'nb', 'zinb' or 'poisson'",
    ),
    "weights of another width": (
        "SCVI",
        lambda content: content["attr_dict"]["init_params_"]["non_kwargs"].update(n_hidden=9),
        "its weights are not those of a SCVI with 20 genes, 2 batches and these arguments (size mismatch for",
    ),
    "a missing weight": (
        "SCVI",
        lambda content: content["model_state_dict"].pop("px_r"),
        "its weights are not those of a SCVI with 20 genes, 2 batches and these arguments (Missing key(s) in"
        ' state_dict: "px_r".',
    ),
    "weights that are not numbers": (
        "SCVI",
        lambda content: content["model_state_dict"]["px_r"].fill_(np.nan),
        "px_r holds values that are not finite numbers",
    ),
    "no labels": (
        "SCANVI",
        lambda content: fields(content)["labels"]["state_registry"].update(
            categorical_mapping=np.array(["unassigned"])
        ),
        "its cells have no label other than the unlabelled category 'unassigned'",
    ),
    "the unlabelled category among the labels": (
        "SCANVI",
        lambda content: mapping(content, "labels", ["B cell", "unassigned", "T cell"]),
        "its registry does not have the labels with the unlabelled category 'unassigned' at the end",
    ),
    "proteins without names": (
        "TOTALVI",
        lambda content: fields(content)["proteins"]["state_registry"].pop("column_names"),
        "its registry has no names of proteins, or not unique ones",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_says_why(case: str, earlier: Path, tmp_path: Path) -> None:
    kind, edit, reason = REFUSED[case]
    folder = edited(earlier / "1.5.1" / kind, tmp_path / "saved", edit)
    with pytest.raises(UserError) as caught:
        import_model(folder, tmp_path / "imported", trust=True)
    assert str(caught.value).startswith(f"{folder} cannot be imported: {reason}")
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


def test_folders_without_a_readable_model(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.pt").write_bytes((saved / "model.pt").read_bytes()[:100])
    content = {"attr_dict": {}, "model_state_dict": {}, "var_names": pd.Series(["a"])}
    (tmp_path / "newer").mkdir()
    torch.save(content, tmp_path / "newer" / "model.pt")
    for name, reason in (
        ("empty", "it has no model.pt, and not model_params.pt, attr.pkl, var_names.csv of scvi-tools before 0.15"),
        ("damaged", "it cannot be unpickled here ("),
        ("newer", "it has no registry"),
    ):
        with pytest.raises(UserError, match="cannot be imported") as caught:
            import_model(tmp_path / name, tmp_path / "imported", trust=True)
        assert f"{tmp_path / name} cannot be imported: {reason}" in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere is not a folder; give the one in which model\.save"):
        import_model(tmp_path / "nowhere", tmp_path / "imported", trust=True)


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_no_pickle_is_loaded_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    torch.save({"attr_dict": _Bomb()}, "saved/model.pt")
    with pytest.raises(UserError) as caught:
        import_model("saved", "imported")
    assert str(caught.value) == (
        "saved has a pickle, and loading it executes any code that its author put into it; if you trust the author, set"
        " import_model.trust=true"
    )
    assert not Path("exploded").exists()


def test_symbols_get_their_ids(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["ENSG00000000001.3", "GENE2", "GENE3", *[f"OTHER{number}" for number in range(17)]]
    folder = edited(saved, tmp_path / "saved", lambda content: content.update(var_names=np.array(names)))
    table = [("ENSG00000000001", "GENE1"), ("ENSG00000000002", "GENE2"), ("ENSG00000000003", "GENE3")]
    pd.DataFrame(table, columns=["ensembl_id", "symbol"]).to_csv(tmp_path / "map.tsv", sep="\t", index=False)
    found = import_model(folder, tmp_path / "imported", trust=True, gene_map=tmp_path / "map.tsv")
    assert found.genes == ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003", *names[3:]]
    assert found.symbols == ["GENE1", "GENE2", "GENE3", *names[3:]]
    assert "17 of the model's 20 genes have no Ensembl id, such as OTHER0, OTHER1, OTHER2" in caplog.text
    plain = import_model(folder, tmp_path / "plain", trust=True)
    assert (plain.genes, plain.symbols) == (["ENSG00000000001", *names[1:]], [])
    for title, rows, reason in (
        ("elsewhere", [("ENSG00000000009", "GENE9")], "none of its genes, such as"),
        ("twice", [("ENSG00000000001", "GENE2")], r"its genes ENSG00000000001.3, GENE2 are all ENSG00000000001"),
    ):
        pd.DataFrame(rows, columns=["ensembl_id", "symbol"]).to_csv(tmp_path / f"{title}.tsv", sep="\t", index=False)
        with pytest.raises(UserError, match=f"cannot be imported: {reason}"):
            import_model(folder, tmp_path / title, trust=True, gene_map=tmp_path / f"{title}.tsv")


def command(config: Path, **settings: Any) -> list[str]:
    """Arguments of the command with a config file of these settings."""
    config.write_text(json.dumps({"import_model": {name: str(value) for name, value in settings.items()}}))
    return ["--config", str(config)]


def test_the_command(
    earlier: Path, saved: Path, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, config = tmp_path / "imported", tmp_path / "import.yaml"
    argv = command(config, folder=earlier / "1.3.3" / "TOTALVI", output=output)
    assert main("import-model", argv) == 2
    assert "set import_model.trust=true" in capsys.readouterr().err
    assert main("import-model", [*argv, "import_model.trust=true", "--dry-run"]) == 0
    assert f"and write the model to {output}/" in capsys.readouterr().out
    assert not output.exists()
    assert console(["import-model", *argv, "import_model.trust=true"]) == 0
    assert f"{output}: totalVI of homo_sapiens, 20 genes, 2 batches, 4 proteins\n" == capsys.readouterr().out
    argv = [*command(config, folder=saved, output=output), "import_model.trust=true"]
    assert main("import-model", argv) == 2
    assert f"{output} exists; choose another import_model.output, or replace it with --force" in capsys.readouterr().err
    assert main("import-model", [*argv, "--force"]) == 0
    assert type(load_model(str(output))) is scvi.model.SCVI
    (tmp_path / "notes").mkdir()
    for settings, said in (
        ({}, "import_model.output is not set; give a folder"),
        ({"output": tmp_path / "notes"}, "is not a model: it is not replaced"),
        ({"output": saved.parent}, "would replace"),
    ):
        argv = command(config, folder=saved, **settings)
        assert main("import-model", [*argv, "import_model.trust=true", "--force"]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["import.yaml", "imported", "notes"]


def test_own_cells_are_embedded_with_an_imported_model(earlier: Path, cells: ad.AnnData, tmp_path: Path) -> None:
    import_model(earlier / "1.0.4" / "SCANVI", tmp_path / "imported", trust=True)
    with pytest.raises(
        UserError, match=r"SCANVI has the model only as scvi-tools' own file, a pickle; .* import it once"
    ):
        Atlas.open(earlier / "1.0.4" / "SCANVI")
    with Atlas.open(tmp_path / "imported") as atlas:
        assert isinstance(atlas.description, ModelDescription)
        found = atlas.embed(cells)
        predicted = atlas.predict(cells, "type", method="model").obs["type_probability"]
    computed = np.load(earlier / "1.0.4" / "latents.npz")
    np.testing.assert_allclose(found.obsm["X_scvi"], computed["SCANVI"], atol=SAME)
    np.testing.assert_allclose(predicted, computed["predicted"].max(axis=1), atol=SAME)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_an_imported_model_is_adapted_and_names_types(cells: ad.AnnData, tmp_path: Path) -> None:
    surgery = {"encode_covariates": True, "use_layer_norm": "both", "use_batch_norm": "none"}
    trained("SCANVI", cells.copy(), **surgery).save(str(tmp_path / "saved"))
    import_model(tmp_path / "saved", tmp_path / "imported", trust=True)
    query = ad.AnnData(cells.X, obs=pd.DataFrame({"sample": "new"}, index=cells.obs_names), var=cells.var)
    with Atlas.open(tmp_path / "imported") as atlas:
        adapted = atlas.adapt(
            query, "sample", training={"max_epochs": 2}, folder=tmp_path / "adapted", accelerator="cpu"
        )
        embedded = adapted.embed(query)
        found = adapted.predict(query, "type", method="model")
    model = load_model(str(tmp_path / "adapted"))
    query.obs["batch"], query.obs["labels"] = query.obs["sample"], "unassigned"
    np.testing.assert_allclose(embedded.obsm["X_scvi"], model.get_latent_representation(query), atol=SAME)
    expected = model.predict(query, soft=True)
    assert found.obs["type_best"].tolist() == expected.idxmax(axis=1).tolist()
    np.testing.assert_allclose(found.obs["type_probability"], expected.max(axis=1), atol=SAME)
