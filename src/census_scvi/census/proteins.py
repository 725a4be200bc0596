"""Read the protein counts of a Census: their names, and the counts of selected cells in groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.open import MEASUREMENT, Census, reading
from census_scvi.census.stream import stream_nonzeros
from census_scvi.errors import UserError


def read_protein_names(census: Census, measurement: str) -> list[str]:
    """Names of the proteins of a measurement, such as `protein`, in the order of its columns.

    Raises
    ------
    UserError
        The Census has no such measurement, it is that of the genes, or it has no proteins.
    """
    uri, names = census.identity["uri"], sorted(census.experiment.ms.keys())
    if measurement not in names or measurement == MEASUREMENT:
        others = ", ".join(name for name in names if name != MEASUREMENT)
        build = "build a Census of files with proteins with scvi-build-census.py"
        raise UserError(
            f"Census {uri} has no measurement {measurement!r} with proteins (measurements next to {MEASUREMENT}:"
            f" {others or 'none'}); {'set anndata.protein_measurement to one of these' if others else build}"
        )
    table = census.experiment.ms[measurement].var
    with reading(table.uri):
        var = table.read(column_names=["soma_joinid", "feature_id"]).concat().to_pandas()
    return [str(name) for name in var.sort_values("soma_joinid")["feature_id"]]


def stream_proteins(
    census: Census,
    measurement: str,
    joinids: npt.NDArray[np.int64],
    groups: Iterable[npt.NDArray[np.int64]],
) -> Iterator[npt.NDArray[np.float32]]:
    """Read raw protein counts of groups of cells; yields float32 (cells of the group, proteins) per group.

    Cells of a dataset without proteins, and proteins that a dataset did not measure, have 0.

    Parameters
    ----------
    census
        The open Census.
    measurement
        Name of the measurement; `read_protein_names` gives its columns and checks that it exists.
    joinids
        int64 (cells,), ascending.
    groups
        int64 positions in `joinids`, ascending in each group. One group is in memory at a time.
    """
    n_proteins = int(census.experiment.ms[measurement].X["raw"].shape[1])
    for group in groups:
        counts = np.zeros((len(group), n_proteins), np.float32)
        rows = np.arange(len(group), dtype=np.int32)
        parts = stream_nonzeros(census, joinids[group], rows, measurement=measurement) if len(group) else ()
        for cells, proteins, values in parts:
            chosen = cells >= 0
            counts[cells[chosen], proteins[chosen]] = values[chosen]
        yield counts


def read_named_proteins(census: Census, joinids: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.float32]:
    """Raw counts of proteins of some cells, float32 (cells, names), from the measurement with most of the names.

    Proteins that the Census does not have are 0, as those that a cell's dataset did not measure.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending. All are in memory at a time.
    names
        Names of the proteins, in the order of the columns.

    Raises
    ------
    UserError
        The Census has none of them.
    """
    columns = {
        measurement: pd.Index(read_protein_names(census, measurement)).get_indexer(names)
        for measurement in census.experiment.ms
        if measurement != MEASUREMENT
    }
    measurement = max(columns, key=lambda name: int((columns[name] >= 0).sum()), default=None)
    if measurement is None or (columns[measurement] < 0).all():
        raise UserError(
            f"Census {census.identity['uri']} has none of the {len(names)} proteins such as {names[0]!r}; give a Census"
            " with the proteins of the model"
        )
    here = columns[measurement]
    (counts,) = stream_proteins(census, measurement, joinids, [np.arange(len(joinids))])
    return np.where(here >= 0, counts[:, here], np.float32(0))
