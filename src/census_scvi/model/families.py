"""Kinds of models: a table of the differences between the model families of scvi-tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import scvi

from census_scvi.config.messages import shown
from census_scvi.errors import UserError

SCVI = "SCVI"


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
    arguments
        Init arguments that define a model of this kind; the safe form has exactly these.
    cell_data
        Arguments of `setup_anndata` for its inputs other than counts and batches.
    modalities
        Modalities of its training data, for tags of the model hub.
    can_build
        Whether this release builds, reads and publishes such models.
    """

    kind: str
    title: str
    module: str
    arguments: frozenset[str]
    cell_data: tuple[str, ...]
    modalities: tuple[str, ...]
    can_build: bool = False

    @property
    def model_class(self) -> Any:
        """The class in scvi-tools."""
        return getattr(scvi.model, self.kind)

    @property
    def module_class(self) -> Any:
        """The class of its module in scvi-tools."""
        return getattr(scvi.module, self.module)


_SCVI_ARGUMENTS = frozenset(
    {"n_hidden", "n_latent", "n_layers", "dropout_rate", "gene_likelihood", "encode_covariates"}
)
_TOTALVI_ARGUMENTS = frozenset(
    {"n_hidden", "n_latent", "n_layers_encoder", "n_layers_decoder", "dropout_rate_encoder", "dropout_rate_decoder"}
    | {"gene_likelihood", "encode_covariates"}
)

FAMILIES = {
    family.kind: family
    for family in (
        Family(SCVI, "scVI", "VAE", _SCVI_ARGUMENTS, (), ("rna",), can_build=True),
        Family("SCANVI", "scANVI", "SCANVAE", _SCVI_ARGUMENTS, ("labels_key", "unlabeled_category"), ("rna",)),
        Family(
            "TOTALVI", "totalVI", "TOTALVAE", _TOTALVI_ARGUMENTS, ("protein_expression_obsm_key",), ("rna", "protein")
        ),
    )
}


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
        The kind is unknown, or this release cannot build it.
    """
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"{what} is a model of kind {shown(kind)}, and this version supports {', '.join(FAMILIES)}; update"
            " census-scvi"
        )
    if not family.can_build:
        expected = " or ".join(each.kind for each in FAMILIES.values() if each.can_build)
        raise UserError(
            f"{what} is a {kind} model, which this version does not support yet; expected {expected}: update"
            " census-scvi"
        )
    return family
