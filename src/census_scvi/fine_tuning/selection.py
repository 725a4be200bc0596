"""Everything that preparing the cells of a fine-tuning needs: cells, genes, what the model has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from census_scvi.census.cells import Cells
from census_scvi.census.open import Census
from census_scvi.census.settings import CensusSection
from census_scvi.fine_tuning.new_cells import NewCells, find_new_cells, seen_after, training_cells
from census_scvi.fine_tuning.seen_cells import Keys, seen_cells
from census_scvi.fine_tuning.settings import FineTuneSection
from census_scvi.model.safe import ModelDescription


@dataclass(frozen=True)
class Selection:
    """The cells of a Census for a fine-tuning.

    Attributes
    ----------
    found
        All training cells of the Census, compared with those that the model has seen.
    seen
        Keys of the cells that the model has seen.
    origins
        Census and filter of the cells that it has seen.
    """

    found: NewCells
    seen: Keys
    origins: list[dict[str, Any]]

    def training(self, settings: FineTuneSection, seed: int) -> tuple[Cells, dict[str, int], Keys]:
        """The cells to train on, numbers for the record, and what the model has seen afterwards."""
        held_out = None if settings.held_out is None else np.load(settings.held_out)
        cells, counts = training_cells(self.found, settings, seed, held_out)
        return cells, counts, seen_after(self.found, cells, self.seen)


def select_for_fine_tuning(
    census: Census,
    settings: FineTuneSection,
    of_census: CensusSection,
    description: ModelDescription,
    value_filter: str | None,
) -> Selection:
    """Compare a Census with the cells that the model of the settings has seen.

    Parameters
    ----------
    census
        The newer Census.
    settings, of_census
        The sections `fine_tune` and `census`.
    description
        The model.
    value_filter
        Filter of the training cells.
    """
    seen, origins = seen_cells(str(settings.model), of_census)
    found = find_new_cells(census, value_filter, description.batch_key, description.batches, seen)
    return Selection(found, seen, origins)
