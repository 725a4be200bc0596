"""Initial weights that come from cells or from another model."""

from __future__ import annotations

from typing import Any

import numpy as np
import scvi

from census_scvi.config.run_names import PROTEINS
from census_scvi.counts.reader import PreparedCells
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.model import build
from census_scvi.model.families import SCVI
from census_scvi.model.published import load_described
from census_scvi.model.safe import ModelDescription, weights_digest

# Cells of each batch from which scvi-tools draws 100.
_CELLS_OF_A_BATCH = 500


def set_protein_priors(model: scvi.model.TOTALVI, cells: PreparedCells, description: ModelDescription) -> None:
    """Set the initial prior of the protein background of TOTALVI from some cells of each batch.

    The cells and scvi-tools' draws from them depend on numpy's global random numbers.
    """
    rows = [np.flatnonzero(cells.batch_codes == code) for code in range(len(cells.batches))]
    chosen = [np.random.choice(of_batch, min(_CELLS_OF_A_BATCH, len(of_batch)), replace=False) for of_batch in rows]
    sizes = [len(of_batch) for of_batch in chosen]
    some = build.skeleton(description.genes, description.batches, proteins=description.of_proteins, sizes=sizes)
    some.obsm[PROTEINS] = cells.protein_counts_of(np.concatenate(chosen))
    build.set_protein_priors(model, some)


def start_from_scvi_model(model: scvi.model.SCANVI, description: ModelDescription, place: str) -> dict[str, Any]:
    """Copy the weights of a trained SCVI model into a SCANVI model, as `SCANVI.from_scvi_model` does.

    Parameters
    ----------
    model, description
        The untrained model.
    place
        The setting `model.from_scvi_model`: run directory, model, or published folder or its URL.

    Returns
    -------
    A record for `ModelDescription.lineage`.

    Raises
    ------
    UserError
        It is not an SCVI model, or has other genes, batches or arguments.
    """
    shown = f"model.from_scvi_model is {without_credentials(place)}"
    try:
        trained, other = load_described(place)
    except UserError as error:
        raise UserError(f"{shown}, which cannot be read: {error}") from None
    if other.model != SCVI:
        raise UserError(f"{shown}, a {other.model} model; expected an SCVI model")
    for name in ("genes", "batches"):
        own, others = getattr(description, name), getattr(other, name)
        if own != others:
            shared = len(set(own) & set(others))
            raise UserError(
                f"{shown}, which has {len(others):,} {name}, the prepared cells {len(own):,}; {shared:,} are in both:"
                " all must be equal and in the same order: prepare both from the same cells with the same settings"
            )
    for name, value in other.arguments.items():
        if description.arguments.get(name) != value:
            raise UserError(
                f"{shown}, which has {name} {value}, and this model {description.arguments.get(name)}; set both alike"
            )
    model.module.load_state_dict(trained.module.state_dict(), strict=False)
    return {"from_scvi_model": without_credentials(place), "weights_sha256": weights_digest(trained)}
