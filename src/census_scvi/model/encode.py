"""From counts to the latent posterior: the forward pass of the encoder, with the same result as scvi-tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi
import torch

from census_scvi.model.build import skeleton, without_training

_MINIBATCH_CELLS = 1024


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
    """Posterior mean and variance of cells, with the same result as scvi-tools.

    If the encoder does not use the batch, a faster implementation is used. Counts are mostly zeros and log1p keeps
    zeros, so the first layer is a weighted sum of a few rows of its weights. At inference, BatchNorm is folded into the
    linear layer before it.

    Parameters
    ----------
    model
        A trained model, on the device to use; later changes to the model have no effect.
    """

    def __init__(self, model: scvi.model.SCVI) -> None:
        self._module = model.module.eval()
        self._folded = None if self._module.encode_covariates else _FoldedEncoder(self._module.z_encoder)

    @torch.inference_mode()
    def __call__(
        self, counts: sp.csr_matrix, batch_codes: npt.NDArray[np.integer], minibatch: int = _MINIBATCH_CELLS
    ) -> Latent:
        """Encode cells.

        Parameters
        ----------
        counts
            CSR float32 (cells, genes), genes in the model's order.
        batch_codes
            Integers (cells,), positions in the model's batches; only a model with `encode_covariates` uses them.
        minibatch
            Cells encoded at a time; changes the result by float32 rounding at most.
        """
        means, variances = [], []
        for start in range(0, counts.shape[0], minibatch):
            rows = slice(start, start + minibatch)
            if self._folded is not None:
                mean, variance = self._folded(counts[rows])
            else:
                mean, variance = self._as_scvi_tools(counts[rows], batch_codes[rows])
            means.append(mean.cpu().numpy())
            variances.append(variance.cpu().numpy())
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
        return Latent(np.concatenate(means), np.concatenate(variances), library_size)

    def _as_scvi_tools(
        self, counts: sp.csr_matrix, batch_codes: npt.NDArray[np.integer]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._module.device
        batch = torch.from_numpy(batch_codes.astype(np.int64)).unsqueeze(1).to(device)
        posterior = self._module.inference(torch.from_numpy(counts.toarray()).to(device), batch_index=batch)["qz"]
        return posterior.loc, posterior.scale.square()


class _FoldedEncoder:
    """scvi-tools' encoder without covariates: sparse first layer, BatchNorm folded into the linear layers."""

    def __init__(self, encoder: scvi.nn.Encoder) -> None:
        layers = [_fold(layer) for layer in encoder.encoder.fc_layers]
        (first, self._bias), self._hidden = layers[0], layers[1:]
        self._first = first.T.contiguous()  # one row per gene
        self._mean, self._variance = encoder.mean_encoder, encoder.var_encoder
        self._activation, self._least_variance = encoder.var_activation, encoder.var_eps

    def __call__(self, counts: sp.csr_matrix) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._first.device
        hidden = torch.nn.functional.embedding_bag(
            torch.from_numpy(counts.indices.astype(np.int64)).to(device),
            self._first,
            torch.from_numpy(counts.indptr.astype(np.int64)).to(device),
            mode="sum",
            per_sample_weights=torch.from_numpy(counts.data).to(device).log1p(),
            include_last_offset=True,
        )
        hidden = torch.relu_(hidden.add_(self._bias))
        for weight, bias in self._hidden:
            hidden = torch.relu_(torch.nn.functional.linear(hidden, weight, bias))
        return self._mean(hidden), self._activation(self._variance(hidden)) + self._least_variance


def _fold(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out,) of Linear and BatchNorm combined, float32, computed in float64."""
    linear, norm = layer[0], layer[1]
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = linear.weight.double() * scale[:, None]
    bias = (linear.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    return weight.float().detach(), bias.float().detach()


def reference_latent(
    model: scvi.model.SCVI, genes: list[str], counts: sp.csr_matrix, batches: npt.ArrayLike, accelerator: str = "cpu"
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
    accelerator
        cpu or gpu.

    Returns
    -------
    Posterior means and variances, float32 (cells, n_latent) each.
    """
    obs = pd.DataFrame({"batch": np.asarray(batches, dtype=object)}, index=[str(i) for i in range(counts.shape[0])])
    query = ad.AnnData(counts.copy(), obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="feature_id")))
    with without_training():
        mapped = type(model).load_query_data(query, model, accelerator=accelerator)
        mapped.is_trained = True
        mean, variance = mapped.get_latent_representation(return_dist=True)
    return mean, variance


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
    labels = labels_with(trained, batches)
    n_additional = len(labels) - len(trained)
    with without_training():
        extended = type(model).load_query_data(skeleton(genes, labels), model, accelerator="cpu")
    weights = extended.module.state_dict()
    for name, reference in model.module.state_dict().items():
        if weights[name].shape != reference.shape:  # the last columns are the one-hot batch
            of_batches = reference[..., -len(trained) :]
            weights[name][..., -n_additional:] = of_batches.mean(dim=-1, keepdim=True).cpu()
    extended.module.load_state_dict(weights)
    extended.module.eval()
    extended.is_trained = True
    return extended


def labels_with(trained: list[str], batches: list[str]) -> list[str]:
    """Batch labels of an extended model: the trained batches, then the others in alphabetical order."""
    return trained + sorted(set(batches) - set(trained))


def batch_labels(model: scvi.model.SCVI) -> list[str]:
    """Batch labels in the order of the codes."""
    return [str(label) for label in model.adata_manager.get_state_registry("batch").categorical_mapping]
