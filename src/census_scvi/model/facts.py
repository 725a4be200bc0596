"""Properties of a built scVI module, read from its layers, to compare them with its config."""

from __future__ import annotations

from typing import Any

import scvi
import torch

from census_scvi.model.build import build_model, init_arguments
from census_scvi.model.settings import ModelSection


def built_facts(model: scvi.model.SCVI, genes: list[str]) -> dict[str, Any]:
    """Widths, dropout, likelihood, number of parameters and genes of a model, read from its module."""
    module = model.module
    encoder, decoder = module.z_encoder.encoder, module.decoder.px_decoder
    dropout = {layer.p for layer in encoder.modules() if isinstance(layer, torch.nn.Dropout)}
    return {
        "n_hidden": sorted(set(_widths(encoder) + _widths(decoder))),
        "n_layers": [len(_widths(encoder)), len(_widths(decoder))],
        "n_latent": module.z_encoder.mean_encoder.out_features,
        "dropout_rate": sorted(dropout),
        "gene_likelihood": module.gene_likelihood,
        "encode_covariates": bool(module.encode_covariates),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "genes": genes,
    }


def expected_facts(settings: ModelSection, genes: list[str], batches: list[str]) -> dict[str, Any]:
    """The same properties of the model that a config's `model` section defines."""
    fresh = build_model(genes, batches, init_arguments(settings))
    return {
        "n_hidden": [settings.n_hidden],
        "n_layers": [settings.n_layers] * 2,
        "n_latent": settings.n_latent,
        "dropout_rate": [settings.dropout_rate],
        "gene_likelihood": settings.gene_likelihood,
        "encode_covariates": settings.encode_covariates,
        "parameters": sum(parameter.numel() for parameter in fresh.module.parameters()),
        "genes": genes,
    }


def _widths(layers: torch.nn.Module) -> list[int]:
    return [layer.out_features for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
