"""A model folder as scvi-tools saved it: its weights and what its registry says, read from the pickles in it."""

from __future__ import annotations

import inspect
import json
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from census_scvi.model.families import FAMILIES, SCANVI, SCVI, TOTALVI, Family
from census_scvi.model.source import PICKLE

# Files of scvi-tools before 0.15, which its `convert_legacy_save` joins to a `model.pt`.
_EARLIER = ("model_params.pt", "attr.pkl", "var_names.csv")
# Weights that only one kind has, in the order in which they are looked for.
_KIND_OF_WEIGHT = {
    "background_pro_alpha": TOTALVI,
    "y_prior": SCANVI,
    "z_encoder.encoder.fc_layers.Layer 0.0.weight": SCVI,
}
# Arguments of the classes that say which cells, not which network.
_NOT_OF_THE_NETWORK = frozenset(
    {"adata", "registry", "datamodule", "use_cuda", "unlabeled_category", "pretrained_model"}
    | {"empirical_protein_background_prior", "override_missing_proteins"}
)
_COVARIATES = {"extra_categorical_covs": "categorical", "extra_continuous_covs": "continuous"}
# First version of scvi-tools that scales the input of TOTALVI's encoder.
_SCALED_INPUT = Version("1.3.1")


@dataclass(frozen=True)
class SavedModel:
    """A model that scvi-tools saved.

    Attributes
    ----------
    kind
        Its kind, as in `families`.
    weights
        State dict of its module, on the CPU.
    genes
        Names of its genes, in the order of the columns.
    batches
        Its batches, in the order of the codes.
    batch_key
        obs column of the batch; None: the model was set up without one, and has one batch.
    arguments
        Init arguments of its class: all that `families` requires, and the others that differ from their default.
    n_cells
        Number of cells that it was set up with.
    labels, labels_key, unlabeled_category
        SCANVI: labels in the order of the codes, without the unlabelled category; obs column; that category.
    proteins
        TOTALVI: names of the proteins, in the order of the columns.
    missing_proteins
        TOTALVI: proteins that were not measured in a batch.
    scvi_tools
        Version of scvi-tools that set the model up.
    """

    kind: str
    weights: dict[str, torch.Tensor]
    genes: list[str]
    batches: list[str]
    batch_key: str | None
    arguments: dict[str, Any]
    n_cells: int
    labels: list[str] = field(default_factory=list)
    labels_key: str = ""
    unlabeled_category: str = ""
    proteins: list[str] = field(default_factory=list)
    missing_proteins: dict[str, list[str]] = field(default_factory=dict)
    scvi_tools: str = ""


def read_saved(folder: Path) -> SavedModel:
    """Read a model that scvi-tools saved. This unpickles its files, which executes any code that is in them.

    Raises
    ------
    ValueError
        Reason, in one line, why the model cannot be described.
    """
    content = _unpickled(folder)
    attributes, weights = dict(content["attr_dict"]), dict(content["model_state_dict"])
    weights.pop("pyro_param_store", None)
    registry = attributes.get("registry_")
    if not isinstance(registry, Mapping) or not registry.get("field_registries"):
        raise ValueError("it has no registry, which names its genes and batches")
    fields = registry["field_registries"]
    family = _family(registry.get("model_name"))
    _refuse_other_inputs(registry, fields)
    version = str(registry.get("scvi_version", "0"))
    if family.kind == TOTALVI and Version(version) < _SCALED_INPUT:
        raise ValueError(
            f"TOTALVI of scvi-tools {version}: since {_SCALED_INPUT} the encoder gets scaled counts, so the installed"
            " version would compute another latent; train it again"
        )
    batches, batch_key = _categories(fields, "batch")
    return SavedModel(
        kind=family.kind,
        weights=weights,
        genes=_genes(content["var_names"], fields),
        batches=batches,
        batch_key=batch_key,
        arguments=_arguments(family, attributes),
        n_cells=int(_of(fields, "X", "summary_stats").get("n_cells", 0)),
        **(_labels(fields) if "labels_key" in family.cell_data else {}),
        **(_proteins(fields, batches, attributes) if "protein" in family.modalities else {}),
        scvi_tools=version,
    )


def _unpickled(folder: Path) -> dict[str, Any]:
    """The dictionary of `model.pt`, converted from the earlier files if there is none."""
    earlier = all((folder / name).is_file() for name in _EARLIER)
    if not (folder / PICKLE).is_file() and not earlier:
        raise ValueError(
            f"it has no {PICKLE}, and not {', '.join(_EARLIER)} of scvi-tools before 0.15; give the folder in which"
            " model.save wrote, without a prefix"
        )
    try:
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not (folder / PICKLE).is_file():
                _convert_earlier(folder, temporary)
                folder = Path(temporary)
            content = torch.load(folder / PICKLE, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"it cannot be unpickled here ({type(error).__name__}: {_first_line(error)})") from None
    if not isinstance(content, dict) or {"attr_dict", "model_state_dict", "var_names"} - content.keys():
        raise ValueError(f"its {PICKLE} was not written by scvi-tools")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(": ")


def _family(kind: Any) -> Family:
    if kind not in FAMILIES:
        raise ValueError(f"its class is {kind}; expected {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _convert_earlier(folder: Path, target: str) -> None:
    """Convert the files of scvi-tools before 0.15; they name no class, but the names of the weights differ."""
    weights = torch.load(folder / _EARLIER[0], map_location="cpu", weights_only=False)
    kind = next((kind for name, kind in _KIND_OF_WEIGHT.items() if name in weights), "unknown")
    _family(kind).model_class.convert_legacy_save(str(folder), target, overwrite=True)


def _refuse_other_inputs(registry: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """ValueError for inputs other than counts, batch, labels and proteins."""
    if registry.get("setup_method_name") == "setup_datamodule":
        raise ValueError("it was trained from a data module, and its registry does not name its genes")
    for key, kind in _COVARIATES.items():
        if number := int(_of(fields, key, "summary_stats").get(f"n_{key}", 0)):
            raise ValueError(f"it has {number} {kind} covariate{'s' if number > 1 else ''}; expected only a batch")
    for key, words in (("size_factor", "a size factor"), ("panel", "a panel of proteins")):
        if _of(fields, key, "data_registry"):
            raise ValueError(f"it gets {words} of each cell (setup_anndata({key}_key=...)); expected only a batch")


def _of(fields: Mapping[str, Any], key: str, part: str) -> Mapping[str, Any]:
    """A part of a field's entry in the registry; empty if there is no such field."""
    return fields[key].get(part) or {} if key in fields else {}


def _categories(fields: Mapping[str, Any], key: str) -> tuple[list[str], str | None]:
    """Categories of an obs field, in the order of their codes, and its column; None without a column."""
    state = _of(fields, key, "state_registry")
    if "categorical_mapping" not in state:
        raise ValueError(f"its registry does not list the {'batches' if key == 'batch' else key}")
    names = [str(name) for name in np.asarray(state["categorical_mapping"]).ravel()]
    if len(set(names)) < len(names):
        raise ValueError(f"two of its {key} categories have the same name as text")
    column = state.get("original_key")
    return names, None if column is None or str(column).startswith("_scvi_") else str(column)


def _genes(names: Any, fields: Mapping[str, Any]) -> list[str]:
    """Names of the genes; of a MuData's variables, those of the modality with the counts."""
    state = _of(fields, "X", "state_registry")
    number = int(state.get("n_vars", -1))
    if isinstance(names, dict) or len(names) != number:
        names = state.get("column_names", [])
    genes = [str(name) for name in np.asarray(names).ravel()]
    if len(genes) != number or not genes:
        raise ValueError(f"it has {number:,} genes, and names of {len(genes):,}")
    if len(set(genes)) < len(genes):
        twice = next(name for name in genes if genes.count(name) > 1)
        raise ValueError(f"its genes are not unique: {twice!r} is there {genes.count(twice)} times")
    return genes


def _labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    labels, column = _categories(fields, "labels")
    unlabeled = str(_of(fields, "labels", "state_registry").get("unlabeled_category", labels[-1]))
    classes = labels[:-1] if labels[-1] == unlabeled else labels
    if column is None or unlabeled in classes:
        raise ValueError(f"its registry does not have the labels with the unlabelled category {unlabeled!r} at the end")
    if not classes:
        raise ValueError(f"its cells have no label other than the unlabelled category {unlabeled!r}")
    return {"labels": classes, "labels_key": column, "unlabeled_category": unlabeled}


def _proteins(fields: Mapping[str, Any], batches: list[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
    state = _of(fields, "proteins", "state_registry")
    proteins = [str(name) for name in np.asarray(state.get("column_names", [])).ravel()]
    if not proteins or len(set(proteins)) < len(proteins):
        raise ValueError("its registry has no names of proteins, or not unique ones")
    masks = {} if _init_values(attributes).get("override_missing_proteins") else state.get("protein_batch_mask") or {}
    by_code = dict(masks if isinstance(masks, Mapping) else enumerate(masks))
    missing = {
        batches[int(code)]: [name for name, there in zip(proteins, np.ravel(mask), strict=True) if not there]
        for code, mask in by_code.items()
    }
    return {"proteins": proteins, "missing_proteins": {batch: names for batch, names in missing.items() if names}}


def _init_values(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments as scvi-tools saved them, in both of its layouts: with all `**kwargs` in one mapping."""
    saved = attributes.get("init_params_")
    if not isinstance(saved, Mapping):
        raise ValueError("it has no init arguments")
    plain = saved.get("non_kwargs", {name: value for name, value in saved.items() if not isinstance(value, dict)})
    nested = saved.get("kwargs", {name: value for name, value in saved.items() if isinstance(value, dict)})
    return {**plain, **{name: value for values in nested.values() for name, value in values.items()}}


def _arguments(family: Family, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of the model: those that `families` requires, and the others that differ from their default."""
    given = _init_values(attributes)
    defaults = _defaults(family)
    found = {name: given.get(name, defaults[name]) for name in family.settings}
    for name, value in given.items():
        if name in _NOT_OF_THE_NETWORK or (name in defaults and value == defaults[name]):
            continue
        found[name] = value
    return {name: _plain(name, value) for name, value in found.items()}


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it; numbers of numpy become Python's."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError(f"its argument {name} holds a Python object, which the safe form cannot store") from None
    return value


def _defaults(family: Family) -> dict[str, Any]:
    """Default of each init argument of the class, its module, and the module that this one passes arguments on to."""
    classes = (*reversed([base for base in family.module_class.__mro__ if base is not object]), family.model_class)
    return {
        name: parameter.default
        for each in classes
        if "__init__" in vars(each)
        for name, parameter in inspect.signature(each).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
