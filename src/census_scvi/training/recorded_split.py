"""The cells that a recorded training used for training and for validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.training.settings import TrainSection


def recorded_split(prepared: Path, record: Mapping[str, Any], *, proteins: bool = False) -> PreparedDataModule:
    """The prepared cells, with the masks `training` and `validation` of a training.

    Parameters
    ----------
    prepared
        The file that was trained on.
    record
        Record of the stage train; a setting that an earlier version did not have has its default.
    proteins
        As of `PreparedDataModule`.
    """
    settings, defaults = record["config"].get("train", {}), TrainSection()
    names = ("train_size", "held_out", "split_seed", "max_cells", "batch_size")
    values = {name: settings.get(name, getattr(defaults, name)) for name in names}
    return PreparedDataModule(prepared, seed=record["seed"], workers=1, proteins=proteins, **values)
