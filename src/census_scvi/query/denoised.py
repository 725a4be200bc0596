"""Expression of a user's cells as a model decodes it: genes, proteins without background, foreground of proteins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.config.run_names import PROTEINS
from census_scvi.errors import UserError
from census_scvi.model.safe import ModelDescription
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.expression import Decoder
from census_scvi.terminal.progress import progress_bar

FOREGROUND = "protein_foreground"
_BLOCK_CELLS = 4096

Model = tuple[scvi.model.SCVI, ModelDescription]


@dataclass(frozen=True)
class CellModels:
    """The models that decode a user's cells.

    Attributes
    ----------
    decoders
        The models.
    numbers
        int64 (cells,): number of the model of each cell.
    labels
        object (cells,): batch of each cell in its model.
    own_batches
        Whether the models were trained on the batches of these cells.
    """

    decoders: list[Decoder]
    numbers: npt.NDArray[np.int64]
    labels: npt.NDArray[np.object_]
    own_batches: bool

    @classmethod
    def of_one(cls, model: Model, n_cells: int) -> CellModels:
        """Cells of batches that the model was not trained on (`Decoder.for_untrained`)."""
        decoder, labels = Decoder(*model).for_untrained(np.full(n_cells, None, dtype=object))
        return cls([decoder], np.zeros(n_cells, np.int64), labels, own_batches=False)

    @classmethod
    def of_batches(cls, models: Sequence[Model], places: npt.NDArray[np.int64]) -> CellModels:
        """Cells of batches of adapted models; int64 (cells, 2): number of the model, and code of the batch in it."""
        labels = np.array([models[number][1].batches[code] for number, code in places], dtype=object)
        return cls([Decoder(*model) for model in models], places[:, 0], labels, own_batches=True)

    def checked(self, transform_batch: str | Sequence[str] | None) -> list[str] | None:
        """Batches to decode with; UserError if one is unknown, or None is given for batches that are not trained."""
        if transform_batch is not None:
            targets = [transform_batch] if isinstance(transform_batch, str) else list(transform_batch)
            for decoder in self.decoders:
                decoder.check_batches(targets)
            return targets
        if not self.own_batches:
            raise UserError(
                "the model was not trained on the batches of these cells: give trained batches in transform_batch"
                " (listed in atlas.description.batches), or adapt the model first (atlas.adapt)"
            )
        return None


def denoised(
    aligned: AlignedCells,
    models: CellModels,
    genes: Sequence[str],
    transform_batch: str | Sequence[str] | None,
    *,
    library_size: float,
    n_samples: int,
    seed: int,
) -> ad.AnnData:
    """See `Atlas.denoised`."""
    first, proteins = models.decoders[0], aligned.proteins
    feature_ids = first.check_genes(list(genes)) if len(genes) or proteins is None else []
    targets = models.checked(transform_batch)
    names = [] if proteins is None else first.description.proteins
    found = np.empty((len(aligned), len(feature_ids)), np.float32)
    of_proteins = np.empty((2, len(aligned), len(names)), np.float32)
    with progress_bar(len(aligned), "decode") as bar:
        for start, counts, measured in aligned.blocks_with_proteins(_BLOCK_CELLS):
            numbers = models.numbers[start : start + counts.shape[0]]
            for number in np.unique(numbers):
                inside = np.flatnonzero(numbers == number)
                rows, decoder = start + inside, models.decoders[number]
                drawn = {"n_samples": n_samples, "seed": seed + start}
                cells = (counts[inside], models.labels[rows])
                own = None if measured is None else measured[inside]
                if feature_ids:
                    found[rows] = decoder.normalised(
                        *cells, feature_ids, targets, library_size=library_size, proteins=own, **drawn
                    )
                if own is not None:
                    of_proteins[:, rows] = decoder.of_proteins(*cells, targets, own, **drawn)
            bar.update(counts.shape[0])
    result = ad.AnnData(found, aligned.obs.copy(), pd.DataFrame({"feature_id": feature_ids}, index=list(genes)))
    for name, values in zip((PROTEINS, FOREGROUND) if names else (), of_proteins, strict=False):
        result.obsm[name] = pd.DataFrame(values, result.obs_names, names)
    return result
