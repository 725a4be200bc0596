"""A training step as a CUDA graph is the same training: losses, parameters, buffers and random numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scvi.module import VAE
from test_fast_step import VARIANTS, make, minibatches, some_counts

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.writer import H5adWriter
from census_scvi.model.build import build_model
from census_scvi.settings import Config
from census_scvi.training.fast.graph import StepGraph, StepGraphs
from census_scvi.training.fast.negative_binomial import compiled_kernel
from census_scvi.training.fast.plan import FastTrainingPlan
from census_scvi.training.fast.step import step
from census_scvi.training.fit import fit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch finds: ./scvi-init.sh says what is missing"
)

GPU = torch.device("cuda")


def on_gpu(seed: int, n_cells: int = 50) -> dict[str, Any]:
    ours, _ = minibatches(some_counts(n_cells, seed=seed), 3, torch.float32)
    return {name: value.to("cuda") for name, value in ours.items()}


def trained(module: VAE, minibatches: list[dict[str, Any]], *, graphs: bool, precision: torch.dtype) -> dict[str, Any]:
    """Losses, parameters, buffers and random state after a step for each minibatch."""
    torch.manual_seed(3)
    module = copy.deepcopy(module).train()
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-2)  # Adam would enlarge the rounding of tiny gradients

    def work(minibatch: dict[str, Any]) -> tuple[torch.Tensor]:
        with torch.autocast("cuda", precision, enabled=precision != torch.float32, cache_enabled=False):
            loss = step(module, minibatch, 0.4).loss
        loss.backward()
        return (loss.detach(),)

    made, losses = StepGraphs(), []
    for minibatch in minibatches:
        optimiser.zero_grad()
        graph = made.of("train", minibatch, work, module.parameters(), module.buffers(), GPU) if graphs else None
        losses.append((graph or work)(minibatch)[0].clone())
        if graph:
            made.set_gradients("train")
        optimiser.step()
    return {
        "losses": torch.stack(losses),
        "random": torch.cuda.get_rng_state(),
        **{name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())},
    }


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_trains_as_separate_launches(variant: str, precision: torch.dtype) -> None:
    """Minibatches with other numbers of non-zeros, with a last small one, and one whose non-zeros have no room."""
    assert compiled_kernel("cuda") is not None
    module = make(torch.float32, **VARIANTS[variant]).cuda()
    several = [on_gpu(0), on_gpu(1), on_gpu(2), on_gpu(3, 20), on_gpu(4), on_gpu(5)]
    dense, _ = minibatches(1 + some_counts(seed=6), 3, torch.float32)
    full = {name: value.to("cuda") for name, value in dense.items()}
    several += [full, full, on_gpu(7)]
    with_graphs = trained(module, several, graphs=True, precision=precision)
    without = trained(module, several, graphs=False, precision=precision)
    assert torch.equal(with_graphs.pop("random"), without.pop("random"))
    for name, wanted in without.items():
        torch.testing.assert_close(with_graphs[name], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_minibatch_of_another_size_does_not_fit() -> None:
    module = make(torch.float32).cuda()
    graph = StepGraph(lambda x: (step(module, x, 0.4).loss.detach(),), (), module.buffers(), on_gpu(0), GPU)
    assert graph.fits(on_gpu(0))
    assert not graph.fits(on_gpu(0, 51))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
def test_training_with_graphs_gives_the_same_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    prepared, curves = tmp_path / "cells.h5ad", {}
    counts = sp.csr_matrix(some_counts(1_000), dtype=np.float32)
    with H5adWriter(prepared, pd.DataFrame(index=[f"gene {i}" for i in range(counts.shape[1])])) as file:
        batch = pd.Categorical(np.where(np.arange(1_000) % 3, "a", "b"))
        file.append(pd.DataFrame({"batch": batch}, index=[str(i) for i in range(1_000)]), counts=counts)
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr(FastTrainingPlan, "_graph", lambda *_: None)
        data = PreparedDataModule(prepared, batch_size=64, train_size=0.8, seed=0, workers=2)
        torch.manual_seed(0)
        model = build_model(
            data.cells.genes, data.cells.batches, {"n_hidden": 32, "n_latent": 5, "gene_likelihood": "nb"}
        )
        settings = Config().train.model_copy(update={"batch_size": 64, "max_epochs": 3, "precision": precision})
        files = {"checkpoint": tmp_path / f"{graphs}.ckpt", "tensorboard": tmp_path / f"{graphs}"}
        curves[graphs] = fit(model, data, settings, {"lr": 1e-3, "n_epochs_kl_warmup": 2}, seed=0, **files).curves
        data.cells.close()
    assert curves[True].keys() == curves[False].keys()
    for name, values in curves[True].items():
        assert values == pytest.approx(curves[False][name], rel=1e-4, abs=1e-5), name
