"""Write the protein counts of the datasets that have them as a second measurement, `ms["protein"]`."""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
import tiledbsoma as soma

from census_scvi.census import schema
from census_scvi.counts.protein_names import joined_names
from census_scvi.local_census.arrays import new_layer, write_block, write_presence, write_table
from census_scvi.local_census.sources import Source

log = logging.getLogger(__name__)


def write_proteins(
    measurements: soma.Collection, sources: Sequence[tuple[int, Source]], *, n_datasets: int, rows: int
) -> int:
    """Write `ms["protein"]` from (soma_joinid of the dataset, source) pairs, if a source has proteins.

    Returns the number of proteins. Proteins of several datasets are joined by name (`joined_names`); the order is that
    of their first appearance. A protein without counts in a dataset counts as not measured there. The cells have the
    positions of the RNA; those of a dataset without proteins have no entries.
    """
    known = joined_names(source.proteins for _, source in sources)
    if not known:
        return 0
    _log_joined(known)
    names = list(dict.fromkeys(known.values()))
    n_cells = np.array([len(source.obs) for _, source in sources], np.int64)
    detected = np.zeros((len(sources), len(names)), np.int64)
    measurement = measurements.add_new_collection(schema.PROTEINS, soma.Measurement)
    with measurement.add_new_collection("X") as layers:
        raw = new_layer(layers, "raw", (int(n_cells.sum()), len(names)))
        first_cell = 0
        for number, (_, source) in enumerate(sources):
            columns = np.array([names.index(known[name]) for name in source.proteins], np.int32)
            for start, block in source.protein_blocks(rows):
                arrays = (block.data.astype(np.float32), columns[block.indices], block.indptr)
                counts = sp.csr_matrix(arrays, shape=(block.shape[0], len(names)))
                counts.sort_indices()
                detected[number] += np.bincount(counts.indices, minlength=len(names))
                write_block(raw, first_cell + start, counts)
            _log_not_measured(source, [known[name] for name in source.proteins], detected[number, columns] == 0)
            first_cell += len(source.obs)
        raw.close()
    present = detected > 0
    write_presence(measurement, present, [joinid for joinid, _ in sources], n_datasets)
    var = pd.DataFrame({"soma_joinid": np.arange(len(names)), "feature_id": names, "nnz": detected.sum(axis=0)})
    var["n_measured_obs"] = n_cells @ present
    write_table(measurement, "var", schema.PROTEIN_VAR_SCHEMA, len(var), iter([var]))
    return len(names)


def _log_joined(known: dict[str, str]) -> None:
    """Log which names were taken for one protein."""
    if other := {name: first for name, first in known.items() if name != first}:
        listed = ", ".join(f"{name} = {first}" for name, first in other.items())
        log.info("%d names of proteins are other names of one protein: %s", len(other), listed)


def _log_not_measured(source: Source, names: list[str], silent: "np.ndarray") -> None:
    if silent.any():
        listed = ", ".join(name for name, none in zip(names, silent, strict=True) if none)
        log.warning(
            "%s: %d of %d proteins have no counts and are taken as not measured: %s",
            source.dataset_id,
            silent.sum(),
            len(names),
            listed,
        )
