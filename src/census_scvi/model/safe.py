"""The safe form of a model: safetensors and JSON, which cannot run code, unlike scvi-tools' pickle.

`weights.safetensors` has the state dict of the module, `model.json` everything else that is needed to rebuild it.
"""

from __future__ import annotations

import errno
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
from census_scvi.model.build import build_model, check_arguments, least_parameters
from census_scvi.model.families import SCVI, family_of
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
    format: int = _FORMAT
    scvi_tools: str = field(default_factory=lambda: scvi.__version__)


_DESCRIPTION = TypeAdapter(ModelDescription)


def save_safe(model: scvi.model.SCVI, description: ModelDescription, folder: Path) -> None:
    """Write the safe form into an existing folder."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / DESCRIPTION).stat().st_mode)  # safetensors lets only the owner read


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
        model = build_model(
            description.genes,
            description.batches,
            description.arguments,
            n_cells=description.n_cells,
            kind=description.model,
        )
        model.module.load_state_dict(weights)
        _check_finite(weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise UserError(f"{path} cannot be used ({reason}); {_AGAIN}") from None
    model.module.eval()
    model.is_trained_ = True
    return model, description


def _check_size(path: Path, description: ModelDescription) -> None:
    """ValueError if the file is too small for the description, which could otherwise allocate any amount of memory."""
    needed = least_parameters(description.arguments, len(description.genes), len(description.batches))
    if (size := path.stat().st_size) < _BYTES * needed:
        raise ValueError(f"it has {size:,} bytes, and the model of {DESCRIPTION} at least {needed:,} parameters")


def _check_finite(weights: dict[str, torch.Tensor]) -> None:
    for name, values in weights.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} holds values that are not finite numbers")
