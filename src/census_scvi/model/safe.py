"""The safe form of a model: safetensors and JSON, which cannot run code, unlike scvi-tools' pickle.

`weights.safetensors` has the state dict of the module, `model.json` everything else that is needed to rebuild it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import scvi
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from census_scvi.config.run_names import DESCRIPTION, WEIGHTS
from census_scvi.errors import UserError
from census_scvi.files.json_file import read_json
from census_scvi.model.build import Labels, Proteins, build_model, check_arguments, least_parameters
from census_scvi.model.families import SCANVI, SCVI, TOTALVI, family_of
from census_scvi.model.published_record import first_problem

_FORMAT = 1
_BYTES = 4  # per weight, float32
_AGAIN = "train it again with scvi-train.py --force, or fetch the published folder again"


@dataclass(frozen=True)
class ModelDescription:
    """The definition of a model, except its weights.

    Attributes
    ----------
    genes
        feature_ids, in the order of the columns.
    batches
        Batches that the model was trained on, in the order of the codes.
    arguments
        Init arguments of the model's class.
    organism
        Census organism that it was trained on.
    batch_key
        obs columns that define the batch.
    n_cells
        Number of prepared cells (training and validation).
    symbols
        Symbols (feature_name) of the genes, in their order; empty if they are not known.
    model
        Kind of model, as in `families`.
    labels, labels_key, unlabeled_category
        Of SCANVI: labels in the order of the codes, the obs column of the Census that they are from, and the label of
        cells without a known label.
    proteins
        Of TOTALVI: names of the proteins, in the order of the columns.
    missing_proteins
        Of TOTALVI: for each batch with missing proteins, those that were not measured in it.
    lineage
        One record for each model that its weights come from: SCVI, for SCANVI; the reference of a query surgery.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    genes: list[str]
    batches: list[str]
    arguments: dict[str, Any]
    organism: str
    batch_key: list[str]
    n_cells: Annotated[int, Field(ge=0)]
    symbols: list[str] = field(default_factory=list)
    model: str = SCVI
    labels: list[str] = field(default_factory=list)
    labels_key: str = ""
    unlabeled_category: str = ""
    proteins: list[str] = field(default_factory=list)
    missing_proteins: dict[str, list[str]] = field(default_factory=dict)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    format: int = _FORMAT
    scvi_tools: str = field(default_factory=lambda: scvi.__version__)

    def build(self) -> scvi.model.SCVI:
        """The untrained model that it describes."""
        return build_model(
            self.genes,
            self.batches,
            self.arguments,
            n_cells=self.n_cells,
            kind=self.model,
            labels=self.of_labels,
            proteins=self.of_proteins,
        )

    @property
    def summary(self) -> str:
        """Its kind, organism and sizes in one line."""
        parts = {"genes": self.genes, "batches": self.batches, "labels": self.labels, "proteins": self.proteins}
        sizes = [f"{len(names):,} {part}" for part, names in parts.items() if names]
        return f"{family_of(self.model).title} of {self.organism}, {', '.join(sizes)}"

    @property
    def of_labels(self) -> Labels | None:
        """The labels of a SCANVI model; None for another kind."""
        return Labels(self.labels, self.unlabeled_category) if self.labels else None

    @property
    def of_proteins(self) -> Proteins | None:
        """The proteins of a TOTALVI model; None for another kind."""
        return Proteins(self.proteins, self.missing_proteins) if self.proteins else None


# Fields that are not written if they are empty.
_OPTIONAL = ("labels", "labels_key", "unlabeled_category", "proteins", "missing_proteins", "lineage")
_DESCRIPTION = TypeAdapter(ModelDescription)


def save_safe(model: scvi.model.SCVI, description: ModelDescription, folder: Path) -> None:
    """Write the safe form into an existing folder."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    values = {name: value for name, value in asdict(description).items() if value or name not in _OPTIONAL}
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / DESCRIPTION).stat().st_mode)  # safetensors lets only the owner read


def weights_digest(model: scvi.model.SCVI) -> str:
    """SHA-256 of the model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def save_for_scvi_tools(model: scvi.model.SCVI, folder: Path) -> None:
    """Write scvi-tools' own form, model.pt; OSError if the disk is full (torch raises RuntimeError)."""
    try:
        model.save(str(folder), overwrite=True)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("iostream error", "inline_container.cc")):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def read_description(folder: Path) -> ModelDescription:
    """The description of the model in a folder; UserError if it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        values = read_json(path)
        if isinstance(values, dict) and values.get("format", _FORMAT) != _FORMAT:
            raise UserError(
                f"{path} has format {str(values['format'])[:40]}, this version reads {_FORMAT}; update census-scvi"
            )
        if isinstance(values, dict) and isinstance(kind := values.get("model", SCVI), str):
            family_of(kind, str(folder))  # checked first, because other kinds have other arguments
        description = _DESCRIPTION.validate_json(path.read_bytes())
        _check(description)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run scvi-train.py first") from None
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {_AGAIN}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); {_AGAIN}") from None
    return description


def _check(description: ModelDescription) -> None:
    """ValueError if no model can be built from the description."""
    for name, values in (("genes", description.genes), ("batches", description.batches)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} are empty or not unique")
    if description.symbols and len(description.symbols) != len(description.genes):
        raise ValueError(f"it has {len(description.symbols):,} symbols of {len(description.genes):,} genes")
    for kind, name in ((SCANVI, "labels"), (SCANVI, "unlabeled_category"), (TOTALVI, "proteins")):
        given = bool(getattr(description, name))
        if given != (description.model == kind):
            raise ValueError(f"a model of kind {description.model} with{'' if given else 'out'} {name}")
    for name, values in (("labels", description.labels), ("proteins", description.proteins)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} are not unique")
    check_arguments(description.arguments, description.model)


def load_safe(folder: Path) -> tuple[scvi.model.SCVI, ModelDescription]:
    """Rebuild a trained model, ready for inference, from its safe form.

    Raises
    ------
    UserError
        A file is missing or damaged, or the weights do not fit the description.
    """
    description = read_description(folder)
    path = folder / WEIGHTS
    try:
        _check_size(path, description)
        weights = load_file(path)
        model = description.build()
        model.module.load_state_dict(weights)
        check_finite(weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise UserError(f"{path} cannot be used ({reason}); {_AGAIN}") from None
    model.module.eval()
    model.is_trained_ = True
    return model, description


def _check_size(path: Path, description: ModelDescription) -> None:
    """ValueError if the file is too small for the description, which could otherwise allocate any amount of memory."""
    genes, batches = len(description.genes), len(description.batches)
    needed = least_parameters(description.arguments, genes, batches, description.model)
    if (size := path.stat().st_size) < _BYTES * needed:
        raise ValueError(f"it has {size:,} bytes, and the model of {DESCRIPTION} at least {needed:,} parameters")


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """ValueError, with the name of the first weight that is not finite."""
    for name, values in weights.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} holds values that are not finite numbers")
