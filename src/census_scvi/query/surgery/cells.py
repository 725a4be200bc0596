"""The query's cells as training cells: aligned counts in files of the format that the training reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.config.run_names import BATCH, LABELS, PROTEIN_NAMES, PROTEINS
from census_scvi.counts.row_hash import row_hashes
from census_scvi.counts.writer import H5adWriter
from census_scvi.errors import UserError
from census_scvi.model.safe import ModelDescription
from census_scvi.terminal.progress import progress_bar

if TYPE_CHECKING:
    from census_scvi.query.alignment import AlignedCells

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
    aligned: AlignedCells,
    batches: npt.NDArray[np.object_],
    description: ModelDescription,
    parts: Sequence[TrainingCells],
) -> str:
    """Write the files of all parts in one pass over the query; cells without counts cannot be trained on.

    For SCANVI all cells are unlabelled: the labels that the query has are of no use, because the classifier is frozen.

    Parameters
    ----------
    aligned
        The query's cells with the model's genes and proteins.
    batches
        object (cells,): batch of each cell.
    description
        The model.
    parts
        What each file holds.

    Returns
    -------
    SHA-256 of counts, proteins and batches of all cells.

    Raises
    ------
    UserError
        A value is not a raw count, or a part has too few cells with counts.
    """
    digest = hashlib.sha256()
    part_of = {label: number for number, part in enumerate(parts) for label in part.batches}
    numbers = np.array([part_of[label] for label in batches], dtype=np.int64)
    names = aligned.obs.index.astype(str)
    written: Counter[str] = Counter()
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(len(aligned), "read"))
        writers = [stack.enter_context(training_writer(part.file, description)) for part in parts]
        for start, counts, proteins in aligned.blocks_with_proteins(_BLOCK_CELLS):
            rows = np.arange(start, start + counts.shape[0])
            digest.update(row_hashes(counts).tobytes())
            digest.update("\0".join(map(str, batches[rows])).encode())
            digest.update(b"" if proteins is None else np.ascontiguousarray(proteins).tobytes())
            filled = np.diff(counts.indptr) > 0
            for number in np.unique(numbers[rows[filled]]):
                chosen = np.flatnonzero(filled & (numbers[rows] == number))
                obs = training_obs(batches[rows[chosen]], parts[number], description, names[rows[chosen]])
                obsm = None if proteins is None else {PROTEINS: proteins[chosen]}
                writers[number].append(obs, counts=counts[chosen], obsm=obsm)
            written.update(batches[rows[filled]])
            bar.update(len(rows))
        for part in parts:
            _require_cells(part, written)
    return digest.hexdigest()


def training_writer(file: Path, description: ModelDescription) -> H5adWriter:
    """Writer of a file of training cells."""
    uns = {PROTEIN_NAMES: np.array(description.proteins, dtype=object)} if description.proteins else {}
    return H5adWriter(file, pd.DataFrame(index=pd.Index(description.genes, name="feature_id")), uns)


def training_obs(
    batches: npt.NDArray[np.object_], part: TrainingCells, description: ModelDescription, names: pd.Index
) -> pd.DataFrame:
    """Obs of some cells of a part, as the training reads it."""
    obs = pd.DataFrame({BATCH: pd.Categorical(batches, categories=part.categories)}, index=names)
    if description.labels:
        every = [*description.labels, description.unlabeled_category]
        obs[LABELS] = pd.Categorical.from_codes(np.full(len(obs), len(every) - 1), categories=every)
    return obs


def _require_cells(part: TrainingCells, written: Counter[str]) -> None:
    least = _LEAST_CELLS if len(part.batches) == 1 else 1
    for label in part.batches:
        if written[label] < least:
            raise UserError(
                f"batch {label!r} has {written[label]} cell{'s' * (written[label] != 1)} with counts in the model's"
                f" genes, and training needs {least} or more: remove it, or combine it with another batch"
            )
