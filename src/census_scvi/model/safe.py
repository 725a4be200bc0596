"""The safe form of a model: safetensors and JSON, which cannot run code, unlike scvi-tools' pickle.

`weights.safetensors` holds the module's state dict; `model.json` all else that rebuilds it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import scvi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from census_scvi.errors import UserError
from census_scvi.model.build import build_model
from census_scvi.workspace.atomic import read_json

WEIGHTS = "weights.safetensors"
DESCRIPTION = "model.json"
_FORMAT = 1


@dataclass(frozen=True)
class ModelDescription:
    """What a model is, beside its weights.

    Attributes
    ----------
    genes
        feature_ids, in the order of the columns.
    batches
        Trained batches, in the order of the codes.
    arguments
        Arguments of `scvi.model.SCVI`.
    organism
        Census organism it was trained on.
    batch_key
        obs columns that make the batch.
    n_cells
        Cells it was prepared from (training and validation).
    symbols
        Symbols (feature_name) of the genes, in their order; empty where they are not known.
    """

    genes: list[str]
    batches: list[str]
    arguments: dict[str, Any]
    organism: str
    batch_key: list[str]
    n_cells: int
    symbols: list[str] = field(default_factory=list)
    model: str = "SCVI"
    format: int = _FORMAT
    scvi_tools: str = field(default_factory=lambda: scvi.__version__)


def save_safe(model: scvi.model.SCVI, description: ModelDescription, folder: Path) -> None:
    """Write the safe form into an existing folder."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / DESCRIPTION).stat().st_mode)  # safetensors lets nobody else read its files


def read_description(folder: Path) -> ModelDescription:
    """What the model in a folder is; UserError where it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        values = read_json(path)
        if values.get("format") != _FORMAT:
            raise UserError(
                f"{path} has format {values.get('format')!r}, this version reads {_FORMAT}; update census-scvi"
            )
        return ModelDescription(**values)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run scvi-train.py first") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); run scvi-train.py --force") from None


def load_safe(folder: Path) -> tuple[scvi.model.SCVI, ModelDescription]:
    """Rebuild a trained model, ready for inference, from its safe form.

    Raises
    ------
    UserError
        A file is missing or damaged, or the weights do not fit the description.
    """
    description = read_description(folder)
    model = build_model(description.genes, description.batches, description.arguments, n_cells=description.n_cells)
    try:
        model.module.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS} cannot be used ({reason}); run scvi-train.py --force") from None
    model.module.eval()
    model.is_trained_ = True
    return model, description
