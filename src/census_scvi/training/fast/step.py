"""Fast training step of scvi-tools' VAE: same parameters, same random numbers, same loss and gradients.

Differences from `VAE.forward`:

- log1p is computed for non-zero counts only;
- matrix products are computed by the library that is faster on the processor (`products`);
- the encoder's first layer is computed from the non-zero counts only, if that is faster (`sparse_layer`);
- the weights of a batch are looked up as a row, whereas scvi-tools appends a one-hot matrix to the inputs;
- the loss is computed by `negative_binomial`;
- layers that do not affect the loss are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scvi.module import TOTALVAE, VAE
from scvi.module.base import LossOutput
from scvi.nn import FCLayers
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from census_scvi.counts.minibatch import Minibatch, SparseCounts
from census_scvi.model.sparse_layer import sparse_layer, usable
from census_scvi.training.fast import products
from census_scvi.training.fast.negative_binomial import (
    Dispersion,
    Head,
    compiled_kernel,
    reconstruction_loss,
)


def reason_against(module: VAE) -> str:
    """Why the fast step cannot train this module; "" if it can."""
    if type(module) is not VAE:
        return f"its class is {type(module).__name__}"
    decoder = module.decoder.px_decoder
    more = len(decoder.n_cat_list) > 1 or decoder.fc_layers[0][0].in_features != module.n_latent + decoder.n_cov
    reasons = {
        f"gene_likelihood is {module.gene_likelihood}": module.gene_likelihood not in ("nb", "zinb"),
        f"batch_representation is {module.batch_representation}": module.batch_representation != "one-hot",
        "it learns library sizes": not module.use_observed_lib_size,
        "it has size factors": module.use_size_factor_key,
        "it has covariates other than the batch": more,
        "its counts are not transformed by log1p": not module.log_variational,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def step(module: VAE, minibatch: Minibatch, kl_weight: float | torch.Tensor) -> LossOutput:
    """Loss of a minibatch, as `VAE.forward` gives it.

    Parameters
    ----------
    module
        A module for which `reason_against` returns "".
    minibatch
        `{"X": SparseCounts, "batch": int64 (cells, 1), "labels": int64 (cells, 1)}` on the module's device.
    kl_weight
        Weight of the KL divergence; a tensor () on the module's device where the weight of a CUDA graph changes.

    Raises
    ------
    ValueError
        The minibatch has one cell in training mode: BatchNorm cannot normalise it.
    """
    counts, batch = minibatch["X"], minibatch["batch"].squeeze(1)
    posterior, latent = encode(module, counts, batch)
    kl = kl_divergence(posterior, Normal(torch.zeros_like(latent), torch.ones_like(latent), False)).sum(-1)
    hidden = _hidden(module.decoder.px_decoder, latent, batch)
    dispersion = _dispersion(module, hidden, batch, minibatch["labels"].squeeze(1))
    scale, dropout = module.decoder.px_scale_decoder[0], module.decoder.px_dropout_decoder
    mean, reconstruction = reconstruction_loss(
        hidden,
        Head(scale.weight, scale.bias),
        dispersion,
        counts,
        Head(dropout.weight, dropout.bias) if module.gene_likelihood == "zinb" else None,
    )
    return LossOutput(
        loss=mean + kl_weight * kl.mean(),
        reconstruction_loss=reconstruction,
        kl_local={"kl_divergence_l": torch.zeros_like(kl), "kl_divergence_z": kl},
    )


def encode(module: VAE, counts: SparseCounts, batch: torch.Tensor) -> tuple[Normal, torch.Tensor]:
    """Posterior q(z | x) of cells and a sample of it, (cells, n_latent) each."""
    encoder = module.z_encoder
    dtype = encoder.mean_encoder.weight.dtype
    inputs = counts if _stay_sparse(counts, dtype) else _log_counts(counts, dtype)
    hidden = _hidden(encoder.encoder, inputs, batch)
    mean = encoder.mean_encoder(hidden).to(dtype)  # reduced precision is used for matrix products only
    variance = encoder.var_activation(encoder.var_encoder(hidden).to(dtype)) + encoder.var_eps
    posterior = Normal(mean, variance.sqrt(), validate_args=False)  # validation would wait for the GPU
    return posterior, encoder.z_transformation(posterior.rsample())


def _log_counts(counts: SparseCounts, dtype: torch.dtype) -> torch.Tensor:
    """(cells, genes): log(1 + counts), dense, for matrix products."""
    kernel = compiled_kernel("cuda") if counts.counts.is_cuda and dtype == torch.float32 else None
    return (
        kernel.log_counts(counts, products.product_dtype(counts.counts.device, dtype))
        if kernel
        else counts.dense(dtype, log1p=True)
    )


def _stay_sparse(counts: SparseCounts, dtype: torch.dtype) -> bool:
    """Whether the encoder's first layer is computed from the non-zero counts only."""
    device = counts.counts.device.type
    float32_on_cpu = device == "cpu" and dtype == torch.float32 and not torch.is_autocast_enabled(device)
    return float32_on_cpu and products.used().counts == "sparse" and usable()


def _hidden(layers: FCLayers, x: Any, batch: torch.Tensor) -> torch.Tensor:
    """`layers(x, batch)`, or `layers(log1p(x), batch)` for sparse counts; the weights of the batch are looked up."""
    for number, (first, *others) in enumerate(layers.fc_layers):
        takes_batch = layers.n_cov and layers.inject_into_layer(number)
        if isinstance(x, SparseCounts):
            x = sparse_layer(x, batch if takes_batch else None, first.weight, first.bias)
        elif takes_batch:
            n_inputs = first.in_features - layers.n_cov
            x = products.linear(x, first.weight[:, :n_inputs], first.bias)
            x = x + functional.embedding(batch, first.weight[:, n_inputs:].T)
        else:
            x = products.linear(x, first.weight, first.bias)
        for layer in others:
            x = x if layer is None else layer(x)
    return x


def _dispersion(module: VAE, hidden: torch.Tensor, batch: torch.Tensor, labels: torch.Tensor) -> Dispersion:
    if module.dispersion == "gene":
        return Dispersion(module.px_r.exp().unsqueeze(0), torch.zeros_like(batch))
    if module.dispersion == "gene-cell":
        head = module.decoder.px_r_decoder
        theta = products.linear(hidden, head.weight, head.bias).to(head.weight.dtype).exp()
        return Dispersion(theta, torch.arange(len(batch), device=batch.device))
    return Dispersion(module.px_r.T.exp().contiguous(), batch if module.dispersion == "gene-batch" else labels)


def _unused_by_scvi(module: VAE) -> list[torch.nn.Parameter]:
    decoder = module.decoder
    unused: list[torch.nn.Parameter] = []
    if module.use_observed_lib_size:
        unused += module.l_encoder.parameters()
    if module.gene_likelihood != "zinb":
        unused += decoder.px_dropout_decoder.parameters()
    if module.dispersion != "gene-cell":
        unused += decoder.px_r_decoder.parameters()
        if module.gene_likelihood == "poisson":
            unused.append(module.px_r)
    return unused


def _unused_by_totalvi(module: TOTALVAE) -> list[torch.nn.Parameter]:
    encoder = module.encoder
    unused: list[torch.nn.Parameter] = []
    if module.use_observed_lib_size:
        for layers in (encoder.l_gene_encoder, encoder.l_gene_mean_encoder, encoder.l_gene_var_encoder):
            unused += layers.parameters()
    if module.gene_likelihood != "zinb":
        unused += module.decoder.px_dropout_decoder_gene.parameters()
    return unused


@contextmanager
def unused_frozen(module: VAE | TOTALVAE) -> Iterator[None]:
    """Disable the gradients of the parameters that do not affect the loss of this module.

    Otherwise the optimiser and DDP would process them: they are more than half of scVI's parameters.
    """
    unused = _unused_by_totalvi(module) if isinstance(module, TOTALVAE) else _unused_by_scvi(module)
    before = [parameter.requires_grad for parameter in unused]
    for parameter in unused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(unused, before, strict=True):
            parameter.requires_grad_(required)
