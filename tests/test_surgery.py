"""Surgery: scvi-tools' extension of a model, trained by this project; the reference does not move."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import lightning
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from scvi.train import Trainer, TrainingPlan

from census_scvi import Atlas
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.errors import UserError
from census_scvi.model.build import init_arguments, quiet, without_training
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import ModelDescription, load_safe, save_safe, weights_digest
from census_scvi.model.typical import TypicalCells
from census_scvi.query.batches import required_batches
from census_scvi.query.mapping import Mapper
from census_scvi.query.surgery.adapt import Reference, adapt
from census_scvi.query.surgery.adapted import Adapted
from census_scvi.query.surgery.cells import TrainingCells, write_training_cells
from census_scvi.query.surgery.movement import movement, reference_sample, require_unmoved
from census_scvi.query.surgery.requirements import no_effect, require_extendable
from census_scvi.query.surgery.settings import SurgeryTraining
from census_scvi.query.surgery.train import extend_for_training
from census_scvi.settings import load_config
from census_scvi.training.callbacks import TrainMode

GENES = [f"ENSG{number:011d}" for number in range(50)]
LAYER_NORM = {"use_layer_norm": "both", "use_batch_norm": "none"}
ARGUMENTS = {
    "n_hidden": 16,
    "n_latent": 4,
    "n_layers": 1,
    "dropout_rate": 0.1,
    "gene_likelihood": "nb",
    "encode_covariates": True,
}


def generated(batches: dict[str, int], seed: int) -> ad.AnnData:
    """Cells of four types in batches whose genes have different capture rates."""
    numbers = np.random.default_rng(7)
    types = numbers.gamma(0.5, 2.0, (4, len(GENES)))
    numbers = np.random.default_rng(seed)
    counts, obs = [], []
    for label, size in batches.items():
        kind = numbers.integers(4, size=size)
        rates = types[kind] * np.exp(numbers.normal(0, 0.7, len(GENES)))
        counts.append(numbers.poisson(rates).astype(np.float32))
        obs += [{"batch": label, "cell_type": f"type {number}"} for number in kind]
    table = pd.DataFrame(obs, index=[f"cell-{number}" for number in range(len(obs))])
    return ad.AnnData(sp.csr_matrix(np.concatenate(counts)), obs=table, var=pd.DataFrame(index=GENES))


def trained_reference(folder: Path, cells: ad.AnnData, **arguments: Any) -> Path:
    """The safe form of a model that plain scvi-tools trained."""
    arguments = ARGUMENTS | LAYER_NORM | arguments
    scvi.settings.seed = 0
    cells = cells.copy()
    with quiet("scvi"), quiet("lightning.pytorch"):
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, **arguments)
        model.train(max_epochs=3, logger=False, enable_progress_bar=False, accelerator="cpu")
    folder.mkdir()
    batches = sorted(cells.obs["batch"].unique())
    save_safe(model, ModelDescription(GENES, batches, arguments, "homo_sapiens", ["batch"], cells.n_obs), folder)
    return folder


@pytest.fixture(scope="module")
def reference_cells() -> ad.AnnData:
    return generated({"first": 120, "second": 120}, seed=1)


@pytest.fixture(scope="module")
def query() -> ad.AnnData:
    return generated({"z-sample": 90, "a-sample": 60}, seed=2)


@pytest.fixture(scope="module")
def reference(reference_cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_reference(tmp_path_factory.mktemp("reference") / "model", reference_cells)


@pytest.fixture(scope="module")
def with_batch_norm(reference_cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scvi-tools' own defaults: BatchNorm in encoder and decoder."""
    folder = tmp_path_factory.mktemp("batch-norm") / "model"
    return trained_reference(folder, reference_cells, use_layer_norm="none", use_batch_norm="both")


def adapted_to(model: Path, cells: ad.AnnData, mode: str, work: Path, **training: Any) -> Adapted:
    """What `Atlas.adapt` does, with its working folder at hand."""
    loaded, description = load_safe(model)
    settings = SurgeryTraining.of(mode, {"max_epochs": 3, "batch_size": 32, "lr": 1e-2} | training)
    with Mapper(loaded, description).align(cells) as aligned:
        return adapt(Reference(loaded, description), aligned, ["batch"], mode, settings, work, seed=0)


def weights(model: scvi.model.SCVI) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def test_the_training_is_that_of_scvi_tools(reference: Path, query: ad.AnnData, tmp_path: Path) -> None:
    """Extension and plan of scvi-tools, in training mode, on the same minibatches give the same weights."""
    model, description = load_safe(reference)
    ours = weights(adapted_to(reference, query, "joint", tmp_path / "work").models[0][0])
    part = TrainingCells(["a-sample", "z-sample"], ["first", "second", "a-sample", "z-sample"], tmp_path / "cells.h5ad")
    with Mapper(model, description).align(query) as aligned:
        write_training_cells(aligned, query.obs["batch"].to_numpy(), description, [part])
    cells = ad.AnnData(
        sp.csr_matrix((8, len(GENES)), dtype=np.float32),
        obs=pd.DataFrame({"batch": ["first", "second", "a-sample", "z-sample"] * 2}, index=list("abcdefgh")),
        var=pd.DataFrame(index=GENES),
    )
    torch.manual_seed(0)
    np.random.seed(0)
    with without_training():
        theirs = scvi.model.SCVI.load_query_data(cells, model, accelerator="cpu")
    random = weights(theirs)
    data = PreparedDataModule(part.file, batch_size=32, train_size=1.0, seed=0, workers=0)
    plan = TrainingPlan(theirs.module, lr=1e-2, weight_decay=0.0)
    plan.n_obs_training, plan.n_obs_validation = data.n_train, 0
    with quiet("lightning.pytorch"):
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            devices=1,
            callbacks=[TrainMode()],
            logger=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        lightning.seed_everything(0, verbose=False)
        trainer.fit(plan, data)
    for name, values in weights(theirs).items():
        np.testing.assert_allclose(ours[name], values, atol=2e-6, err_msg=name)
    first = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
    assert float((ours[first][:, -2:] - random[first][:, -2:]).abs().max()) > 1e-3
    assert torch.equal(ours[first][:, :-2], random[first][:, :-2])


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("mode", ["joint", "per_batch", "sequential"])
def test_the_reference_does_not_move_and_the_query_does(
    mode: str,
    norm: str,
    reference: Path,
    with_batch_norm: Path,
    reference_cells: ad.AnnData,
    query: ad.AnnData,
    tmp_path: Path,
) -> None:
    """Every saved model is one that plain scvi-tools loads, with the same latent for reference and query."""
    place = reference if norm == "layer" else with_batch_norm
    adapted = adapted_to(place, query, mode, tmp_path / "work")
    if norm == "batch" and mode != "joint":
        assert "BatchNorm subtracts what the weights of the batch add" in adapted.reason
        assert not adapted.models
        return
    assert len(adapted.models) == (2 if mode == "per_batch" else 1)
    adapted.save(tmp_path / "saved")
    before, description = load_safe(place)
    both = ad.concat([reference_cells, query], index_unique="-")
    latent = adapted.encoder(both.obs)(0, sp.csr_matrix(both.X))
    codes = pd.Index(description.batches).get_indexer(reference_cells.obs["batch"])
    unmoved = Mapper(before, description)._encode(sp.csr_matrix(reference_cells.X), codes).mean
    np.testing.assert_allclose(latent[: len(unmoved)], unmoved, rtol=0, atol=1e-6)
    spread = unmoved.std()
    extension = replace(description, batches=[*description.batches, "a-sample", "z-sample"])
    untrained = extend_for_training(before, extension, seed=0)
    with without_training():
        raw = scvi.model.SCVI.load_query_data(query.copy(), untrained)
        raw.is_trained = True
        assert np.abs(raw.get_latent_representation() - latent[len(unmoved) :]).max() > 0.01 * spread
    folders = [tmp_path / "saved"] if mode != "per_batch" else sorted((tmp_path / "saved").glob("batch-*"))
    for folder, batches in zip(folders, [["z-sample"], ["a-sample"]] if len(folders) > 1 else [None], strict=True):
        rows = np.isin(both.obs["batch"], [*description.batches, *(batches or ["a-sample", "z-sample"])])
        chosen = both[rows].copy()
        with quiet("scvi"):
            plain = scvi.model.SCVI.load(str(folder), adata=chosen, accelerator="cpu")
        np.testing.assert_allclose(plain.get_latent_representation(), latent[rows], atol=1e-6)
        for name, values in weights(before).items():
            kept = plain.module.state_dict()[name][tuple(slice(size) for size in values.shape)]
            if norm == "layer" or (("decoder" not in name or ".1." not in name) and "num_batches" not in name):
                assert torch.equal(kept, values), name
    again = Adapted.open(tmp_path / "saved")
    assert np.array_equal(again.encoder(both.obs)(0, sp.csr_matrix(both.X)), latent)
    lineage = again.models[-1][1].lineage
    assert [record["batches"] for record in lineage] == {
        "joint": [["z-sample", "a-sample"]],
        "per_batch": [["a-sample"]],
        "sequential": [["z-sample"], ["a-sample"]],
    }[mode]
    for record in lineage:
        assert record["moved"]["latent"] <= 1e-6
        assert len(record["reference"]) == len(record["query"]["sha256"]) == 64
        assert (record["mode"], record["epochs"], record["query"]["cells"]) == (mode, 3, 150)
        assert bool(record["moved"]["changed"]) == (norm == "batch")  # the decoder's BatchNorm follows the query
    assert again.models[0][1].batches[:2] == ["first", "second"]


def test_queries_are_trained_in_training_mode(reference: Path, query: ad.AnnData, tmp_path: Path) -> None:
    """In evaluation mode, in which scvi-tools leaves a loaded model, dropout would change nothing."""
    trained = [
        weights(
            adapted_to(reference, query, "joint", tmp_path / str(freeze), arguments={"freeze_dropout": freeze}).models[
                0
            ][0]
        )
        for freeze in (False, True, False)
    ]
    name = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
    assert float((trained[0][name] - trained[1][name]).abs().max()) > 1e-5
    assert all(torch.equal(values, trained[2][name]) for name, values in trained[0].items())


def test_sequential_adds_the_batches_in_the_given_order(reference: Path, query: ad.AnnData, tmp_path: Path) -> None:
    adapted = adapted_to(reference, query, "sequential", tmp_path / "work", order=["a-sample", "z-sample"])
    assert adapted.models[0][1].batches == ["first", "second", "a-sample", "z-sample"]
    with pytest.raises(UserError, match=r"order is .'a-sample'., and the batches of the query are"):
        adapted_to(reference, query, "sequential", tmp_path / "work", order=["a-sample"])
    with pytest.raises(UserError, match="order is only used by mode sequential, and the mode is joint"):
        adapted_to(reference, query, "joint", tmp_path / "work", order=["a-sample"])


def test_many_batches_and_small_ones(reference: Path, tmp_path: Path) -> None:
    cells = generated({f"donor-{number:02}": 20 for number in range(30)}, seed=3)
    adapted = adapted_to(reference, cells, "joint", tmp_path / "many", max_epochs=1, batch_size=128)
    assert adapted.models[0][1].batches == ["first", "second", *(f"donor-{number:02}" for number in range(30))]
    assert adapted.facts["trainings"][0]["steps"] == 5
    alone = generated({"one": 20}, seed=4)
    assert len(adapted_to(reference, alone, "per_batch", tmp_path / "one").models) == 1
    with_single = generated({"one": 20, "single": 1}, seed=4)
    assert adapted_to(reference, with_single, "joint", tmp_path / "single").models[0][1].batches[2:] == [
        "one",
        "single",
    ]
    with pytest.raises(UserError, match="batch 'single' has 1 cell with counts in the model's genes, and training"):
        adapted_to(reference, with_single, "per_batch", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    empty = with_single.copy()
    empty.X = sp.csr_matrix(empty.X.toarray() * (empty.obs["batch"] != "single").to_numpy()[:, None])
    with pytest.raises(UserError, match="batch 'single' has 0 cells with counts in the model's genes, and training"):
        adapted_to(reference, empty, "joint", tmp_path / "refused")


def test_any_names_of_batches(reference: Path, tmp_path: Path) -> None:
    """Names that no file can have, that differ in white space only, and the empty one."""
    sizes = {"a/b": 12, "../ä": 6, "": 8, "batch 1 ": 10, "batch 1": 9}
    cells = generated(sizes, seed=6)
    adapted = adapted_to(reference, cells, "per_batch", tmp_path / "work", max_epochs=1)
    adapted.save(tmp_path / "saved")
    again = Adapted.open(tmp_path / "saved")
    assert [description.batches[2:] for _, description in again.models] == [[name] for name in sizes]
    assert [each["cells"] for each in again.facts["trainings"]] == list(sizes.values())
    assert np.unique(again.places(cells.obs)[:, 0], return_counts=True)[1].tolist() == list(sizes.values())
    assert {path.name for path in tmp_path.iterdir()} == {"work", "saved"}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 2, 1], ["1", "2", "1"]),
        ([0.5, 2.0, 2.0], ["0.5", "2.0", "2.0"]),
        ([True, False, True], ["True", "False", "True"]),
        (pd.Categorical(["b", "a", "b"], categories=["a", "b", "unused"]), ["b", "a", "b"]),
    ],
)
def test_any_type_of_a_batch_column(values: Any, labels: list[str]) -> None:
    obs = pd.DataFrame({"sample": values, "lane": ["x|y", "x", "x"]})
    assert required_batches(obs, ["sample"], "batch_key").tolist() == labels
    expected = [f"{label}|{lane}" for label, lane in zip(labels, [r"x\|y", "x", "x"], strict=True)]
    assert required_batches(obs, ["sample", "lane"], "batch_key").tolist() == expected
    with pytest.raises(UserError, match="obs has no column, as 10x files: write the cells"):
        required_batches(obs[[]], ["sample"], "batch_key")


@pytest.mark.slow
def test_a_model_for_each_of_thirty_batches(reference: Path, tmp_path: Path) -> None:
    cells = generated({f"donor-{number:02}": 20 for number in range(30)}, seed=3)
    adapted = adapted_to(reference, cells, "per_batch", tmp_path / "work", max_epochs=1)
    adapted.save(tmp_path / "saved")
    latent = Adapted.open(tmp_path / "saved").encoder(cells.obs)(0, sp.csr_matrix(cells.X))
    for number, (model, description) in enumerate(adapted.models):
        assert description.batches == ["first", "second", f"donor-{number:02}"]
        rows = slice(20 * number, 20 * number + 20)
        assert np.array_equal(Encoder(model)(sp.csr_matrix(cells.X[rows]), np.full(20, 2)).mean, latent[rows])


def test_a_batch_without_training_cells_is_refused(reference: Path, tmp_path: Path) -> None:
    cells = generated({f"donor-{number:02}": 2 for number in range(10)}, seed=5)
    with pytest.raises(UserError, match=r"batch 'donor-\d\d' has so few cells that all are for validation; set query"):
        adapted_to(reference, cells, "joint", tmp_path / "work", train_size=0.3)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "name": ({}, {"second": 20, "new": 20}, "'second' is a batch of the query and of the reference: training would"),
    "one batch": ({"batches": {"only": 60}}, {"new": 20}, "the reference has one batch, and scvi-tools gives such a"),
    "embedding": (
        {"batch_representation": "embedding"},
        {"new": 20},
        "the reference has batch_representation: embedding: scvi-tools draws the embedding of a new batch at random",
    ),
    "dispersion": ({"dispersion": "gene-batch"}, {"new": 20}, "the reference has dispersion: gene-batch: scvi-tools"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reference_that_cannot_be_extended(name: str, tmp_path: Path) -> None:
    arguments, batches, message = REFUSED[name]
    arguments = dict(arguments)
    cells = generated(arguments.pop("batches", {"first": 40, "second": 40}), seed=1)
    model = trained_reference(tmp_path / "model", cells, **arguments)
    with pytest.raises(UserError, match=re.escape(message)):
        require_extendable(*load_safe(model), list(batches))


def test_a_shared_covariate_is_refused(reference: Path, reference_cells: ad.AnnData, query: ad.AnnData) -> None:
    cells = reference_cells.copy()
    cells.obs["sex"] = np.resize(["f", "m"], cells.n_obs)
    with quiet("scvi"):
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch", categorical_covariate_keys=["sex"])
        model = scvi.model.SCVI(cells, **ARGUMENTS)
    with pytest.raises(UserError, match="categorical covariates \\('sex'\\), whose weights the query's cells would"):
        require_extendable(model, load_safe(reference)[1], ["new"])


def test_an_encoder_without_the_batch_is_not_trained(
    reference_cells: ad.AnnData, query: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blind = {"encode_covariates": False, "use_layer_norm": "none", "use_batch_norm": "both"}
    model = trained_reference(tmp_path / "model", reference_cells, **blind)
    atlas = Atlas.open(model)
    with caplog.at_level(logging.WARNING):
        adapted = atlas.adapt(query, "batch", folder=tmp_path / "saved")
    assert "query.surgery: joint is not done: the encoder of this model does not use the batch" in caplog.text
    assert not (tmp_path / "saved").exists()
    assert np.array_equal(adapted.embed(query).obsm["X_scvi"], atlas.embed(query).obsm["X_scvi"])
    assert adapted.surgery is not None
    assert "does not use the batch" in adapted.surgery["reason"]


def test_a_model_that_moved_is_refused(reference: Path, reference_cells: ad.AnnData, query: ad.AnnData) -> None:
    """Each way in which scvi-tools lets the reference move, as plain scvi-tools does it."""
    model, description = load_safe(reference)
    cells = TypicalCells(sp.csr_matrix(reference_cells.X), reference_cells.obs["batch"].to_numpy(dtype=object))
    with Mapper(model, description).align(query) as aligned:
        sample = reference_sample(cells, description, aligned)
    for options, plan in (({"unfrozen": True}, {}), ({}, {"weight_decay": 1.0}), ({"freeze_expression": False}, {})):
        with without_training(), quiet("lightning.pytorch"):
            moved = scvi.model.SCVI.load_query_data(query.copy(), model, **options)
            moved.train(max_epochs=2, plan_kwargs={"lr": 1e-2, **plan}, logger=False, enable_progress_bar=False)
        found = movement(model, moved, sample)
        assert found.latent > 1e-4
        with pytest.raises(UserError) as caught:
            require_unmoved(found)
        assert "surgery moved the reference: the latent of 240 cells of the reference differs by up to" in str(
            caught.value
        )
        assert "a weight decay, an unfrozen layer" in str(caught.value)
    require_unmoved(movement(model, model, sample))


def test_a_loss_that_is_not_finite(reference: Path, query: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        adapted_to(reference, query, "joint", tmp_path / "work", lr=1e30)
    text = str(caught.value)
    assert re.match(r"the loss is (nan|inf|.* but its gradients are not finite)", text), text
    assert "lower query.surgery_training.lr" in text
    assert "\n" not in text
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["query.surgery=joint"], "query.surgery is joint, which needs the batches of your cells: set query.batch_key"),
        (
            ["query.surgery=joint", "query.batch_key=[s]", "query.surgery_training.order=[a]"],
            "query.surgery_training.order is only used by query.surgery: sequential and compare, and it is joint",
        ),
        (
            ["query.surgery=both"],
            "query.surgery is 'both': should be 'none', 'joint', 'per_batch', 'sequential' or 'compare'",
        ),
        (
            ["query.surgery_training.arguments={weight_decay: 1.0e-6}"],
            "arguments.weight_decay is 1e-06, which shrinks the weights of the reference in every step: its cells",
        ),
        (
            ["query.surgery_training.arguments={unfrozen: true}"],
            "arguments.unfrozen is true, which trains weights of the reference: its cells would move; remove it",
        ),
        (
            ["query.surgery_training.arguments={freeze_expression: false}"],
            "arguments.freeze_expression is false, which",
        ),
        (["query.surgery_training.arguments={freeze_dropout: 1}"], "freeze_dropout is 1, expected true or false"),
        (["query.surgery_training.arguments={lr: 0.1}"], "cannot be set here; set query.surgery_training.lr"),
        (
            ["query.surgery_training.arguments={n_epoch_kl_warmup: 3}"],
            "query.surgery_training.arguments.n_epoch_kl_warmup is not an argument of scvi-tools' TrainingPlan;"
            " did you mean n_epochs_kl_warmup?",
        ),
        (
            ["query.surgery_training.arguments={early_stopping_patients: 3}"],
            "arguments.early_stopping_patients is not an argument of Lightning's Trainer; did you mean"
            " early_stopping_patience?",
        ),
        (
            ["query.surgery_training.early_stopping=true", "query.surgery_training.train_size=1.0"],
            "query.surgery_training.early_stopping needs validation cells and query.surgery_training.train_size is 1.0",
        ),
        (["query.surgery_training.epochs=3"], "query.surgery_training.epochs is not a setting; did you mean query.s"),
    ],
)
def test_settings_are_checked_before_any_work(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Path(__file__).parents[1] / "scvi-config.yaml", settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_reach_load_query_data_the_plan_and_early_stopping(
    reference: Path, query: ad.AnnData, tmp_path: Path
) -> None:
    """A patience of one epoch and a KL weight of 0."""
    settings = {"max_epochs": 40, "early_stopping": True, "lr": 0.5}
    arguments = {"early_stopping_patience": 1, "max_kl_weight": 0.0, "freeze_batchnorm_decoder": True}
    facts = adapted_to(reference, query, "joint", tmp_path / "work", **settings, arguments=arguments).facts
    assert facts["trainings"][0]["epochs"] < 40
    assert facts["trainings"][0]["cells"] == 135  # nine of ten


def test_own_cells_without_batches(reference: Path, query: ad.AnnData) -> None:
    atlas = Atlas.open(reference)
    with pytest.raises(UserError, match=r"the cells have no obs column 'bacth'; did you mean batch\?"):
        atlas.adapt(query, "bacth")
    missing = query.copy()
    missing.obs["batch"] = missing.obs["batch"].where(missing.obs["batch"] != "a-sample")
    with pytest.raises(UserError, match=r"obs\['batch'\] has no value for 60 of 150 cells; each needs one"):
        atlas.adapt(missing, "batch")
    with pytest.raises(UserError, match="mode is 'join', expected one of joint, per_batch, sequential; did you mean"):
        atlas.adapt(query, "batch", mode="join")
    with pytest.raises(UserError, match="training: max_epochs is 0"):
        atlas.adapt(query, "batch", training={"max_epochs": 0})


def test_the_atlas_of_an_adapted_model(
    reference: Path, reference_cells: ad.AnnData, query: ad.AnnData, tmp_path: Path
) -> None:
    """It embeds cells of its batches as trained, whether it was just adapted or opened again, and no other cells."""
    atlas = Atlas.open(reference)
    before = atlas.embed(query).obsm["X_scvi"]
    settings = {"max_epochs": 3, "lr": 1e-2}
    adapted = atlas.adapt(query, "batch", training=settings, folder=tmp_path / "saved", seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    embedded = adapted.embed(query)
    assert np.abs(embedded.obsm["X_scvi"] - before).max() > 0.01
    assert "joint: 2 batches, 150 cells, 3 epochs, 6 steps; the latent of 150 cells of the query in batches" in str(
        embedded.uns["scvi_surgery"]
    )
    again = Atlas.open(tmp_path / "saved")
    shuffled = query[np.random.default_rng(0).permutation(query.n_obs)].copy()
    np.testing.assert_allclose(
        pd.DataFrame(again.embed(shuffled).obsm["X_scvi"], shuffled.obs_names).loc[query.obs_names],
        embedded.obsm["X_scvi"],
        atol=1e-6,
    )
    assert again.surgery == adapted.surgery
    with pytest.raises(UserError, match="the model was not adapted to batch 'other' of batch"):
        again.embed(generated({"other": 10, "a-sample": 10}, seed=9))
    with pytest.raises(UserError, match="saved exists; give a new folder, or open the model in it"):
        atlas.adapt(query, "batch", folder=tmp_path / "saved")
    again.adapt(generated({"other": 20}, seed=9), "batch", training=settings, folder=tmp_path / "further")
    further = Atlas.open(tmp_path / "further")  # the reference and the first query stay in place
    for cells in (reference_cells, query):
        assert np.array_equal(further.embed(cells).obsm["X_scvi"], again.embed(cells).obsm["X_scvi"])
    assert further.description is not None
    lineage = further.description.lineage
    assert [record["batches"] for record in lineage] == [["z-sample", "a-sample"], ["other"]]
    assert [record["reference"] for record in lineage] == [weights_digest(each.model) for each in (atlas, again)]
    values = json.loads((tmp_path / "saved" / "surgery.json").read_text())
    for damaged in (
        {"models": ["../else"]},
        {"format": 9},
        {"batches": None},
        {"models": []},
        {"facts": {"reason": ""}},
    ):
        (tmp_path / "saved" / "surgery.json").write_text(json.dumps(values | damaged))
        with pytest.raises(UserError, match=r"surgery.json (is damaged|has format 9)"):
            Atlas.open(tmp_path / "saved")


def test_a_folder_of_others_is_not_deleted(reference: Path, query: ad.AnnData, tmp_path: Path) -> None:
    """Neither when the work is done nor after an error; unfinished work of a surgery is one's own."""
    atlas = Atlas.open(reference)
    for name in ("saved.training", "notes", "mine"):
        (tmp_path / name).mkdir()
    for name in ("saved.training", "notes"):
        (tmp_path / name / "notes.txt").write_text("kept")
    message = "is a folder for the unfinished work of a surgery, which is removed at its end, and it has 'notes.txt'"
    for arguments in ({"folder": tmp_path / "saved"}, {"work": str(tmp_path / "notes"), "training": {"lr": 1e30}}):
        with pytest.raises(UserError, match=message):
            atlas.adapt(query, "batch", **arguments)
    with pytest.raises(UserError, match=message):
        atlas.compare_mappings(query, "batch", folder=str(tmp_path / "notes"))
    assert [path.read_text() for path in sorted(tmp_path.glob("*/notes.txt"))] == ["kept", "kept"]
    for _ in range(2):
        atlas.adapt(query, "batch", work=str(tmp_path / "mine"), training={"max_epochs": 1})
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "fingerprint.json",
        "surgery.lock",
        "training-000",
    ]


def test_the_preset_is_of_a_reference_that_can_be_extended() -> None:
    config = load_config(Path(__file__).parents[1] / "configs/surgery-reference.yaml", ["census.uri=somewhere"])
    description = ModelDescription(GENES, ["a", "b"], init_arguments(config.model), "homo_sapiens", ["batch"], 0)
    model = description.build()
    require_extendable(model, description, ["new"])
    assert [no_effect(model, batches, "per_batch") for batches in (["new"], ["new", "other"])] == ["", ""]
