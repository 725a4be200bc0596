"""From counts to the latent posterior: the forward pass of the encoder, with the same result as scvi-tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from scvi.module import TOTALVAE, VAE

from census_scvi.config.run_names import LABELS, PROTEIN_NAMES, PROTEINS
from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model.build import EMPIRICAL_PRIOR, Labels, Proteins, skeleton, without_training
from census_scvi.model.families import SCANVI, TOTALVI
from census_scvi.model.sparse_layer import sparse_layer, usable

_MINIBATCH_CELLS = 1024
# From this number of cells and of hidden units on, `sparse_layer` is worth the 1.6 s that compiling it takes: it needs
# a third of the time of torch's embedding_bag with 512 hidden units, and as long with 128, whose weights fit in caches.
_MANY, _WIDE = 50_000, 256


@dataclass(frozen=True)
class Latent:
    """Posterior of some cells.

    Attributes
    ----------
    mean, variance
        float32 (cells, n_latent): qz_m and qz_v.
    library_size
        float32 (cells,): sum of the counts over the model's genes.
    """

    mean: npt.NDArray[np.float32]
    variance: npt.NDArray[np.float32]
    library_size: npt.NDArray[np.float32]


class Encoder:
    """Posterior mean and variance of cells, with the same result as scvi-tools, for every kind of model.

    If the encoder of counts uses neither the batch nor layer norm, a faster implementation is used. Counts are mostly
    zeros and log1p keeps zeros, so on a CPU the first layer is a weighted sum of a few rows of its weights. At
    inference, BatchNorm is folded into the linear layer before it.

    Parameters
    ----------
    model
        A trained model, on the device to use; later changes to the model have no effect.
    n_cells
        About how many cells will be encoded, in this process and others: what is worth compiling is used for all of
        them, so that the same cells have the same latent, to the last bit, in whatever process.
    """

    def __init__(self, model: scvi.model.SCVI, *, n_cells: int = 0) -> None:
        self._module = model.module.eval()
        can_fold = _can_fold(self._module)
        self._folded = _FoldedEncoder(self._module.z_encoder, n_cells >= _MANY) if can_fold else None

    @torch.inference_mode()
    def __call__(
        self,
        counts: sp.csr_matrix,
        batch_codes: npt.NDArray[np.integer],
        proteins: npt.NDArray[np.float32] | None = None,
        *,
        minibatch: int = _MINIBATCH_CELLS,
    ) -> Latent:
        """Encode cells.

        Parameters
        ----------
        counts
            CSR float32 (cells, genes), genes in the model's order.
        batch_codes
            Integers (cells,), positions in the model's batches; only a model with `encode_covariates` uses them.
        proteins
            Counts of proteins for TOTALVI, float32 (cells, proteins), 0 for proteins that were not measured; None: no
            protein was measured.
        minibatch
            Cells encoded at a time; changes the result by float32 rounding at most.
        """
        device = self._module.device
        means, variances, library_sizes = [], [], []
        for start in range(0, counts.shape[0], minibatch):
            rows = slice(start, min(start + minibatch, counts.shape[0]))
            some = _sparse(counts, rows).to(device)
            if self._folded is not None:
                mean, variance = self._folded(some)
            else:
                some_proteins = None if proteins is None else proteins[rows]
                mean, variance = self._as_scvi_tools(some, batch_codes[rows], some_proteins)
            means.append(mean)
            variances.append(variance)
            library_sizes.append(some.library_size())
        # Copied from a GPU at the end only: each copy would wait for it.
        return Latent(*(torch.cat(parts).cpu().numpy() for parts in (means, variances, library_sizes)))

    def _as_scvi_tools(
        self,
        counts: SparseCounts,
        batch_codes: npt.NDArray[np.integer],
        proteins: npt.NDArray[np.float32] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # TOTALVI looks up a prior of the batch, also if its encoder does not use the batch.
        codes = batch_codes if self._module.encode_covariates else np.zeros(len(batch_codes))
        batch = torch.from_numpy(codes.astype(np.int64)).unsqueeze(1)
        tensors = {"X": counts.dense(), "batch": batch, "labels": torch.zeros_like(batch)}
        if isinstance(self._module, TOTALVAE):
            if proteins is None:
                proteins = np.zeros((len(counts), self._module.n_input_proteins), np.float32)
            tensors["proteins"] = torch.from_numpy(np.ascontiguousarray(proteins))
        inputs = self._module._get_inference_input(  # the inputs differ between kinds of models
            {name: tensor.to(self._module.device) for name, tensor in tensors.items()}
        )
        posterior = self._module.inference(**inputs)["qz"]
        return posterior.loc, posterior.scale.square()


def _sparse(counts: sp.csr_matrix, rows: slice) -> SparseCounts:
    """Some cells, without copying their counts."""
    ends = counts.indptr[rows.start : rows.stop + 1].astype(np.int64)
    there = slice(ends[0], ends[-1])
    columns, values = (torch.from_numpy(part[there]) for part in (counts.indices, counts.data))
    return SparseCounts(torch.from_numpy(np.diff(ends)), columns, values, counts.shape[1])


def _can_fold(module: Any) -> bool:
    """Whether the encoder is what `_FoldedEncoder` computes: log1p of counts; Linear, BatchNorm and ReLU only."""
    if module.encode_covariates or not isinstance(module, VAE) or not module.log_variational:
        return False
    layers = [layer for layers in module.z_encoder.encoder.fc_layers for layer in layers if layer is not None]
    kinds = [type(layer) for layer in layers if not isinstance(layer, torch.nn.Dropout)]
    return kinds == [torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.ReLU] * (len(kinds) // 3)


class _FoldedEncoder:
    """scvi-tools' encoder without covariates: sparse first layer, BatchNorm folded into the linear layers."""

    def __init__(self, encoder: scvi.nn.Encoder, many: bool) -> None:
        layers = [_fold(layer) for layer in encoder.encoder.fc_layers]
        (self._weight, self._bias), self._hidden = layers[0], layers[1:]
        self._of_gene = self._weight.T.contiguous()  # one row per gene
        self._compiled = many and len(self._bias) >= _WIDE and self._weight.device.type == "cpu" and usable()
        self._mean, self._variance = encoder.mean_encoder, encoder.var_encoder
        self._activation, self._least_variance = encoder.var_activation, encoder.var_eps

    def __call__(self, counts: SparseCounts) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu_(self._first_layer(counts))
        for weight, bias in self._hidden:
            hidden = torch.relu_(torch.nn.functional.linear(hidden, weight, bias))
        return self._mean(hidden), self._activation(self._variance(hidden)) + self._least_variance

    def _first_layer(self, counts: SparseCounts) -> torch.Tensor:
        if counts.counts.is_cuda:  # a dense product is several times as fast there
            return torch.nn.functional.linear(counts.dense(log1p=True), self._weight, self._bias)
        if self._compiled:
            return sparse_layer(counts, None, self._weight, self._bias)
        summed = torch.nn.functional.embedding_bag(
            counts.genes.long(),
            self._of_gene,
            torch.nn.functional.pad(counts.n_detected.cumsum(0), (1, 0)),
            mode="sum",
            per_sample_weights=counts.counts.log1p(),
            include_last_offset=True,
        )
        return summed.add_(self._bias)


def _fold(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out,) of Linear and BatchNorm combined, float32, computed in float64."""
    linear, norm = layer[0], layer[1]
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = linear.weight.double() * scale[:, None]
    bias = (linear.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    return weight.float().detach(), bias.float().detach()


def reference_latent(
    model: scvi.model.SCVI,
    genes: list[str],
    counts: sp.csr_matrix,
    batches: npt.ArrayLike,
    proteins: npt.NDArray[np.float32] | None = None,
    *,
    accelerator: str = "cpu",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Posterior of cells by scvi-tools' own `load_query_data` and `get_latent_representation`.

    Parameters
    ----------
    model
        The trained model.
    genes
        feature_ids of the columns.
    counts
        CSR float32 (cells, genes).
    batches
        Batch label of each cell.
    proteins
        Counts of proteins for TOTALVI, float32 (cells, proteins).
    accelerator
        cpu or gpu.

    Returns
    -------
    Posterior means and variances, float32 (cells, n_latent) each.
    """
    obs = pd.DataFrame({"batch": np.asarray(batches, dtype=object)}, index=[str(i) for i in range(counts.shape[0])])
    query = ad.AnnData(counts.copy(), obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="feature_id")))
    if type(model).__name__ == SCANVI:
        query.obs[LABELS] = model.unlabeled_category_
    if proteins is not None:
        query.obsm[PROTEINS] = proteins
        query.uns[PROTEIN_NAMES] = model.adata_manager.get_state_registry("proteins").column_names
    with without_training(), without_protein_priors(model):
        mapped = type(model).load_query_data(query, model, accelerator=accelerator)
        mapped.is_trained = True
        mean, variance = mapped.get_latent_representation(return_dist=True)
    return mean, variance


@contextmanager
def without_protein_priors(model: scvi.model.SCVI) -> Iterator[None]:
    """Let scvi-tools extend a TOTALVI model without fitting the protein background of the given cells, for seconds."""
    arguments = model.init_params_["non_kwargs"]
    before = {name: arguments[name] for name in (EMPIRICAL_PRIOR,) if name in arguments}
    arguments.update(dict.fromkeys(before, False))
    try:
        yield
    finally:
        arguments.update(before)


def extend_batches(model: scvi.model.SCVI, genes: list[str], batches: list[str]) -> scvi.model.SCVI:
    """The model with more batches, as `load_query_data` returns it, but without random weights.

    scvi-tools leaves the weights of a batch that the model was not trained on at random initial values. Here each of
    these weights is the mean over the trained batches: the same in every run, and in the middle of the trained range.
    This does not replace training: expression decoded with such a batch is meaningless.

    Parameters
    ----------
    model
        The trained model.
    genes
        Its genes.
    batches
        More batch labels; those that the model has already are ignored.

    Returns
    -------
    A new model, on the CPU, in eval mode; its registry lists the trained batches first.
    """
    trained = batch_labels(model)
    every = labels_with(trained, batches)
    labels, proteins = inputs_of(model)
    with without_training(), without_protein_priors(model):
        cells = skeleton(genes, every, labels, proteins)
        extended = type(model).load_query_data(cells, model, accelerator="cpu")
    weights = extended.module.state_dict()
    for name, reference in model.module.state_dict().items():
        if weights[name].shape != reference.shape:
            _fill_new_batches(weights[name], reference.cpu(), len(trained), len(every) - len(trained))
    extended.module.load_state_dict(weights)
    extended.module.eval()
    extended.is_trained = True
    return extended


def _fill_new_batches(weights: torch.Tensor, reference: torch.Tensor, n_trained: int, n_new: int) -> None:
    """Set the weights of new batches, which are the last ones in one dimension, to the mean of the trained ones.

    The layers of a model with one batch have no weights of batches: all of them are new, and 0 changes nothing.
    """
    dim = next(d for d in range(weights.ndim) if weights.shape[d] != reference.shape[d])
    n_added = weights.shape[dim] - reference.shape[dim]
    new = weights.narrow(dim, reference.shape[dim], n_added)
    if n_added > n_new:
        new.zero_()
    else:
        trained = reference.narrow(dim, reference.shape[dim] - n_trained, n_trained)
        new.copy_(trained.mean(dim=dim, keepdim=True))


def inputs_of(model: scvi.model.SCVI) -> tuple[Labels | None, Proteins | None]:
    """Labels of a SCANVI model, and proteins of a TOTALVI model, from its registry."""
    labels, proteins, kind = None, None, type(model).__name__
    if kind == SCANVI:
        state = model.adata_manager.get_state_registry("labels")
        classes = [str(label) for label in state.categorical_mapping if label != state.unlabeled_category]
        labels = Labels(classes, str(state.unlabeled_category))
    elif kind == TOTALVI:
        state = model.adata_manager.get_state_registry("proteins")
        names = [str(name) for name in state.column_names]
        measured = state.get("protein_batch_mask") or {}
        batches = batch_labels(model)
        proteins = Proteins(
            names,
            {batches[int(code)]: [names[i] for i in np.flatnonzero(~mask)] for code, mask in measured.items()},
        )
    return labels, proteins


def labels_with(trained: list[str], batches: list[str]) -> list[str]:
    """Batch labels of an extended model: the trained batches, then the others in alphabetical order."""
    return trained + sorted(set(batches) - set(trained))


def batch_labels(model: scvi.model.SCVI) -> list[str]:
    """Batch labels in the order of the codes."""
    return [str(label) for label in model.adata_manager.get_state_registry("batch").categorical_mapping]
