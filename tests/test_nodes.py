"""Training on two nodes: the gradients of one process, and what a kill and another number of processes do."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nodes import on_two_nodes
from pipeline import Run, forked, run_code

from census_scvi.model.safe import load_safe

TRAIN: dict[str, Any] = {"max_epochs": 4, "batch_size": 64, "num_nodes": 2, "checkpoint_minutes": 0.0}
# The gradients before the first step of the optimiser, of a model that draws no latent samples.
KEEP_GRADIENTS = """
import os
from pathlib import Path
import torch
from torch.distributions import Normal
from census_scvi.training.callbacks import LearningCurves

def keep(self, trainer, plan, optimizer):
    if trainer.datamodule is None:  # the rehearsal of the settings
        return
    found = {{name: p.grad.clone() for name, p in plan.module.named_parameters() if p.grad is not None}}
    torch.save(found, Path({folder!r}) / f"{{trainer.world_size}}-{{trainer.global_rank}}.pt")

Normal.rsample = lambda self, sample_shape=(): self.loc
LearningCurves.on_before_optimizer_step = keep
"""
# Ends the process of one node after the second epoch, like kill -9.
KILL = """
import os, signal
from census_scvi.training.callbacks import LearningCurves
after = LearningCurves.on_train_epoch_end
def end(self, trainer, plan):
    after(self, trainer, plan)
    if trainer.current_epoch == 2 and trainer.global_rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
LearningCurves.on_train_epoch_end = end
"""
TRAINED_ALONE = """
import sys
from census_scvi.cli import main
sys.exit(main("train", sys.argv[1:]))
"""


def prepared(folder: Path, uri: str, **sections: Any) -> Run:
    """A run directory in which nothing is trained yet."""
    run = Run(folder, uri, **sections)
    assert run("prepare") == 0
    return run


@pytest.mark.parametrize("engine", ["fast", "scvi-tools"])
def test_averaged_gradients_are_those_of_one_process(engine: str, demo_census: str, tmp_path: Path) -> None:
    """Of the same minibatch: all cells, half of them on each node; without BatchNorm, dropout and latent samples."""
    model = {"n_hidden": 16, "n_latent": 4, "dropout_rate": 0.0, "arguments": {"use_batch_norm": "none"}}
    train = {"max_epochs": 1, "max_cells": 400, "engine": engine}
    run = prepared(tmp_path, demo_census, model=model, train=train)
    before = KEEP_GRADIENTS.format(folder=str(tmp_path))
    config = ["--config", str(run.config)]
    assert forked(run_code, before + TRAINED_ALONE, *config, "train.batch_size=400").returncode == 0
    for process in on_two_nodes(run, "--force", "train.batch_size=200", "train.num_nodes=2", before=before):
        assert process.returncode == 0, process.stderr
    alone, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    assert largest > 0.1
    for found in both:
        assert found.keys() == alone.keys()
        for name, gradient in alone.items():
            np.testing.assert_allclose(found[name], gradient, atol=1e-5 * largest, rtol=1e-5)


@pytest.fixture(scope="module")
def undisturbed(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training on two nodes, started by torchrun."""
    run = prepared(tmp_path_factory.mktemp("nodes"), demo_census, train=TRAIN)
    for process in on_two_nodes(run, launcher="torchrun"):
        assert process.returncode == 0, process.stderr
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_of_which_a_process_was_killed_resumes(
    rank: int, undisturbed: Run, demo_census: str, tmp_path: Path
) -> None:
    """The other process says what happened, and both go on where they were; srun starts them."""
    run = prepared(tmp_path, demo_census, train=TRAIN)
    processes = on_two_nodes(run, before=KILL.format(rank=rank), launcher="srun")
    assert processes[rank].returncode == -signal.SIGKILL
    other = processes[1 - rank]
    assert other.returncode == 2, other.stderr
    (error,) = [line for line in other.stderr.splitlines() if line.startswith("error:")]
    assert "another process of this training ended, or cannot be reached" in error
    assert "start the same command on each node again: it resumes from the last checkpoint" in error
    assert "Traceback" not in other.stderr

    alone = run.subprocess("train", "train.num_nodes=1")
    assert alone.returncode == 2
    assert "train.num_nodes was 2 and is 1" in alone.stderr

    for process in on_two_nodes(run, launcher="srun"):
        assert process.returncode == 0, process.stderr
    assert run.record("train")["resumed"]
    curves = [each.record("train")["learning_curves"]["elbo_validation"] for each in (run, undisturbed)]
    np.testing.assert_allclose(*curves, rtol=1e-6)
    models = [load_safe(each.path("scvi.model"))[0].module.state_dict() for each in (run, undisturbed)]
    for name, value in models[0].items():
        np.testing.assert_allclose(value, models[1][name], rtol=1e-5, atol=1e-6)


def test_the_number_of_nodes_has_one_name(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished_run("train", "train.trainer={num_nodes: 2}") == 2
    assert "train.trainer.num_nodes cannot be set here; set train.num_nodes" in capsys.readouterr().err
