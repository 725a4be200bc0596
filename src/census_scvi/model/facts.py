"""Properties of a built module, read from its layers, to compare them with its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import scvi
import torch

from census_scvi.model.build import init_arguments
from census_scvi.model.families import SCANVI, SCVI, TOTALVI
from census_scvi.model.safe import ModelDescription
from census_scvi.model.settings import ModelSection


def built_facts(model: scvi.model.SCVI, genes: list[str]) -> dict[str, Any]:
    """Widths, dropout, likelihood, number of parameters and genes of a model, read from its module."""
    module, kind = model.module, type(model).__name__
    encoder = (module.z_encoder if hasattr(module, "z_encoder") else module.encoder).encoder
    decoder = module.decoder.px_decoder
    dropout = {layer.p for layer in encoder.modules() if isinstance(layer, torch.nn.Dropout)}
    facts = {
        "n_hidden": sorted(set(_widths(encoder) + _widths(decoder))),
        "n_layers": [len(_widths(encoder)), len(_widths(decoder))],
        "n_latent": int(module.n_latent),
        "dropout_rate": sorted(dropout),
        "gene_likelihood": module.gene_likelihood,
        "encode_covariates": bool(module.encode_covariates),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "genes": genes,
    }
    of_kind = {SCANVI: {"n_labels": "n_labels"}, TOTALVI: {"n_proteins": "n_input_proteins"}}.get(kind, {})
    more = {name: int(getattr(module, attribute)) for name, attribute in of_kind.items()}
    return facts if kind == SCVI else facts | {"kind": kind, **more}


def expected_facts(settings: ModelSection, description: ModelDescription, genes: list[str]) -> dict[str, Any]:
    """The same properties of the model that a config's `model` section defines, with the batches of a description."""
    expected = replace(description, model=settings.kind, arguments=init_arguments(settings), genes=genes)
    return built_facts(expected.build(), genes)


def _widths(layers: torch.nn.Module) -> list[int]:
    return [layer.out_features for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
