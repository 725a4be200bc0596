"""Train scVI on a sample of the reference and the query together, without labels, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scvi
import torch

from census_scvi.counts.minibatch import Minibatch, SparseCounts
from census_scvi.model.build import build_model
from census_scvi.model.encode import Encoder
from census_scvi.terminal.progress import progress_bar
from census_scvi.training.fast import products
from census_scvi.training.fast.measure import faster_libraries
from census_scvi.training.fast.step import step, unused_frozen
from census_scvi.training.threads import one_thread

STEPS = 1_000
_MINIBATCH_CELLS, _LEARNING_RATE, _WARMUP = 128, 1e-3, 0.4
# Arguments of the model's class.
ARGUMENTS: dict[str, Any] = {
    "n_hidden": 128,
    "n_latent": 30,
    "n_layers": 2,
    "dropout_rate": 0.1,
    "gene_likelihood": "nb",
    "encode_covariates": False,
}


def train_joint(
    counts: sp.csr_matrix,
    batch: npt.NDArray[np.object_],
    genes: list[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> scvi.model.SCVI:
    """A model of all cells, on the GPU if there is one; the random numbers of the process are not changed.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts.
    batch
        object (cells,): batch of each cell.
    genes
        feature_ids of the columns.
    steps
        Number of minibatches of 128 cells.
    seed
        Seed of the weights, of the minibatches and of the samples of the posterior.
    """
    with seeded(seed):
        model = build_model(genes, sorted(set(map(str, batch))), ARGUMENTS, n_cells=counts.shape[0])
        model.to_device("cuda:0" if torch.cuda.is_available() else "cpu")
        codes = np.unique(batch.astype(str), return_inverse=True)[1]
        with _faster_products(counts, ARGUMENTS["n_hidden"]):
            _train(model, counts, codes, steps, np.random.default_rng(seed))
    model.is_trained = True
    return model


def joint_latent(model: scvi.model.SCVI, counts: sp.csr_matrix) -> npt.NDArray[np.float32]:
    """Posterior means of cells, float32 (cells, n_latent)."""
    return Encoder(model)(counts.astype(np.float32), np.zeros(counts.shape[0], np.int64)).mean


def _train(
    model: scvi.model.SCVI,
    counts: sp.csr_matrix,
    codes: npt.NDArray[np.int64],
    steps: int,
    generator: np.random.Generator,
) -> None:
    module = model.module.train()
    minibatches = _minibatches(counts, codes, steps, generator)
    with unused_frozen(module), progress_bar(steps, "train the joint model", unit="steps") as bar:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE, eps=0.01, weight_decay=1e-6, fused=True)
        for number, minibatch in enumerate(minibatches):
            loss = step(module, minibatch_on(minibatch, module.device), min(1.0, (number + 1) / (_WARMUP * steps))).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update(1)
    module.eval()


def minibatch_on(minibatch: Minibatch, device: torch.device) -> Minibatch:
    """The minibatch on a device."""
    return {name: values.to(device) for name, values in minibatch.items()}


def _minibatches(
    counts: sp.csr_matrix, codes: npt.NDArray[np.int64], steps: int, generator: np.random.Generator
) -> Iterator[Minibatch]:
    """Random minibatches: every cell once per epoch, except those that do not fill the last minibatch."""
    counts = sp.csr_matrix(counts, dtype=np.float32)
    size = min(_MINIBATCH_CELLS, counts.shape[0])
    dtype = np.uint16 if counts.shape[1] <= 2**16 else np.int32
    done = 0
    while done < steps:
        order = generator.permutation(counts.shape[0])
        for start in range(0, len(order) - size + 1, size):
            if done == steps:
                return
            rows = np.sort(order[start : start + size])
            some = counts[rows]
            batch = torch.from_numpy(codes[rows]).unsqueeze(1)
            sparse = SparseCounts(
                torch.from_numpy(np.diff(some.indptr).astype(np.int64)),
                torch.from_numpy(some.indices.astype(dtype)),
                torch.from_numpy(some.data),
                counts.shape[1],
            )
            yield {"X": sparse, "batch": batch, "labels": torch.zeros_like(batch)}
            done += 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from a seed, and one thread; those of the process are not changed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), one_thread():
        torch.manual_seed(seed)
        yield


@contextmanager
def _faster_products(counts: sp.csr_matrix, n_hidden: int) -> Iterator[None]:
    """Use the libraries for matrix products that are faster on this processor."""
    before = products.used()
    n_cells, n_genes = counts.shape
    products.use(faster_libraries(n_genes, n_hidden, counts.nnz / max(n_cells * n_genes, 1)))
    try:
        yield
    finally:
        products.use(before)
