"""The query's cells as training cells: aligned counts in files of the format that the training reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.counts.row_hash import row_hashes
from census_scvi.counts.writer import H5adWriter
from census_scvi.errors import UserError
from census_scvi.query.alignment import AlignedCells
from census_scvi.terminal.progress import progress_bar

_BLOCK_CELLS = 4096
_LEAST_CELLS = 2  # BatchNorm cannot normalise a minibatch of one cell


@dataclass(frozen=True)
class TrainingCells:
    """Cells of some batches of the query, which are trained together.

    Attributes
    ----------
    batches
        Their batch labels.
    categories
        Batch labels of the extended model, in the order of the codes.
    file
        The .h5ad.
    """

    batches: list[str]
    categories: list[str]
    file: Path


def write_training_cells(
    aligned: AlignedCells, batches: npt.NDArray[np.object_], genes: list[str], parts: Sequence[TrainingCells]
) -> str:
    """Write the files of all parts in one pass over the query; cells without counts cannot be trained on.

    Parameters
    ----------
    aligned
        The query's cells with the model's genes.
    batches
        object (cells,): batch of each cell.
    genes
        feature_ids of the model.
    parts
        What each file holds.

    Returns
    -------
    SHA-256 of counts and batches of all cells.

    Raises
    ------
    UserError
        A value is not a raw count, or a part has too few cells with counts.
    """
    digest = hashlib.sha256()
    var = pd.DataFrame(index=pd.Index(genes, name="feature_id"))
    part_of = {label: number for number, part in enumerate(parts) for label in part.batches}
    numbers = np.array([part_of[label] for label in batches], dtype=np.int64)
    names = aligned.obs.index.astype(str)
    written: Counter[str] = Counter()
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(len(aligned), "read"))
        writers = [stack.enter_context(H5adWriter(part.file, var)) for part in parts]
        for start, counts in aligned.blocks(_BLOCK_CELLS):
            rows = np.arange(start, start + counts.shape[0])
            digest.update(row_hashes(counts).tobytes())
            digest.update("\0".join(map(str, batches[rows])).encode())
            filled = np.diff(counts.indptr) > 0
            for number in np.unique(numbers[rows[filled]]):
                chosen = np.flatnonzero(filled & (numbers[rows] == number))
                label = pd.Categorical(batches[rows[chosen]], categories=parts[number].categories)
                writers[number].append(pd.DataFrame({"batch": label}, index=names[rows[chosen]]), counts=counts[chosen])
            written.update(batches[rows[filled]])
            bar.update(len(rows))
        for part in parts:
            _require_cells(part, written)
    return digest.hexdigest()


def _require_cells(part: TrainingCells, written: Counter[str]) -> None:
    least = _LEAST_CELLS if len(part.batches) == 1 else 1
    for label in part.batches:
        if written[label] < least:
            raise UserError(
                f"batch {label!r} has {written[label]} cell{'s' * (written[label] != 1)} with counts in the model's"
                f" genes, and training needs {least} or more: remove it, or combine it with another batch"
            )
