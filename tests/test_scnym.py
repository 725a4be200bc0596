"""scNym's method: it trains where the original has defects, and what it learns can be saved and explained."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.annotation.annotators.scnym import ScNym
from census_scvi.annotation.protocol import Cells
from census_scvi.annotation.scnym import module as module_of_step
from census_scvi.annotation.scnym import training
from census_scvi.annotation.scnym.cells import (
    InFile,
    InMemory,
    Stacked,
    in_order,
    log_cpm,
    overview,
    regrouped,
    to_tensor,
)
from census_scvi.annotation.scnym.classifier import DESCRIPTION, WEIGHTS, Classifier
from census_scvi.annotation.scnym.interpret import expected_gradients
from census_scvi.annotation.scnym.minibatches import TrainingCells, TrainingMinibatches, ValidationMinibatches
from census_scvi.annotation.scnym.mixmatch import mix_up, pseudolabels, sharpen
from census_scvi.annotation.scnym.module import ScNymModule
from census_scvi.annotation.scnym.network import CellTypeClassifier, reverse_gradient
from census_scvi.annotation.scnym.settings import PRESETS, Hyperparameters, hyperparameters
from census_scvi.annotation.scnym.split import validation_cells
from census_scvi.annotation.scnym.training import Trained, train
from census_scvi.counts.h5ad import CountMatrix, open_file
from census_scvi.errors import UserError

N_GENES = 120
GENES = [f"ENSG{number:011d}" for number in range(N_GENES)]
SMALL: dict[str, Any] = {"n_hidden": 16, "n_hidden_init": 32, "n_epochs": 12, "min_epochs": 4, "ramp_epochs": 6}
SMALL |= {"batch_size": 32}
MARKERS = 12  # genes 0-11 are high in class 0, 12-23 in class 1, ...


def simulated(
    n_cells: int, n_classes: int = 3, *, seed: int = 0, shift: bool = False
) -> tuple[sp.csr_matrix, npt.NDArray[np.object_]]:
    """Counts and classes of cells; with a shift, of another technology."""
    numbers = np.random.default_rng([7, seed])
    base = np.random.default_rng(1).gamma(0.5, 2.0, N_GENES)
    means = np.tile(base, (n_classes, 1))
    for number in range(n_classes):
        means[number, MARKERS * number : MARKERS * (number + 1)] += 4
    factors = np.random.default_rng(2).gamma(3.0, 1 / 3, N_GENES) if shift else np.ones(N_GENES)
    codes = numbers.permutation(np.arange(n_cells) % n_classes)
    depth = numbers.lognormal(0, 0.3, (n_cells, 1))
    counts = numbers.poisson(means[codes] * depth * factors).astype(np.float32)
    return sp.csr_matrix(counts), np.array([f"type {code}" for code in codes], dtype=object)


def both(n_labelled: int, n_unlabelled: int) -> tuple[sp.csr_matrix, npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """Counts of labelled and shifted unlabelled cells, labels to train on, true classes."""
    one, labels = simulated(n_labelled)
    other, truth = simulated(n_unlabelled, seed=1, shift=True)
    unlabelled = np.full(n_unlabelled, "Unlabeled", dtype=object)
    return sp.vstack([one, other], format="csr"), np.concatenate([labels, unlabelled]), np.concatenate([labels, truth])


def fit(counts: Any, labels: npt.NDArray[np.object_], preset: str = "no_new_identity", **arguments: Any) -> Trained:
    overrides = SMALL | arguments.pop("overrides", {})
    source = counts if hasattr(counts, "read") else InMemory(counts)
    return train(source, GENES, labels, hyperparameters(preset, overrides), **{"accelerator": "cpu"} | arguments)


def weights_of(trained: Trained) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in trained.classifier.network.state_dict().values()])


@pytest.fixture(scope="module")
def trained() -> Trained:
    counts, labels, _ = both(240, 150)
    return fit(counts, labels)


# --- hyper-parameters


def test_presets_have_the_published_values() -> None:
    published = {
        "n_epochs": 100, "patience": 40, "lr": 1.0, "optimizer_name": "adadelta", "weight_decay": 1e-4,
        "batch_size": 256, "mixup_alpha": 0.3, "unsup_max_weight": 1.0, "unsup_mean_teacher": False,
        "augment_pseudolabels": False, "augment": "log1p_drop", "unsup_criterion": "mse", "n_augmentations": 1,
        "T": 0.5, "ramp_epochs": 100, "burn_in_epochs": 0, "dan_ramp_epochs": 20, "dan_max_weight": 0.1,
        "min_epochs": 20, "n_hidden": 256, "n_layers": 2, "init_dropout": 0.0, "residual": False,
    }  # fmt: skip
    for preset, differing in {
        "no_new_identity": {"pseudolabel_min_confidence": 0.0, "dan_use_conf_pseudolabels": False},
        "new_identity_discovery": {"pseudolabel_min_confidence": 0.9, "dan_use_conf_pseudolabels": True},
        "supervised": {"unsup_max_weight": 0.0, "dan_max_weight": 0.0},
    }.items():
        values = hyperparameters(preset).model_dump()
        assert {name: values[name] for name in published | differing} == published | differing


def test_the_documentation_has_every_hyperparameter_and_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scnym.md").read_text()
    for name, field in Hyperparameters.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert f"| `{name}` | {default} | {' '.join(str(field.description).split())} |\n" in text


def test_overrides_change_what_they_name_and_nothing_for_others() -> None:
    before = {name: settings.model_dump() for name, settings in PRESETS.items()}
    changed = hyperparameters("new_identity_discovery", {"dan_max_weight": 0.3, "lr": 1})
    assert changed.model_dump() == before["new_identity_discovery"] | {"dan_max_weight": 0.3, "lr": 1.0}
    assert {name: hyperparameters(name).model_dump() for name in PRESETS} == before
    with pytest.raises(TypeError):
        PRESETS["no_new_identity"] = changed  # type: ignore[index]
    with pytest.raises(ValueError, match="frozen"):
        PRESETS["no_new_identity"].lr = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("no_new_identiy", {}, "did you mean no_new_identity?"),
        ("no_new_identity", {"n_epoch": 3}, "overrides: n_epoch is not a hyper-parameter .* did you mean n_epochs?"),
        ("no_new_identity", {"ssl_kwargs": {"T": 1}}, "write its keys directly into the overrides"),
        ("no_new_identity", {"batch_size": 1}, "overrides: batch_size is 1"),
        ("no_new_identity", {"lr": float("nan")}, "overrides: lr is nan"),
        ("no_new_identity", {"n_layers": 2.5}, "n_layers is 2.5, expected a whole number"),
    ],
)
def test_wrong_overrides_are_refused_by_name(preset: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hyperparameters(preset, overrides)


def test_weights_of_the_losses_rise_as_published() -> None:
    settings = Hyperparameters(burn_in_epochs=5)
    assert [settings.unsupervised_weight(epoch) for epoch in (0, 4, 5, 55, 105, 300)] == [0, 0, 0, 0.5, 1, 1]
    assert settings.domain_weight(0) == pytest.approx(0.1 * np.exp(-5))
    assert settings.domain_weight(10) == pytest.approx(0.1 * np.exp(-1.25))
    assert settings.domain_weight(20) == settings.domain_weight(99) == 0.1
    assert Hyperparameters(ramp_epochs=0, dan_ramp_epochs=0).unsupervised_weight(0) == 1


# --- the network and the losses


@pytest.mark.parametrize("residual", [False, True])
def test_every_hidden_layer_has_weights_of_its_own(residual: bool) -> None:
    sizes = []
    for n_layers in (1, 2, 3, 5):
        settings = hyperparameters("no_new_identity", {"n_layers": n_layers, "residual": residual, "n_hidden": 16})
        sizes.append(sum(value.numel() for value in CellTypeClassifier(N_GENES, 3, settings).parameters()))
    layer = sizes[1] - sizes[0]
    assert layer > 16 * 16
    assert sizes[2:] == [sizes[0] + 2 * layer, sizes[0] + 4 * layer]


def test_reversed_gradients_are_minus_the_weight_times_the_gradients() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    reverse_gradient(x, 0.25).square().sum().backward()
    torch.testing.assert_close(x.grad, -0.25 * 2 * x.detach())


@given(st.integers(1, 30), st.integers(2, 6), st.floats(0.05, 2.0))
def test_mix_up_keeps_at_least_half_of_each_cell_and_labels_sum_to_one(n: int, n_classes: int, alpha: float) -> None:
    labels = torch.nn.functional.one_hot(torch.arange(n) % n_classes, n_classes).float()
    values = torch.eye(n)
    mixed, of_mixed = mix_up(values, labels, alpha)
    assert bool((mixed.diagonal() >= 0.5 - 1e-6).all())
    torch.testing.assert_close(of_mixed, mixed @ labels)
    torch.testing.assert_close(of_mixed.sum(dim=1), torch.ones(n))
    assert mix_up(values, labels, 0.0)[0] is values


def test_pseudolabels_are_sharp_confident_and_of_evaluation_mode() -> None:
    probability = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    torch.testing.assert_close(
        sharpen(probability, 0.5), torch.tensor([[0.36, 0.16], [0.81, 0.01]]) / torch.tensor([[0.52], [0.82]])
    )
    network = CellTypeClassifier(N_GENES, 3, hyperparameters("no_new_identity", {"n_hidden": 8})).train()
    values = log_cpm(to_tensor(simulated(20)[0]))
    once, again = (pseudolabels(network, [values], 1.0, 0.5) for _ in range(2))
    torch.testing.assert_close(once[0], again[0])  # no dropout
    assert network.training
    expected = once[0].amax(dim=1) >= 0.5
    assert torch.equal(once[1], expected)


def step(settings: Hyperparameters, seed: int = 0) -> tuple[ScNymModule, dict[str, Any]]:
    counts, labels, _ = both(40, 30)
    codes = torch.from_numpy(np.unique(labels[:40].astype(str), return_inverse=True)[1])
    torch.manual_seed(seed)
    module = ScNymModule(CellTypeClassifier(N_GENES, 3, settings), 2, settings).train()
    minibatch = {"counts": to_tensor(counts[:40]), "codes": codes, "domains": torch.zeros(40, dtype=torch.int64)}
    minibatch |= {"unlabelled_counts": to_tensor(counts[40:]), "unlabelled_domains": torch.ones(30, dtype=torch.int64)}
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    return module, minibatch


def test_the_adversary_sees_cells_of_all_domains_without_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    module, minibatch = step(hyperparameters("no_new_identity", {"n_hidden": 8}))
    seen = []
    loss = module_of_step.domain_loss
    monkeypatch.setattr(module_of_step, "domain_loss", lambda *some: (seen.append(some), loss(*some))[1])
    module.training_step(minibatch, 0)
    raw = torch.cat([log_cpm(minibatch["counts"]), log_cpm(minibatch["unlabelled_counts"])])
    torch.testing.assert_close(seen[0][2], raw)
    assert seen[0][3].tolist() == [0] * 40 + [1] * 30


def test_only_confident_cells_reach_the_adversary_and_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = {"n_hidden": 8, "pseudolabel_min_confidence": 1.0, "ramp_epochs": 0}
    module, minibatch = step(hyperparameters("new_identity_discovery", everyone))
    seen = []
    loss = module_of_step.domain_loss
    monkeypatch.setattr(module_of_step, "domain_loss", lambda *some: (seen.append(some), loss(*some))[1])
    losses = module._with_unlabelled(minibatch)
    assert len(seen[0][2]) == 40  # no unlabelled cell
    assert losses.unsupervised == 0


def test_a_step_copies_no_model_and_asks_for_no_gradients_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    module, minibatch = step(hyperparameters("no_new_identity", {"n_hidden": 8}))

    def refuse(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    inputs = []
    module.network.embed[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0].requires_grad))
    module.training_step(minibatch, 0).backward()
    assert len(inputs) == 4
    assert not any(inputs)


def test_the_mean_teacher_averages_weights_and_has_the_classifiers_batch_statistics() -> None:
    module, minibatch = step(hyperparameters("no_new_identity", {"n_hidden": 8, "unsup_mean_teacher": True}))
    assert module.teacher is not None
    first = module.network.classify.weight.detach().clone()
    module._update_teacher()  # the first teacher is the classifier
    torch.testing.assert_close(module.teacher.classify.weight, first)
    module.training_step(minibatch, 0)  # changes the batch statistics
    with torch.no_grad():
        module.network.classify.weight += 1
    steps = {"global_step": 1}
    module.__class__ = type("At", (ScNymModule,), {"global_step": property(lambda _: steps["global_step"])})
    module._update_teacher()
    torch.testing.assert_close(module.teacher.classify.weight, first + 0.5)
    steps["global_step"] = 10**6
    module._update_teacher()
    torch.testing.assert_close(module.teacher.classify.weight, first + 0.5 + 0.5 * 0.003)
    torch.testing.assert_close(module.teacher.embed[1].running_mean, module.network.embed[1].running_mean)
    assert not any(value.requires_grad for value in module.teacher.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_and_predicts_like_a_cpu() -> None:
    counts, labels, truth = both(240, 150)
    quiet_step = {"mixup_alpha": 0.0, "augment": "none", "n_epochs": 1}  # without random numbers but dropout's
    histories = [fit(counts, labels, overrides=quiet_step, accelerator=one).history for one in ("cpu", "gpu")]
    np.testing.assert_allclose(histories[0]["train_loss"], histories[1]["train_loss"], rtol=0.2)
    trained = fit(counts, labels, accelerator="gpu")
    found = [trained.classifier.predict(InMemory(counts[240:]), GENES, accelerator=one) for one in ("gpu", "cpu")]
    np.testing.assert_allclose(found[0].probability, found[1].probability, atol=1e-4)
    assert (found[0].labels == truth[240:]).mean() > 0.9
    why = expected_gradients(trained.classifier, InMemory(counts), GENES, truth, "type 1", accelerator="gpu")
    assert why.completeness == pytest.approx(1, abs=0.05)


def test_every_validation_cell_counts_the_same() -> None:
    counts, labels = simulated(1030)  # minibatches of 1,024 and 6
    codes = np.unique(labels.astype(str), return_inverse=True)[1]
    everyone, nobody = np.ones(1030, bool), np.zeros(1030, bool)
    cells = TrainingCells(InMemory(counts), codes, np.zeros(1030, np.int64), nobody, everyone, nobody)
    module, _ = step(hyperparameters("supervised", {"n_hidden": 8}))
    module.eval()
    logged: dict[str, Any] = {}
    module.log_dict = logged.update  # type: ignore[assignment,method-assign]
    with torch.no_grad():
        module.on_validation_epoch_start()
        for number, minibatch in enumerate(ValidationMinibatches(cells)):
            module.validation_step(minibatch, number)
        module.on_validation_epoch_end()
        logits = module.network(log_cpm(to_tensor(counts)))
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(codes))
    torch.testing.assert_close(logged["validation_loss"], expected)
    assert float(logged["validation_accuracy"]) == pytest.approx(float((logits.argmax(1).numpy() == codes).mean()))


# --- cells and minibatches


def cells_of(n_labelled: int, n_unlabelled: int) -> TrainingCells:
    counts, labels, _ = both(n_labelled, n_unlabelled)
    labelled = labels != "Unlabeled"
    codes = np.where(labelled, np.unique(labels.astype(str), return_inverse=True)[1] - 1, -1)
    return TrainingCells(
        InMemory(counts), codes, (~labelled).astype(np.int64), labelled, np.zeros(len(labels), bool), ~labelled
    )


@pytest.mark.parametrize(("n_labelled", "n_unlabelled"), [(40, 3), (3, 40), (600, 20), (513, 700), (2, 1)])
def test_minibatches_have_every_labelled_cell_once_and_enough_unlabelled_cells(
    n_labelled: int, n_unlabelled: int
) -> None:
    cells, epoch = cells_of(n_labelled, n_unlabelled), [0]
    minibatches = TrainingMinibatches(cells, 256, balanced=False, pseudolabelled=True, seed=0, epoch=lambda: epoch[0])
    orders = []
    for epoch[0] in (0, 1, 0):
        found = list(minibatches)
        assert len(found) == len(minibatches) == max(n_labelled // 256, 1)
        rows = torch.cat([minibatch["counts"].dense() for minibatch in found])
        counts = torch.from_numpy(cells.source.read([(0, n_labelled)]).toarray())
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, counts.tolist()))
        assert all(len(minibatch["unlabelled_codes"]) == max(min(256, n_unlabelled), 2) for minibatch in found)
        assert all(bool((minibatch["unlabelled_codes"] == -1).all()) for minibatch in found)
        orders.append(rows)
    assert torch.equal(orders[0], orders[2])
    assert n_labelled < 3 or not torch.equal(orders[0], orders[1])


def test_no_more_than_a_window_of_cells_is_in_memory() -> None:
    n_cells = 40_000
    counts = sp.random(n_cells, 10, density=0.3, format="csr", dtype=np.float32, random_state=0)
    read: list[int] = []

    class Recorded(InMemory):
        def read(self, blocks: list[tuple[int, int]]) -> sp.csr_matrix:
            read.append(sum(stop - start for start, stop in blocks))
            return super().read(blocks)

    source = Recorded(counts)
    part = np.arange(n_cells) % 2 == 0
    overview(source, part)
    nothing = np.zeros(n_cells, np.int64)
    cells = TrainingCells(source, nothing, nothing, part, part, ~part)
    training_cells = TrainingMinibatches(cells, 256, balanced=True, pseudolabelled=True, seed=0, epoch=lambda: 0)
    assert sum(len(minibatch["codes"]) for minibatch in training_cells) == 20_000
    assert sum(len(minibatch["codes"]) for minibatch in ValidationMinibatches(cells)) == 20_000
    assert max(read) <= 16_384 + 256
    assert sum(read) <= 4 * n_cells + 2 * 16_384


def test_balanced_classes_are_drawn_equally_often() -> None:
    counts, _ = simulated(900)
    codes = np.where(np.arange(900) < 880, 0, 1)
    everyone, nobody = np.ones(900, bool), np.zeros(900, bool)
    cells = TrainingCells(InMemory(counts), codes, np.zeros(900, np.int64), everyone, nobody, nobody)
    drawn = TrainingMinibatches(cells, 300, balanced=True, pseudolabelled=False, seed=0, epoch=lambda: 0)
    share = float(torch.cat([minibatch["codes"] for minibatch in drawn]).float().mean())
    assert share == pytest.approx(0.5, abs=0.06)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 7), max_size=8), st.data())
def test_regrouped_cells_stay_in_order(parts: list[int], sizes: list[int], data: st.DataObject) -> None:
    total = sum(parts)
    sizes = [size for number, size in enumerate(sizes) if sum(sizes[: number + 1]) <= total]
    counts = sp.csr_matrix(np.arange(1, total + 1, dtype=np.float32)[:, None])
    starts = np.cumsum([0, *parts])
    pieces = [(np.arange(a, b), counts[a:b]) for a, b in itertools.pairwise(starts)]
    groups = list(regrouped(iter(pieces), sizes)) if sizes else []
    assert [len(rows) for rows, _ in groups] == sizes
    assert [int(row) for rows, _ in groups for row in rows] == list(range(sum(sizes)))
    assert all((part.toarray()[:, 0] == rows + 1).all() for rows, part in groups)


def test_cells_of_a_file_and_of_several_sources_are_those_in_memory(tmp_path: Path) -> None:
    counts, _ = simulated(700)
    path = tmp_path / "cells.h5ad"
    ad.AnnData(counts[:500]).write_h5ad(path)
    wanted = np.random.default_rng(0).random(700) < 0.6
    with open_file(path) as file:
        stacked = Stacked([InFile(CountMatrix(file, "X")), InMemory(counts[500:])])
        for seed in (None, 3):
            rows, found = next(in_order(stacked, wanted, seed))
            assert sorted(rows) == np.flatnonzero(wanted).tolist()
            assert (found != counts[rows]).nnz == 0
            assert seed is not None or (np.diff(rows) > 0).all()


def test_a_training_from_a_file_is_that_from_memory(tmp_path: Path) -> None:
    counts, labels, _ = both(90, 60)
    path = tmp_path / "cells.h5ad"
    ad.AnnData(counts).write_h5ad(path)
    with open_file(path) as file:
        from_file = fit(InFile(CountMatrix(file, "X")), labels, overrides={"n_epochs": 2})
    assert torch.equal(weights_of(from_file), weights_of(fit(counts, labels, overrides={"n_epochs": 2})))


def test_normalisation_leaves_cells_without_counts_at_zero() -> None:
    counts = sp.csr_matrix(np.array([[0, 0, 0], [1, 3, 0]], np.float32))
    expected = np.log1p([[0, 0, 0], [2.5e5, 7.5e5, 0]])
    np.testing.assert_allclose(log_cpm(to_tensor(counts)).numpy(), expected, rtol=1e-6)


def test_validation_cells_are_whole_donors_if_all_classes_keep_cells() -> None:
    codes = np.tile([0, 1, 2], 100)
    donors = np.repeat([f"donor {number}" for number in range(10)], 30).astype(object)
    chosen = validation_cells(codes, donors, seed=0)
    assert chosen.sum() == 30
    assert len(set(donors[chosen])) == 1
    of_donors = np.where(codes == 0, "a", "b").astype(object)  # a class in one donor only
    for other in (None, of_donors):
        some = validation_cells(codes, other, seed=0)
        assert np.bincount(codes[some]).tolist() == [10, 10, 10]
    assert not np.array_equal(validation_cells(codes, None, 0), validation_cells(codes, None, 1))
    assert not validation_cells(np.array([0, 0, 1]), None, 0).any()


# --- training


def test_a_training_annotates_shifted_cells_and_is_the_same_with_the_same_seed(trained: Trained) -> None:
    counts, labels, truth = both(240, 150)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    again = fit(counts, labels)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert torch.equal(weights_of(trained), weights_of(again))
    assert not torch.equal(weights_of(trained), weights_of(fit(counts, labels, seed=1)))
    found = trained.classifier.predict(InMemory(counts[240:]), GENES)
    assert (found.labels == truth[240:]).mean() > 0.9
    np.testing.assert_allclose(found.probability.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found.confidence, found.probability.max(axis=1))
    assert found.embedding.shape == (150, 16)
    assert found.embedding.min() < 0  # before the ReLU
    assert set(trained.history) >= {"train_loss", "unsupervised_loss", "domain_accuracy", "validation_loss"}
    assert trained.validation.sum() == 24


def test_minibatches_are_computed_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several wait for each other on a busy machine, which was seen to cost ten times the CPU time."""
    used = []
    step = ScNymModule.training_step

    def noting(*arguments: Any) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return step(*arguments)

    monkeypatch.setattr(ScNymModule, "training_step", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts, labels, _ = both(30, 20)
        fit(counts, labels, overrides={"n_epochs": 1})
        assert set(used) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("n_labelled", "n_unlabelled"), [(30, 300), (300, 1), (6, 6)])
def test_fewer_cells_than_a_minibatch_are_enough(n_labelled: int, n_unlabelled: int) -> None:
    counts, labels, _ = both(n_labelled, n_unlabelled)
    result = fit(counts, labels, overrides={"n_epochs": 3, "batch_size": 256})
    assert np.isfinite(result.history["train_loss"]).all()
    assert len(result.history) == 3


def test_supervised_training_has_no_pseudolabels_and_no_adversary() -> None:
    counts, labels, _ = both(120, 60)
    result = fit(counts, labels, "supervised", overrides={"n_epochs": 3})
    assert "unsupervised_loss" not in result.history
    assert "domain_loss" not in result.history
    np.testing.assert_allclose(result.history["train_loss"], result.history["supervised_loss"])


def test_domains_of_all_labelled_cells_train_an_adversary_without_unlabelled_cells() -> None:
    counts, labels, _ = both(120, 60)
    domains = np.repeat(["one", "two", "three"], 40).astype(object)
    result = fit(counts[:120], labels[:120], domains=domains, overrides={"n_epochs": 3})
    assert result.history["domain_loss"].iloc[0] == pytest.approx(np.log(3), abs=0.3)
    assert "domain_loss" not in fit(counts[:120], labels[:120], overrides={"n_epochs": 1}).history


def test_patience_shorter_than_min_epochs_keeps_weights_of_a_later_epoch() -> None:
    counts, labels, _ = both(60, 30)
    result = fit(counts, labels, overrides={"patience": 0, "min_epochs": 5, "n_epochs": 30, "lr": 1e-6})
    assert result.best_epoch >= 5
    assert 6 <= len(result.history) < 30
    assert fit(counts, labels, overrides={"min_epochs": 50, "n_epochs": 3}).best_epoch == 2


def test_the_weights_of_the_best_epoch_are_kept(trained: Trained) -> None:
    losses = trained.history["validation_loss"]
    assert trained.best_epoch == losses.iloc[4:].idxmin()
    counts, labels, _ = both(240, 150)
    chosen = trained.validation
    found = trained.classifier.predict(InMemory(counts[np.flatnonzero(chosen)]), GENES)
    codes = np.searchsorted(found.classes, labels[chosen].astype(str))
    loss = -np.log(found.probability[np.arange(len(codes)), codes]).mean()
    assert loss == pytest.approx(losses.min(), rel=1e-4)


def test_cells_without_counts_change_nothing_and_get_no_label(caplog: pytest.LogCaptureFixture) -> None:
    counts, labels, _ = both(60, 40)
    empty = sp.csr_matrix((2, N_GENES), dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        result = fit(sp.vstack([counts, empty], format="csr"), np.append(labels, ["type 0", "Unlabeled"]))
        found = result.classifier.predict(InMemory(sp.vstack([empty, counts], format="csr")), GENES)
    assert "2 of 102 cells have no counts and are not used" in caplog.text
    assert np.isfinite(result.history.to_numpy()).all()
    assert found.empty.tolist() == [True, True] + [False] * 100
    np.testing.assert_allclose(found.probability[:2], 1 / 3)


def test_missing_labels_are_unlabelled_cells_and_numbers_are_labels() -> None:
    counts, labels, _ = both(60, 40)
    given = np.array([str(label)[-1:] for label in labels[:60]], dtype=object).astype(int).astype(object)
    missing = np.concatenate([given, np.array([np.nan, None] * 20, dtype=object)])
    result = fit(counts, missing, overrides={"n_epochs": 2})
    assert result.classifier.classes == ["0", "1", "2"]
    assert "unsupervised_loss" in result.history


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["Unlabeled"] * 60, {}, "the 0 labelled cells have 0 label"),
        (["B cell"] * 60, {}, "the 60 labelled cells have 1 label.*B cell; two or more are needed"),
        (["B cell", "T cell"] * 20, {}, "there are 40 labels of 60 cells; give one per cell"),
        (["B cell", "T cell"] * 30, {"validation": np.arange(60) % 2 == 0}, "all cells of B cell are for validation"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: list[str], arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(simulated(60)[0], np.array(labels, dtype=object), **arguments)


def test_a_class_with_one_cell_is_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    counts, labels = simulated(60)
    labels[0], labels[1:9] = "rare", "unlabelled"
    with caplog.at_level(logging.WARNING):
        result = fit(counts, labels, overrides={"n_epochs": 2})
    assert "only one cell to train on: rare" in caplog.text
    assert "unlabelled is trained like a cell type; label such cells 'Unlabeled' instead" in caplog.text
    assert not result.validation[0]


def test_a_killed_training_resumes_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels, _ = both(90, 60)
    overrides = {"unsup_mean_teacher": True, "n_epochs": 8}
    whole = fit(counts, labels, overrides=overrides)

    def killed(_: Any, trainer: Any, __: Any) -> None:
        if trainer.current_epoch == 5:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(training.Epochs, "on_train_epoch_end", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(counts, labels, folder=tmp_path, overrides=overrides)
    assert (tmp_path / "checkpoint.ckpt").exists()
    with pytest.raises(UserError, match="checkpoint in the folder is of a training with other seed"):
        fit(counts, labels, folder=tmp_path, overrides=overrides, seed=1)
    resumed = fit(counts, labels, folder=tmp_path, overrides=overrides)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.best_epoch == whole.best_epoch
    np.testing.assert_allclose(resumed.history["train_loss"], whole.history["train_loss"], rtol=1e-6)
    assert not (tmp_path / "checkpoint.ckpt").exists()
    assert list((tmp_path / "tb_logs").glob("events.*"))


# --- saved form and predictions


def test_a_saved_classifier_is_the_same_without_the_settings_and_without_pickle(
    trained: Trained, tmp_path: Path
) -> None:
    counts, _ = simulated(50, seed=3)
    trained.classifier.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, WEIGHTS]
    loaded = Classifier.load(tmp_path)
    one, other = (some.predict(InMemory(counts), GENES) for some in (trained.classifier, loaded))
    np.testing.assert_array_equal(one.probability, other.probability)
    assert loaded.settings.n_hidden == 16  # not the default
    assert (loaded.genes, loaded.classes) == (GENES, ["type 0", "type 1", "type 2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "census_scvi": "9.1"}, "has format 2, this version of census-scvi reads 1; .*9.1"),
        ({"classes": ["one"]}, "damaged"),
        ({"classes": ["a", "a", "b"]}, "classes are not unique"),
        ({"settings": {"n_layers": 10**9}}, "damaged"),
        ({"settings": {"n_hidden": 2**14, "n_hidden_init": 2**14}}, "not those of the described network"),
        ({"genes": GENES[:5]}, "not those of the described network"),
    ],
)
def test_a_saved_classifier_that_was_changed_is_refused(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    trained.classifier.save(tmp_path)
    path = tmp_path / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        Classifier.load(tmp_path)


def test_missing_and_damaged_files_are_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classifier.json does not exist; train a classifier first"):
        Classifier.load(tmp_path)
    trained.classifier.save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-50])
    with pytest.raises(UserError, match=r"classifier.safetensors cannot be used"):
        Classifier.load(tmp_path)


def test_genes_are_matched_by_name_and_cells_are_normalised_over_the_genes_that_they_have(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    counts, truth = simulated(200, seed=4)
    whole = trained.classifier.predict(InMemory(counts), GENES)
    order = np.random.default_rng(0).permutation(N_GENES)
    with_versions = [f"{GENES[number]}.3" for number in order] + ["another gene"]
    shuffled = sp.csr_matrix(sp.hstack([counts[:, order], sp.csr_matrix(np.ones((200, 1), np.float32))]))
    same = trained.classifier.predict(InMemory(shuffled), with_versions)
    np.testing.assert_allclose(same.probability, whole.probability, atol=1e-5)
    kept = np.arange(N_GENES) % 2 == 0
    with caplog.at_level(logging.WARNING):
        half = trained.classifier.predict(
            InMemory(sp.csr_matrix(counts[:, kept])), [gene for gene, keep in zip(GENES, kept, strict=True) if keep]
        )
    assert f"60 of the classifier's {N_GENES} genes are missing" in caplog.text
    assert (half.labels == truth).mean() > 0.8
    aligned = trained.classifier.align(InMemory(sp.csr_matrix(counts[:, kept])), list(np.array(GENES)[kept]))
    values = log_cpm(to_tensor(aligned.read([(0, 200)]))).numpy()
    np.testing.assert_allclose(np.expm1(values).sum(axis=1), 1e6, rtol=1e-4)
    assert (values[:, ~kept] == 0).all()


def test_cells_without_a_gene_of_the_classifier_are_refused(trained: Trained) -> None:
    counts, _ = simulated(5)
    message = r"none of the 120 genes of these cells \(such as Gapdh0\) is one of the classifier's 120 \(such as ENSG0"
    with pytest.raises(UserError, match=message):
        trained.classifier.predict(InMemory(counts), [f"Gapdh{number}" for number in range(N_GENES)])


def test_no_cells_have_no_labels_and_a_gpu_that_is_not_there_is_refused(trained: Trained) -> None:
    none = InMemory(sp.csr_matrix((0, N_GENES), dtype=np.float32))
    assert trained.classifier.predict(none, GENES).probability.shape == (0, 3)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="accelerator is gpu, but torch finds no GPU here"):
            fit(*simulated(30), accelerator="gpu")


def test_twenty_thousand_genes_are_aligned_quickly(trained: Trained) -> None:
    genes = [*(f"gene {number}" for number in range(20_000)), *GENES]
    counts = sp.random(500, len(genes), density=0.05, format="csr", dtype=np.float32, random_state=0)
    started = time.process_time()
    aligned = trained.classifier.align(InMemory(counts), genes)
    found = aligned.read([(0, 500)])
    assert time.process_time() - started < 3
    assert found.dtype == np.float32
    assert (found != counts[:, -N_GENES:]).nnz == 0


def test_the_annotator_gives_absent_classes_no_probability() -> None:
    counts, _, truth = both(240, 60)
    batch = np.repeat(["a", "b", "query"], [210, 30, 60]).astype(object)
    annotator = ScNym(overrides=SMALL)
    annotator.fit(Cells(counts, batch, 240, GENES))
    codes = np.array([int(str(label)[-1]) for label in truth])
    train_rows = np.flatnonzero((np.arange(300) < 240) & (codes != 1))
    test_rows = np.flatnonzero((np.arange(300) >= 240) & (codes != 1))[::-1].copy()
    found = annotator.predict(train_rows, codes[train_rows], 4, test_rows)
    assert (found[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert (found.argmax(axis=1) == codes[test_rows]).mean() > 0.9
    one = annotator.predict(train_rows[:1], codes[train_rows[:1]], 4, test_rows)
    assert (one[:, codes[train_rows[0]]] == 1).all()


# --- interpretation


def test_contributions_add_up_to_the_difference_of_the_outputs_and_find_the_markers(trained: Trained) -> None:
    counts, labels = simulated(150, seed=5)
    found = expected_gradients(trained.classifier, InMemory(counts), GENES, labels, "type 1", n_samples=100)
    assert found.completeness == pytest.approx(1, abs=0.03)
    assert found.gradients.shape == (50, N_GENES)
    order = [GENES.index(gene) // MARKERS for gene in found.top(MARKERS).index]
    assert order[:3] == [1, 1, 1]
    assert max(order) <= 2  # the absence of other markers speaks for the class, too
    assert found.saliency.is_monotonic_decreasing
    assert found.top(5).columns.tolist() == ["saliency", "share", "target", "reference"]
    again = expected_gradients(trained.classifier, InMemory(counts), GENES, labels, "type 1", n_samples=100)
    np.testing.assert_array_equal(found.gradients, again.gradients)


def test_one_class_with_few_cells_can_be_the_reference(trained: Trained) -> None:
    counts, labels = simulated(60, seed=5)
    few = np.flatnonzero((labels != "type 2") | (np.cumsum(labels == "type 2") <= 2))
    found = expected_gradients(
        trained.classifier, InMemory(counts[few]), GENES, labels[few], "type 0", against="type 2", n_samples=60
    )
    assert found.completeness == pytest.approx(1, abs=0.05)
    picture = found.draw(10, symbols={found.saliency.index[0]: "CD3E"})
    assert picture.axes[0].get_yticklabels()[-1].get_text() == "CD3E"
    assert picture.axes[0].get_title() == "type 0, compared with type 2"


@pytest.mark.slow
def test_real_blood_cells_are_annotated_by_their_known_markers(real_data: Path) -> None:
    blood = ad.read_h5ad(real_data / "pbmc_multi_human.h5ad")
    cells = blood[(blood.obs["dataset"] == "pbmc3k") & (blood.obs["cell_type_coarse"] != "unknown")]
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    used = np.argsort(-np.asarray((counts > 0).sum(axis=0)).ravel())[:3000]
    symbols = cells.var["feature_name"].astype(str).to_numpy()[used].tolist()
    source, labels = InMemory(counts[:, used]), cells.obs["cell_type_coarse"].astype(str).to_numpy(dtype=object)
    settings = hyperparameters("supervised", {"n_epochs": 12, "min_epochs": 5})
    classifier = train(source, symbols, labels, settings, accelerator="cpu").classifier
    for name, markers in {
        "B cell": {"CD79A", "CD79B", "MS4A1", "CD74", "HLA-DRA", "CD37"},
        "NK cell": {"NKG7", "GNLY", "GZMB", "PRF1", "CST7", "CTSW"},
        "CD14 monocyte": {"LYZ", "S100A8", "S100A9", "CST3", "FCN1", "TYROBP"},
    }.items():
        found = expected_gradients(classifier, source, symbols, labels, name, n_samples=20)
        assert len(markers & set(found.top(30).index)) >= 3, (name, found.top(30))
        assert found.completeness == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("target", "against", "message"),
    [
        ("type 7", None, r"'type 7' is not a class of the classifier; did you mean type \d\? \(classes: type 0, "),
        ("type 0", "type 0", "compared with itself"),
        ("type 0", "type 2", "there are no cells of class 'type 2' with counts"),
    ],
)
def test_a_class_that_cannot_be_explained_is_named(trained: Trained, target: str, against: Any, message: str) -> None:
    counts, labels = simulated(60, seed=5)
    some = np.flatnonzero(labels != "type 2")
    with pytest.raises(UserError, match=message):
        expected_gradients(trained.classifier, InMemory(counts[some]), GENES, labels[some], target, against=against)
