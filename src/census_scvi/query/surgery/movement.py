"""The reference before and after surgery: the latent of its cells, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scvi

from census_scvi.errors import UserError
from census_scvi.model.encode import Encoder
from census_scvi.model.typical import TypicalCells

# Largest difference of a latent position that is accepted: rounding alone gives 1e-6.
TOLERANCE = 1e-5
_MOST_CELLS = 1024


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
    """

    counts: sp.csr_matrix
    codes: npt.NDArray[np.int64]
    source: str


def reference_sample(
    cells: TypicalCells | None, batches: list[str], other: Callable[[], sp.csr_matrix]
) -> ReferenceSample:
    """Cells of the reference in their batches; without such cells, the query's in batches of the reference.

    The function of the reference may not change for any input, so both are valid. A cell of a batch that the model was
    not trained on is given one that it was trained on.

    Parameters
    ----------
    cells
        Cells of the reference, if there are any.
    batches
        Batch labels of the reference, in the order of the codes.
    other
        Function that returns raw counts of other cells, CSR float32 (cells, genes).
    """
    counts = other() if cells is None else cells.counts
    counts = counts[:: -(-counts.shape[0] // _MOST_CELLS)]
    codes = np.arange(counts.shape[0]) % len(batches)
    if cells is None:
        return ReferenceSample(counts, codes, "query")
    known = {label: code for code, label in enumerate(batches)}
    labels = cells.batches[:: -(-len(cells.batches) // _MOST_CELLS)]
    codes = np.array([known.get(label, code) for label, code in zip(labels, codes, strict=True)], dtype=np.int64)
    return ReferenceSample(counts, codes, "reference")


@dataclass(frozen=True)
class Movement:
    """What surgery changed of the reference.

    Attributes
    ----------
    latent
        Largest difference of the latent positions of the sample.
    weights
        Largest change of a weight of the reference's encoder, and of its decoder without BatchNorm.
    changed
        Names of other tensors of the reference that changed; they do not affect the latent.
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
    old, new = (Encoder(model)(sample.counts, sample.codes).mean for model in (before, after))
    weights, changed = 0.0, []
    extended = after.module.state_dict()
    for name, values in before.module.state_dict().items():
        if not values.is_floating_point():
            continue  # BatchNorm's number of minibatches, which nothing depends on
        # New batches are the last columns. A tensor without weights of batches has the same shape.
        kept = extended[name][tuple(slice(size) for size in values.shape)]
        change = float((kept.double() - values.double()).abs().max()) if values.numel() else 0.0
        if change and not name.startswith("z_encoder") and _is_norm(name):
            changed.append(name)
        else:
            weights = max(weights, change)
    return Movement(float(np.abs(old - new).max(initial=0.0)), weights, changed, len(sample.codes), sample.source)


def _is_norm(name: str) -> bool:
    """Whether a tensor is of a BatchNorm layer, which is the second of each block of scvi-tools' FCLayers."""
    return "fc_layers" in name and ".1." in name


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
