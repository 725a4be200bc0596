"""When a reference cannot be extended, and when its extension would not change the latent space."""

from __future__ import annotations

from collections.abc import Sequence

import scvi
import torch

from census_scvi.errors import UserError
from census_scvi.model.safe import ModelDescription
from census_scvi.query.surgery.settings import JOINT

_PRESET = "configs/surgery-reference.yaml has settings for a reference that can be extended"


def require_extendable(model: scvi.model.SCVI, description: ModelDescription, batches: Sequence[str]) -> None:
    """UserError if a model cannot be extended by some batches without moving its cells or leaving weights random.

    Parameters
    ----------
    model, description
        The reference model.
    batches
        Batch labels of the query.
    """
    if shared := sorted(set(batches) & set(description.batches)):
        raise UserError(
            f"{_listed(shared)} {'are batches' if len(shared) > 1 else 'is a batch'} of the query and of the reference:"
            " training would move the reference's cells. If they are other samples, rename them in obs; if they are"
            " cells of the reference, embed them without surgery"
        )
    if len(description.batches) < 2:
        raise UserError(
            "the reference has one batch, and scvi-tools gives such a model no weights of batches: with a second batch,"
            " the weights of both would be random, and the reference's cells would move. Train the reference with two"
            f" or more batches (anndata.batch_key); {_PRESET}"
        )
    module = model.module
    if getattr(module, "batch_representation", "one-hot") != "one-hot":
        raise UserError(
            f"the reference has batch_representation: {module.batch_representation}: scvi-tools draws the embedding of"
            " a new batch at random and does not train it. Train the reference with batch_representation: one-hot"
        )
    for name in ("dispersion", "gene_dispersion", "protein_dispersion"):
        value = str(getattr(module, name, ""))
        if value.endswith("-batch"):
            raise UserError(
                f"the reference has {name}: {value}: scvi-tools draws the dispersions of a new batch at random and does"
                f" not train them. Train the reference with {name}: {value.removesuffix('-batch')}"
            )
    if covariates := _covariates(model):
        raise UserError(
            f"the reference has categorical covariates ({_listed(covariates)}), whose weights the query's cells would"
            " train: the reference's cells would move. Train the reference with the batch only"
        )


def no_effect(model: scvi.model.SCVI, batches: Sequence[str], mode: str) -> str:
    """Why surgery cannot change the latent of the query's cells; "" if it can.

    Parameters
    ----------
    model
        The reference model.
    batches
        Batch labels of the query.
    mode
        Mode of the surgery, see `settings.Surgery`.
    """
    module = model.module
    if not module.encode_covariates:
        return (
            "the encoder of this model does not use the batch (encode_covariates: false), so surgery cannot change the"
            f" embedding; {_PRESET}"
        )
    alone = len(batches) == 1 or mode != JOINT
    encoder = module.encoder if isinstance(module, scvi.module.TOTALVAE) else module.z_encoder
    if alone and any(isinstance(layer, torch.nn.BatchNorm1d) for layer in encoder.modules()):
        why = "the query has one batch" if len(batches) == 1 else f"{mode} trains one batch at a time"
        return (
            f"the encoder of this model has BatchNorm and {why}: BatchNorm subtracts what the weights of the batch add,"
            f" so they have no gradient and surgery cannot change the embedding; {_PRESET}"
        )
    return ""


def _covariates(model: scvi.model.SCVI) -> list[str]:
    """Names of the categorical covariates other than the batch that the encoder or decoder uses."""
    setup = model.adata_manager.registry["setup_args"]
    return list(map(str, setup.get("categorical_covariate_keys") or []))


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
