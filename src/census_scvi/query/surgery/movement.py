"""The reference before and after surgery: the latent of its cells, and its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scvi

from census_scvi.errors import UserError
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import ModelDescription
from census_scvi.model.typical import TypicalCells

if TYPE_CHECKING:
    from census_scvi.query.alignment import AlignedCells

# Largest difference of a latent position that is accepted: rounding alone gives 1e-6.
TOLERANCE = 1e-5
_MOST_CELLS = 1024
# Beginnings of the names of the weights of the encoder, of SCVI and SCANVI, and of TOTALVI.
_ENCODERS = ("z_encoder.", "encoder.")


@dataclass(frozen=True)
class ReferenceSample:
    """Cells by which the reference is compared before and after.

    Attributes
    ----------
    counts
        CSR float32 (cells, genes): raw counts, genes in the model's order.
    codes
        int64 (cells,): codes of batches of the reference.
    source
        Where the cells are from.
    proteins
        Of TOTALVI: float32 (cells, proteins), raw counts.
    """

    counts: sp.csr_matrix
    codes: npt.NDArray[np.int64]
    source: str
    proteins: npt.NDArray[np.float32] | None = None


def reference_sample(
    cells: TypicalCells | None, description: ModelDescription, aligned: AlignedCells
) -> ReferenceSample:
    """Cells of the reference in their batches; without such cells, the query's in batches of the reference.

    The function of the reference may not change for any input, so both are valid. A cell of a batch that the model was
    not trained on is given one that it was trained on.

    Parameters
    ----------
    cells
        Cells of the reference, if there are any.
    description
        The reference.
    aligned
        The query's cells.
    """
    batches = description.batches
    if cells is None:
        _, counts, proteins = next(aligned.blocks_with_proteins(_MOST_CELLS))
        return ReferenceSample(counts, np.arange(counts.shape[0]) % len(batches), "query", proteins)
    chosen = slice(None, None, -(-len(cells.batches) // _MOST_CELLS))
    known = {label: code for code, label in enumerate(batches)}
    labels = enumerate(cells.batches[chosen])
    codes = np.array([known.get(label, number % len(batches)) for number, label in labels], dtype=np.int64)
    counts, proteins = cells.counts[chosen], None
    if description.proteins:  # 0: not measured
        proteins = np.zeros((len(codes), len(description.proteins)), np.float32)
        if cells.proteins is not None and cells.proteins.shape[1] == proteins.shape[1]:
            proteins = cells.proteins[chosen]
    return ReferenceSample(counts, codes, "reference", proteins)


@dataclass(frozen=True)
class Movement:
    """What surgery changed of the reference.

    Attributes
    ----------
    latent
        Largest difference of the latent positions of the sample.
    weights
        Largest change of a weight of the reference's encoder.
    changed
        Names of other tensors of the reference that changed, such as BatchNorm of the decoder; they do not affect the
        latent.
    cells, source
        Number of cells in the sample, and where they are from.
    """

    latent: float
    weights: float
    changed: list[str]
    cells: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return asdict(self)


def movement(before: scvi.model.SCVI, after: scvi.model.SCVI, sample: ReferenceSample) -> Movement:
    """Compare the reference model with an extension of it."""
    old, new = (Encoder(model)(sample.counts, sample.codes, sample.proteins).mean for model in (before, after))
    weights, changed = 0.0, []
    extended = after.module.state_dict()
    for name, values in before.module.state_dict().items():
        if not values.is_floating_point():
            continue  # BatchNorm's number of minibatches, which nothing depends on
        # New batches are the last columns. A tensor without weights of batches has the same shape.
        kept = extended[name][tuple(slice(size) for size in values.shape)]
        change = float((kept.cpu().double() - values.cpu().double()).abs().max()) if values.numel() else 0.0
        if name.startswith(_ENCODERS):
            weights = max(weights, change)
        elif change:
            changed.append(name)
    return Movement(float(np.abs(old - new).max(initial=0.0)), weights, changed, len(sample.codes), sample.source)


def require_unmoved(found: Movement) -> None:
    """UserError if the reference moved; the message has the likely cause."""
    if found.latent <= TOLERANCE:
        return
    cause = (
        "the training changed weights of the reference"
        f" (by up to {found.weights:.2g}): a weight decay, an unfrozen layer, or a batch or covariate that query and"
        " reference share"
        if found.weights
        else "the extended model has other layers than the reference, as with one reference batch"
    )
    raise UserError(
        f"surgery moved the reference: the latent of {found.cells:,} cells of the {found.source} differs by up to"
        f" {found.latent:.2g}, at most {TOLERANCE:g} is allowed. The likely cause: {cause}. Nothing was written"
    )
