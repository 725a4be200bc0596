"""SCANVI and TOTALVI from the Census to the embedding: what scvi-tools computes, resumed as if undisturbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import ROOT, Run
from scvi.dataloaders import SemiSupervisedDataLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_model_kinds import described
from test_train import copy_of, equal, stop_in, trained_for, weights

from census_scvi.census.cells import Cells, select_cells, select_labels
from census_scvi.census.open import open_census
from census_scvi.census.proteins import read_protein_names
from census_scvi.census.settings import CensusSection
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.reader import PreparedCells
from census_scvi.counts.writer import H5adWriter
from census_scvi.model.encode import Encoder, extend_batches
from census_scvi.model.families import FAMILIES
from census_scvi.model.safe import load_safe
from census_scvi.settings import load_config
from census_scvi.training.plans import library_plan, plan_arguments

SURGERY = {"use_layer_norm": "both", "use_batch_norm": "none"}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "SCANVI": {
        "anndata": {"labels_key": "cell_type", "batch_key": ["dataset_id"]},
        "model": {"kind": "SCANVI", "encode_covariates": True, "arguments": SURGERY},
    },
    "TOTALVI": {
        "anndata": {"protein_measurement": "protein", "batch_key": ["dataset_id"]},
        "model": {"kind": "TOTALVI", "encode_covariates": True, "arguments": SURGERY | {"n_layers_decoder": 2}},
        "training_plan": {"n_epochs_kl_warmup": 5},
    },
}


@pytest.fixture(scope="module")
def runs(protein_census: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of all three stages of each kind."""
    torch.set_num_threads(1)
    return {kind: Run(tmp_path_factory.mktemp(kind), protein_census, **KINDS[kind]).all() for kind in KINDS}


def prepared_as(run: Run, folder: Path, **sections: dict[str, Any]) -> Run:
    """A run directory with the prepared cells of another one, and nothing else."""
    copied = copy_of(run, folder, **sections)
    manifest = copied.manifest()
    manifest["stages"] = {"prepare": manifest["stages"]["prepare"]}
    copied.path("manifest.json").write_text(json.dumps(manifest))
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_plain_scvi_tools_gives_the_embedding(kind: str, runs: dict[str, Run]) -> None:
    run = runs[kind]
    cells = ad.read_h5ad(run.path("anndata_model.h5ad"))
    model = FAMILIES[kind].model_class.load(str(run.path("scvi.model")), adata=cells)
    assert equal(model.module.state_dict(), weights(run))
    joinids = pd.Index(np.load(run.path("latent-idx.npy")))
    embedded = np.load(run.path("latent.npy"))[joinids.get_indexer(cells.obs["soma_joinid"])]
    assert np.abs(model.get_latent_representation() - embedded).max() < 1e-5
    assert run.record("create-latent-update")["counts"]["largest_difference_to_scvi_tools"] < 1e-5


def test_scanvi_is_minified_as_scvi_tools_does(runs: dict[str, Run]) -> None:
    run = runs["SCANVI"]
    model = scvi.model.SCANVI.load(str(run.path("final_scvi_optimized")))
    assert model.minified_data_type == "latent_posterior_parameters"
    assert np.array_equal(model.get_latent_representation(), np.load(run.path("latent.npy")))
    assert (model.adata.obs["labels"].astype(str) == model.adata.obs["cell_type"].astype(str)).all()


def test_totalvi_is_not_minified_because_scvi_tools_cannot(runs: dict[str, Run]) -> None:
    assert not runs["TOTALVI"].path("final_scvi_optimized").exists()
    assert FAMILIES["TOTALVI"].latent_keys is None


def test_the_labels_are_those_of_the_census(runs: dict[str, Run]) -> None:
    cells = ad.read_h5ad(runs["SCANVI"].path("anndata_model.h5ad"))
    assert (cells.obs["labels"].astype(str) == cells.obs["cell_type"].astype(str)).all()
    _, description = load_safe(runs["SCANVI"].path("scvi.model"))
    assert description.labels == sorted(set(cells.obs["cell_type"].astype(str)) - {"unknown"})
    assert (description.labels_key, description.unlabeled_category) == ("cell_type", "unknown")


def test_the_proteins_are_those_of_the_census(runs: dict[str, Run], protein_census: str) -> None:
    cells = ad.read_h5ad(runs["TOTALVI"].path("anndata_model.h5ad"))
    _, description = load_safe(runs["TOTALVI"].path("scvi.model"))
    with open_census(CensusSection(uri=protein_census)) as census:
        assert description.proteins == read_protein_names(census, "protein")
        table = census.experiment.ms["protein"].X["raw"].read().tables().concat().to_pandas()
        n_obs = census.experiment.obs.count
    stored = np.zeros((n_obs, len(description.proteins)), np.float32)
    stored[table["soma_dim_0"], table["soma_dim_1"]] = table["soma_data"]
    assert np.array_equal(cells.obsm["protein_expression"], stored[cells.obs["soma_joinid"]])
    assert list(cells.uns["protein_names"]) == description.proteins
    total = pd.DataFrame(cells.obsm["protein_expression"]).groupby(cells.obs["batch"].to_numpy()).sum()
    missing = {batch: [description.proteins[i] for i in np.flatnonzero(row == 0)] for batch, row in total.iterrows()}
    assert description.missing_proteins == {batch: names for batch, names in missing.items() if names}
    assert any(0 < len(names) < len(description.proteins) for names in description.missing_proteins.values())


def test_scanvi_measures_its_classification(runs: dict[str, Run]) -> None:
    run = runs["SCANVI"]
    curves = run.record("train")["learning_curves"]
    assert curves["train_accuracy"][-1] > curves["train_accuracy"][0]
    assert curves["validation_classification_loss"][-1] < curves["validation_classification_loss"][0]
    (folder,) = run.path("tb_logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train_accuracy", "validation_accuracy", "validation_f1_score"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(("kind", "more"), [("SCANVI", {}), ("SCANVI", {"n_samples_per_label": 9}), ("TOTALVI", {})])
def test_a_stopped_run_goes_on_as_an_undisturbed_one(
    kind: str, more: dict[str, int], runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    short = KINDS[kind] | {"train": {"checkpoint_minutes": 0, **more}}
    undisturbed = runs[kind]
    if more:
        undisturbed = prepared_as(runs[kind], tmp_path / "undisturbed", **short)
        assert undisturbed("train") == 0
        assert not equal(weights(runs[kind]), weights(undisturbed))
    stopped = prepared_as(runs[kind], tmp_path, **short)
    stop_in(stopped, 1, 2, monkeypatch)
    trained_for(stopped.path(".partial/train/checkpoint.ckpt"), 1000.0, 500.0)
    torch.manual_seed(12345)
    assert stopped("train") == 0
    assert stopped.record("train")["resumed"]
    assert 1000 < stopped.record("train")["seconds"] < 1100
    assert equal(weights(undisturbed), weights(stopped))
    ours, theirs = (run.record("train")["learning_curves"] for run in (undisturbed, stopped))
    assert ours == theirs


def test_scanvi_starts_from_an_scvi_model(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"anndata": KINDS["SCANVI"]["anndata"], "model": {"encode_covariates": True, "arguments": SURGERY}}
    trained = prepared_as(runs["SCANVI"], tmp_path / "scvi", **plain)
    assert trained("train") == 0
    start = str(trained.directory)
    model = KINDS["SCANVI"]["model"] | {"from_scvi_model": start}
    run = prepared_as(
        runs["SCANVI"], tmp_path / "scanvi", **KINDS["SCANVI"] | {"model": model, "train": {"max_epochs": 1}}
    )
    built: list[dict[str, torch.Tensor]] = []
    real = scvi.model.SCANVI

    def fit(model: Any, *arguments: Any, **more: Any) -> Any:
        assert isinstance(model, real)
        built.append({name: tensor.clone() for name, tensor in model.module.state_dict().items()})
        raise InterruptedError

    with monkeypatch.context() as planted:
        planted.setattr("census_scvi.stages.train.fit", fit)
        run("train")
    assert equal(weights(trained), built[0])
    assert run("train") == 0
    _, description = load_safe(run.path("scvi.model"))
    assert description.lineage[0]["from_scvi_model"] == start
    capsys.readouterr()
    for change, words in (
        ({"n_latent": 5}, f"model.from_scvi_model is {start}, which has n_latent 4, and this model 5; set both alike"),
        ({"from_scvi_model": str(runs["SCANVI"].directory)}, "a SCANVI model; expected an SCVI model"),
        (
            {"from_scvi_model": str(tmp_path / "none")},
            f"model.from_scvi_model is {tmp_path / 'none'}, which cannot be read",
        ),
    ):
        wrong = prepared_as(runs["SCANVI"], tmp_path / words[-9:], **KINDS["SCANVI"] | {"model": model | change})
        assert wrong("train") == 2
        assert words in capsys.readouterr().err


WRONG: list[tuple[str, dict[str, dict[str, Any]], str]] = [
    ("prepare", {"anndata": {"labels_key": "cell_typ"}}, "anndata.labels_key contains 'cell_typ', which is not an obs"),
    (
        "prepare",
        {"anndata": {"protein_measurement": "proteins"}},
        "(measurements next to RNA: protein); set anndata.protein_measurement to one of these",
    ),
    ("prepare", {"model": {"kind": "SCANVI"}}, "model.kind is SCANVI, which learns labels: set anndata.labels_key"),
    ("prepare", {"model": {"kind": "TOTALVI"}}, "set anndata.protein_measurement to the measurement of"),
    ("prepare", {"model": {"from_scvi_model": "x"}}, "model.from_scvi_model is used only by SCANVI, and model.kind is"),
    ("prepare", {"model": {"arguments": {"use_layer_norm": "all"}}}, "'all', expected one of encoder, decoder, none"),
    ("prepare", {"model": {"arguments": {"latent_distribution": "ln"}}}, "'ln', expected one of normal"),
    (
        "prepare",
        {"train": {"n_samples_per_label": 5}},
        "train.n_samples_per_label is used only by SCANVI, and model.kind is SCVI; remove it",
    ),
    (
        "prepare",
        {"training_plan": {"n_samples_per_label": 5}},
        "training_plan.n_samples_per_label cannot be set here; set train.n_samples_per_label",
    ),
    ("prepare", {"training_plan": {"classification_ratio": 1}}, "is not an argument of scvi-tools' TrainingPlan"),
    (
        "train",
        {"anndata": {"labels_key": "sex"}, "census": {"obs_query": "sex == 'male'"}, "model": {"kind": "SCANVI"}},
        "has 1 labels (anndata.labels_key: sex), and SCANVI needs two or more",
    ),
]


@pytest.mark.parametrize(("stage", "sections", "words"), WRONG)
def test_wrong_inputs_are_refused(
    stage: str,
    sections: dict[str, dict[str, Any]],
    words: str,
    protein_census: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tmp_path, protein_census, **sections)
    if stage == "train":
        assert run("prepare") == 0
        capsys.readouterr()
    assert run(stage) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line


@pytest.mark.parametrize("step", [1, 7])
def test_labels_of_cells(step: int, protein_census: str) -> None:
    """Each cell gets its own label, also if the filter matches more cells."""
    value_filter = "is_primary_data == True"
    with open_census(CensusSection(uri=protein_census)) as census:
        every = select_cells(census, value_filter, ["dataset_id"])
        cells = Cells(every.joinids[::step], every.batch_codes[::step], every.batches)
        codes, labels = select_labels(census, cells, value_filter, "cell_type", "B cell")
        obs = census.experiment.obs.read(column_names=["soma_joinid", "cell_type"]).concat().to_pandas()
    expected = obs.set_index("soma_joinid").loc[cells.joinids, "cell_type"].astype(str).to_numpy()
    assert np.array_equal(np.array(labels, dtype=object)[codes], expected)
    assert labels[:-1] == sorted(set(expected) - {"B cell"})
    assert labels[-1] == "B cell"


@pytest.mark.parametrize("kind", [*KINDS, "SCVI"])
def test_the_shipped_configs_are_for_every_kind(kind: str, tmp_path: Path) -> None:
    """Also the arguments of SCVI's training plan that scvi-tools' other plans only inherit."""
    inputs = ["anndata.labels_key=cell_type", "anndata.protein_measurement=protein", f"model.kind={kind}"]
    for name in ("scvi-config.yaml", "configs/small.yaml", "configs/blood.yaml", "configs/surgery-reference.yaml"):
        plan = load_config(ROOT / name, inputs).training_plan | {
            "max_kl_weight": 0.5,
            "min_kl_weight": 0.25,
            "eps": 0.1,
        }
        built = library_plan(described(kind).build(), plan_arguments(plan, kind, 100))
        assert type(built).__mro__[1 if kind == "SCANVI" else 0] is FAMILIES[kind].plan_class
        assert (built.max_kl_weight, built.min_kl_weight, built.eps) == (0.5, 0.25, 0.1)
        assert built.n_epochs_kl_warmup or built.n_steps_kl_warmup


# --- minibatches


def written(folder: Path, n_cells: int, seed: int) -> Path:
    """Prepared cells of three batches with labels, a third of them unlabelled, and three proteins."""
    numbers = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(numbers.integers(0, 3, n_cells), ["x", "y", "z"]),
            "labels": pd.Categorical.from_codes(numbers.integers(0, 3, n_cells), ["B", "T", "unknown"]),
        },
        index=[str(i) for i in range(n_cells)],
    )
    counts = sp.random(n_cells, 8, 0.5, format="csr", random_state=seed, data_rvs=lambda n: numbers.integers(1, 9, n))
    proteins = numbers.poisson(3, (n_cells, 3)).astype(np.float32)
    names = np.array(["p", "q", "r"], dtype=object)
    path = folder / "cells.h5ad"
    with H5adWriter(path, pd.DataFrame(index=[f"g{i}" for i in range(8)]), uns={"protein_names": names}) as writer:
        writer.append(obs, counts=counts.astype(np.float32), obsm={"protein_expression": proteins})
    return path


@pytest.fixture(scope="module")
def prepared_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("cells"), 700, 0)


class EpochOf:
    """What the data module asks of a trainer."""

    global_rank, world_size, strategy = 0, 1, SimpleNamespace(root_device=torch.device("cpu"))

    def __init__(self, epoch: int = 0) -> None:
        self.current_epoch = epoch


def minibatches(data: PreparedDataModule, n_epochs: int) -> Iterator[dict[str, Any]]:
    data.trainer = EpochOf()  # type: ignore[assignment]  # as far as it is used
    loader = data.train_dataloader()
    for epoch in range(n_epochs):
        data.trainer.current_epoch = epoch  # type: ignore[misc]  # not a property here
        yield from loader


@settings(max_examples=20, deadline=None)
@given(
    batch_size=st.integers(20, 300),
    start=st.integers(0, 10_000),
    workers=st.integers(0, 2),
    n_samples=st.none() | st.integers(1, 250),
)
def test_every_labelled_cell_comes_once_a_pass_also_after_a_resume(
    prepared_cells: Path, batch_size: int, start: int, workers: int, n_samples: int | None
) -> None:
    def module() -> PreparedDataModule:
        return PreparedDataModule(
            prepared_cells, batch_size=batch_size, train_size=0.8, seed=1, workers=workers, labels=True, proteins=True,
            n_samples_per_label=n_samples,
        )  # fmt: skip

    data, file = module(), ad.read_h5ad(prepared_cells)
    every = list(minibatches(data, 3))
    labelled = np.flatnonzero(data.labelled)
    assert (file.obs["labels"].iloc[labelled] != "unknown").all()
    for minibatch in every:
        for cells in (minibatch, minibatch["labelled"]):
            rows = cells["row"].numpy()
            assert np.array_equal(cells["X"].numpy(), file.X[rows].toarray())
            assert np.array_equal(cells["labels"].squeeze(1).numpy(), file.obs["labels"].cat.codes.iloc[rows])
            assert np.array_equal(cells["batch"].squeeze(1).numpy(), file.obs["batch"].cat.codes.iloc[rows])
            assert np.array_equal(cells["proteins"].numpy(), file.obsm["protein_expression"][rows])
    n_epoch = len(every) // 3
    if n_samples is None:
        whole = [(every, labelled)]
    else:
        drawn = [np.flatnonzero(data.labelled_of_epoch(epoch)) for epoch in range(3)]
        whole = [(every[epoch * n_epoch : (epoch + 1) * n_epoch], drawn[epoch]) for epoch in range(3)]
    for part, wanted in whole:
        met = np.concatenate([minibatch["labelled"]["row"] for minibatch in part])
        for first in range(0, len(met), len(wanted)):
            some = met[first : first + len(wanted)]
            assert np.array_equal(np.sort(some), wanted if len(some) == len(wanted) else np.unique(some))
            assert np.isin(some, wanted).all()
    resumed = module()
    epoch, skipped = divmod(start % len(every), n_epoch)
    resumed.trainer = EpochOf(epoch)  # type: ignore[assignment]  # as far as it is used
    loader = resumed.train_dataloader()
    loader.load_state_dict({"minibatches": skipped})
    for one, other in zip(list(loader), every[epoch * n_epoch + skipped : (epoch + 1) * n_epoch], strict=True):
        assert torch.equal(one["row"], other["row"])
        assert torch.equal(one["labelled"]["row"], other["labelled"]["row"])


@pytest.mark.parametrize("n_samples", [1, 50, 180, 1000])
def test_labelled_cells_of_an_epoch_are_drawn_as_by_scvi_tools(prepared_cells: Path, n_samples: int) -> None:
    data = PreparedDataModule(
        prepared_cells, batch_size=64, train_size=0.9, seed=1, workers=0, labels=True, n_samples_per_label=n_samples
    )
    file = ad.read_h5ad(prepared_cells)
    scvi.model.SCANVI.setup_anndata(file, labels_key="labels", unlabeled_category="unknown")
    manager = scvi.model.SCANVI(file).adata_manager
    theirs = SemiSupervisedDataLoader(manager, n_samples_per_label=n_samples, indices=np.flatnonzero(~data.validation))
    ours = [np.flatnonzero(data.labelled_of_epoch(epoch)) for epoch in range(2)]
    for rows in ours:
        assert not data.validation[rows].any()
        assert file.obs["labels"].iloc[rows].value_counts().to_dict() == (
            file.obs["labels"].iloc[theirs.subsample_labels()].value_counts().to_dict()
        )
    assert np.array_equal(*ours) == (n_samples == 1000)  # otherwise each epoch has other cells


def test_missing_proteins_are_those_without_counts_in_a_batch(prepared_cells: Path) -> None:
    cells = PreparedCells(prepared_cells)
    assert cells.missing_proteins() == {}
    assert (cells.labels, cells.proteins) == (["B", "T", "unknown"], ["p", "q", "r"])
    rows = np.array([5, 3, 600])
    assert np.array_equal(cells.protein_counts_of(rows), ad.read_h5ad(prepared_cells).obsm["protein_expression"][rows])


# --- encoding


@pytest.mark.parametrize("kind", KINDS)
def test_new_batches_leave_the_latent_of_the_trained_ones(kind: str, runs: dict[str, Run]) -> None:
    model, description = load_safe(runs[kind].path("scvi.model"))
    cells = PreparedCells(runs[kind].path("anndata_model.h5ad"), proteins=kind == "TOTALVI")
    rows = cells.read([(0, 200)])
    extended = extend_batches(model, description.genes, ["new", "another"])
    before = Encoder(model)(rows.csr(cells.n_genes), rows.batch_codes, rows.proteins).mean
    after = Encoder(extended)(rows.csr(cells.n_genes), rows.batch_codes, rows.proteins).mean
    assert np.abs(before - after).max() < 1e-6
    config = load_config(runs[kind].config)
    assert config.model.kind == kind
