"""Kinds of models: a table of the differences between the model families of scvi-tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import scvi

from census_scvi.config.messages import shown
from census_scvi.errors import UserError

SCVI, SCANVI, TOTALVI = "SCVI", "SCANVI", "TOTALVI"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes
    ----------
    kind
        Name of its class in `scvi.model`, also used in `model.json` and the model hub.
    title
        Its name in prose.
    module
        Name of its module class in `scvi.module`.
    plan
        Name of its training plan in `scvi.train`.
    plan_defaults
        Arguments of the training plan for which the model's `train` in scvi-tools has defaults of its own.
    settings
        Init arguments that every model of this kind has, and the setting of the `model` section for each.
    latent_keys
        Names of the posterior means and variances in the obsm of a minified model; None if scvi-tools has no minified
        form for AnnData.
    cell_data
        Arguments of `setup_anndata` for its inputs other than counts and batches.
    modalities
        Modalities of its training data, for tags of the model hub.
    """

    kind: str
    title: str
    module: str
    plan: str
    plan_defaults: Mapping[str, Any]
    settings: Mapping[str, str]
    latent_keys: tuple[str, str] | None
    cell_data: tuple[str, ...]
    modalities: tuple[str, ...]

    @property
    def model_class(self) -> Any:
        """The class in scvi-tools."""
        return getattr(scvi.model, self.kind)

    @property
    def module_class(self) -> Any:
        """The class of its module in scvi-tools."""
        return getattr(scvi.module, self.module)

    @property
    def plan_class(self) -> Any:
        """The class of its training plan in scvi-tools."""
        return getattr(scvi.train, self.plan)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SCVI_SETTINGS = _same("n_hidden", "n_latent", "n_layers", "dropout_rate", "gene_likelihood", "encode_covariates")
_TOTALVI_SETTINGS = {
    **_same("n_hidden", "n_latent"),
    **dict.fromkeys(("n_layers_encoder", "n_layers_decoder"), "n_layers"),
    **dict.fromkeys(("dropout_rate_encoder", "dropout_rate_decoder"), "dropout_rate"),
    **_same("gene_likelihood", "encode_covariates"),
}

FAMILIES = {
    family.kind: family
    for family in (
        Family(
            SCVI, "scVI", "VAE", "TrainingPlan", {}, _SCVI_SETTINGS, ("scvi_latent_qzm", "scvi_latent_qzv"),
            (), ("rna",),
        ),
        Family(
            SCANVI, "scANVI", "SCANVAE", "SemiSupervisedTrainingPlan", {}, _SCVI_SETTINGS,
            ("scanvi_latent_qzm", "scanvi_latent_qzv"), ("labels_key", "unlabeled_category"), ("rna",),
        ),
        Family(
            TOTALVI, "totalVI", "TOTALVAE", "AdversarialTrainingPlan", {"lr": 4e-3, "reduce_lr_on_plateau": True},
            _TOTALVI_SETTINGS, None, ("protein_expression_obsm_key",),
            ("rna", "protein"),
        ),
    )
}  # fmt: skip


def family_of(kind: str, what: str = "this") -> Family:
    """The family of a kind of model.

    Parameters
    ----------
    kind
        Name of the kind.
    what
        Location of the model, for the error.

    Raises
    ------
    UserError
        The kind is unknown.
    """
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"{what} is a model of kind {shown(kind)}, and this version supports {', '.join(FAMILIES)}; update"
            " census-scvi"
        )
    return family
