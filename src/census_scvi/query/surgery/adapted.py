"""A model that was adapted to the batches of a query: embedding with it, and its saved form."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.config.run_names import SURGERY
from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of, remove, sync_tree, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.writable import require_writable_folder
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import ModelDescription, load_safe
from census_scvi.model.source import Source
from census_scvi.query.batches import required_batches

_FORMAT = 1
# Names in a folder of unfinished work: of a surgery, and of a comparison with a folder for each way.
_WORK = re.compile(r"surgery\.lock|fingerprint\.json(\.partial)?|training-\d{3,}|(joint|per-batch|sequential)(-.*)?")


@dataclass(frozen=True)
class Adapted:
    """Result of a surgery.

    Attributes
    ----------
    batch_key
        obs columns whose combinations are the batches of the query's cells.
    batches
        Batch labels of the query, in the order of their first cells.
    models
        The extended models and their descriptions: one, or one for each batch; empty if nothing was trained.
    facts
        Facts for reports, as JSON has them: mode, cells, seed, each training, what changed of the reference.
    folders
        Folder of each model.
    """

    batch_key: list[str]
    batches: list[str]
    models: list[tuple[scvi.model.SCVI, ModelDescription]]
    facts: dict[str, Any]
    folders: list[Path] = field(repr=False, default_factory=list)

    @property
    def reason(self) -> str:
        """Why nothing was trained; "" if a model was trained."""
        return str(self.facts["reason"])

    def encoder(self, obs: pd.DataFrame) -> CellEncoder:
        """Encoder of cells in their batches; UserError if a cell is of a batch that no model has."""
        return CellEncoder([model for model, _ in self.models], self.places(obs))

    def places(self, obs: pd.DataFrame) -> npt.NDArray[np.int64]:
        """Number of the model, and code of the batch in it, of each cell: int64 (cells, 2); errors as in `encoder`."""
        labels = required_batches(obs, self.batch_key, "batch_key")
        place: dict[str, tuple[int, int]] = {}
        for number, (_, description) in enumerate(self.models):
            for code, label in enumerate(description.batches):
                place.setdefault(label, (number, code))
        if unknown := [label for label in dict.fromkeys(labels) if label not in place]:
            raise UserError(
                f"the model was not adapted to batch {unknown[0]!r} of {'+'.join(self.batch_key)}"
                f" (it has {', '.join(map(repr, self.batches[:5]))}); adapt it with cells of all batches"
            )
        return np.array([place[label] for label in labels], np.int64)

    def save(self, folder: Path) -> None:
        """Write the models and the facts into a folder: a single model directly, else a folder for each.

        The folder appears when it is complete; an earlier one is replaced.
        """
        names = [""] if len(self.models) == 1 else [f"batch-{number:03}" for number in range(len(self.models))]
        partial = partial_of(folder)
        remove(partial)
        partial.mkdir(parents=True)
        for source, name in zip(self.folders, names, strict=True):
            shutil.copytree(source, partial / name, dirs_exist_ok=not name)
        values = {"format": _FORMAT, "batch_key": self.batch_key, "batches": self.batches, "models": names}
        write_json(partial / SURGERY, values | {"facts": self.facts})
        sync_tree(partial)
        remove(folder)
        partial.replace(folder)

    @classmethod
    def open(cls, folder: Path) -> Adapted:
        """Read what `save` wrote; UserError if a file is missing or damaged."""
        path = folder / SURGERY
        try:
            values = read_json(path)
            if values["format"] != _FORMAT:
                raise UserError(
                    f"{path} has format {str(values['format'])[:40]}, this version reads {_FORMAT}; update census-scvi"
                )
            names = [_member(name) for name in values["models"]]
            if not names:
                raise ValueError("it names no model")
            batch_key, batches = (list(map(str, values[name])) for name in ("batch_key", "batches"))
            facts = dict(values["facts"])
            in_words(facts)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); run the surgery again") from None
        folders = [folder / name for name in names]
        models = [load_safe(each) for each in folders]
        if any(description.genes != models[0][1].genes for _, description in models):
            raise UserError(f"{folder}: its models have different genes; run the surgery again")
        return cls(batch_key, batches, models, facts, folders)


def new_folder(path: str) -> Path:
    """Path of a folder to write; UserError if it exists or cannot be created."""
    folder = Path(path)
    if folder.exists():
        raise UserError(f"folder: {folder} exists; give a new folder, or open the model in it: Atlas.open({path!r})")
    require_writable_folder(folder, [], "folder")
    return folder


def require_work_folder(folder: Path) -> None:
    """UserError if a folder has content that is not unfinished work of a surgery, which is deleted at its end."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in names if not _WORK.fullmatch(name)]:
        raise UserError(
            f"{folder} is a folder for the unfinished work of a surgery, which is removed at its end, and it has"
            f" {foreign[0]!r}; give a new folder, or move that away"
        )


def work_of(folder: Path) -> Path:
    """Folder of the unfinished work of a surgery, next to the folder of its result."""
    return folder.with_name(f"{folder.name}.training")


def adapted_model(place: str) -> Adapted | None:
    """The adapted model in a local folder; None for anything else."""
    path = Source.at(place).path
    return Adapted.open(path) if path is not None and (path / SURGERY).exists() else None


def _member(name: Any) -> str:
    """The name of a model's folder; ValueError if it is not one that `save` gives."""
    if not isinstance(name, str) or (name and not (name.startswith("batch-") and name[6:].isdigit())):
        raise ValueError(f"{str(name)[:40]!r} is not a folder of a model")
    return name


class CellEncoder:
    """Encodes cells by the model of their batch.

    Parameters
    ----------
    models
        The models.
    places
        int64 (cells, 2): number of the model, and code of the batch in it, of each cell.
    """

    def __init__(self, models: Sequence[scvi.model.SCVI], places: npt.NDArray[np.int64]) -> None:
        self._encoders = [Encoder(model) for model in models]
        self._n_latent = models[0].module.n_latent
        self._places = places

    def __call__(
        self, start: int, counts: sp.csr_matrix, proteins: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Latent positions of consecutive cells, float32 (cells, n_latent).

        Parameters
        ----------
        start
            Row of the first cell.
        counts
            CSR float32 (cells, genes of the model).
        proteins
            float32 (cells, proteins of the model), for a model with proteins.
        """
        places = self._places[start : start + counts.shape[0]]
        latent = np.empty((counts.shape[0], self._n_latent), np.float32)
        for number in np.unique(places[:, 0]):
            rows = np.flatnonzero(places[:, 0] == number)
            of_rows = None if proteins is None else proteins[rows]
            latent[rows] = self._encoders[number](counts[rows], places[rows, 1], of_rows).mean
        return latent


def in_number(batches: list[str]) -> str:
    """The batch by its name, or the number of batches."""
    return f"batch {batches[0]!r}" if len(batches) == 1 else f"{len(batches)} batches"


def in_words(facts: dict[str, Any]) -> str:
    """A surgery in one line."""
    if facts["reason"]:
        return f"not done: {facts['reason']}"
    trainings = facts["trainings"]
    moved = max(each["moved"]["latent"] for each in trainings)
    cells = trainings[0]["moved"]
    epochs = np.unique([each["epochs"] for each in trainings])
    return (
        f"{facts['mode']}: {in_number(facts['batches'])}, {sum(each['cells'] for each in trainings):,} cells,"
        f" {'/'.join(map(str, epochs))} epochs, {sum(each['steps'] for each in trainings):,} steps; the latent of"
        f" {cells['cells']:,} cells of the {cells['source']} in batches of the reference changed by at most {moved:.2g}"
    )
