"""Check arguments of Lightning's Trainer and of scvi-tools' models, training plans and losses: names, types, values.

Importing torch, Lightning and scvi-tools takes six seconds, but a misspelt setting should be reported at once. The
names and types therefore come from a table by version, library_arguments.json, which
`census_scvi.training.installed_arguments` writes. For a version that is not in the table they are checked when training
starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.resources import files
from typing import Any

from pydantic import TypeAdapter, ValidationError

from census_scvi.config.messages import shown, suggestion
from census_scvi.config.versions import version

# Name of each argument and its types, such as `int | None`, or its possible values, such as `'encoder' | 'none'`;
# `other` is a type that only the library can check.
Arguments = dict[str, str]
# Arguments of one version of each library, by package and by class or function.
Listing = dict[str, dict[str, Arguments]]
LIBRARIES = ("lightning", "scvi-tools")
TABLE = "library_arguments.json"

# Arguments that may not be set here, and the setting to use instead (None: the pipeline sets the argument).
_TRAINER_RESERVED = {
    "max_epochs": "train.max_epochs",
    "accelerator": "train.accelerator",
    "devices": "train.devices",
    "num_nodes": "train.num_nodes",
    "strategy": "train.multi_gpu",
    "early_stopping": "train.early_stopping",
    "precision": "train.precision",
    "default_root_dir": "output.directory",
    "callbacks": None,
    "logger": None,
    "plugins": None,
    "enable_checkpointing": None,
    "use_distributed_sampler": None,
    "log_save_dir": None,
    "simple_progress_bar": None,
    "model_registry": None,
    "fast_dev_run": None,
    "barebones": None,
    "reload_dataloaders_every_n_epochs": None,
}
_PLAN_RESERVED = {
    "module": None,
    "n_classes": None,
    "n_samples_per_label": "train.n_samples_per_label",
    "labelled_tensors": None,
    "optimizer_creator": None,
    "tensors": None,
    "inference_outputs": None,
    "generative_outputs": None,
    "kl_weight": "training_plan.max_kl_weight",
}
_MODEL_RESERVED: dict[str, str | None] = {
    **{name: f"model.{name}" for name in ("n_hidden", "n_latent", "n_layers", "dropout_rate")},
    **{name: f"model.{name}" for name in ("gene_likelihood", "encode_covariates")},
    **dict.fromkeys(
        (
            "adata", "registry", "datamodule", "n_input", "n_input_genes", "n_input_proteins", "n_batch", "n_labels",
            "n_continuous_cov", "n_cats_per_cov", "n_panel", "panel_key", "use_size_factor_key", "library_log_means",
            "library_log_vars", "protein_batch_mask", "protein_background_prior_mean", "protein_background_prior_scale",
            "extra_payload_autotune", "var_activation", "y_prior", "labels_groups", "use_labels_groups",
        )
    ),
}  # fmt: skip
# Plan and loss of each kind of model.
_PLAN_OF = {
    "SCVI": ("TrainingPlan", "VAE.loss"),
    "SCANVI": ("SemiSupervisedTrainingPlan", "SCANVAE.loss"),
    "TOTALVI": ("AdversarialTrainingPlan", "TOTALVAE.loss"),
}
MODEL_KINDS = tuple(_PLAN_OF)
# Arguments of TrainingPlan that the plans of other kinds have only as attributes.
OF_EVERY_PLAN = ("max_kl_weight", "min_kl_weight", "eps")
# Metrics of the training that early stopping and the learning rate schedule can monitor.
MEASURED = (
    *(f"{name}_validation" for name in ("elbo", "reconstruction_loss", "kl_local", "kl_global")),
    *(f"{name}_train" for name in ("elbo", "reconstruction_loss", "kl_local", "kl_global")),
    *("validation_loss", "train_loss", "kl_weight"),
)
# Metrics of SCANVI in addition.
MEASURED_BY_SCANVI = tuple(
    f"{mode}_{name}"
    for mode in ("validation", "train")
    for name in ("classification_loss", "accuracy", "f1_score", "calibration_error")
)


def _number(least: float, *, more: bool = False) -> tuple[str, Callable[[Any], bool]]:
    """Description and check of a finite number: `least` or more, or above `least` if `more`."""
    words = f"a finite number above {least:g}" if more else f"a finite number, {least:g} or more"
    return words, lambda value: math.isfinite(value) and (value > least if more else value >= least)


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number, {least} or more", lambda value: bool(value >= least)


def _one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(map(str, values)), lambda value: value in values


# Required values. The libraries accept other values without an error, but then do not train, or train differently.
_TRAINER_VALUES = {
    "accumulate_grad_batches": _whole(1),
    "check_val_every_n_epoch": _whole(1),
    "log_every_n_steps": _whole(1),
    "min_epochs": _whole(0),
    "min_steps": _whole(0),
    "num_sanity_val_steps": _whole(-1),
    "gradient_clip_val": _number(0),
    "deterministic": _one_of(True, False, "warn"),
    "early_stopping_monitor": _one_of(*MEASURED, *MEASURED_BY_SCANVI),
    "early_stopping_mode": _one_of("min", "max"),
    "early_stopping_min_delta": _number(0),
    "early_stopping_patience": _whole(0),
    "early_stopping_warmup_epochs": _whole(0),
}
_PLAN_VALUES = {
    "optimizer": _one_of("Adam", "AdamW"),
    "lr": _number(0, more=True),
    "weight_decay": _number(0),
    "eps": _number(0, more=True),
    "n_steps_kl_warmup": _whole(0),
    "n_epochs_kl_warmup": _whole(0),
    "max_kl_weight": _number(0),
    "min_kl_weight": _number(0),
    "lr_factor": ("a number between 0 and 1", lambda value: 0 < value < 1),
    "lr_patience": _whole(0),
    "lr_threshold": _number(0),
    "lr_scheduler_metric": _one_of(*MEASURED, *MEASURED_BY_SCANVI),
    "lr_min": _number(0),
    "classification_ratio": _number(0),
    "pro_recons_weight": _number(0),
    "scale_adversarial_loss": (
        "a number, 0 or more, or auto",
        lambda value: value == "auto" or (isinstance(value, int | float) and 0 <= value < math.inf),
    ),
}
# The embedding of a cell is the mean of a normal posterior, and its library size is observed.
_MODEL_VALUES = {
    "latent_distribution": _one_of("normal"),
    "use_observed_lib_size": _one_of(True),
    "dispersion": _one_of("gene", "gene-batch"),
    "gene_dispersion": _one_of("gene", "gene-batch"),
    "protein_dispersion": _one_of("protein", "protein-batch"),
}
# None is allowed although the type annotation does not include it: n_steps_kl_warmup is used only if
# n_epochs_kl_warmup is None.
_MAY_BE_NULL = {"n_epochs_kl_warmup", "num_sanity_val_steps"}
_SIMPLE_TYPES = {
    "int": (int, "a whole number"), "float": (float, "a number"), "bool": (bool, "true or false"), "str": (str, "text"),
    "dict": (dict, "keys with values"), "None": (type(None), "null"),
}  # fmt: skip


def listed(versions: dict[str, str] | None = None) -> Listing | None:
    """Arguments of these versions (default: the installed ones) from the table; None if the table lacks one."""
    table = _table()
    try:
        return {name: table[name][versions[name] if versions else version(name)] for name in LIBRARIES}
    except (KeyError, PackageNotFoundError):
        return None


@cache
def _table() -> dict[str, dict[str, dict[str, Arguments]]]:
    table: dict[str, Any] = json.loads(files(__package__).joinpath(TABLE).read_text(encoding="utf-8"))
    return table


def check_trainer(arguments: dict[str, Any], listing: Listing | None) -> None:
    """ValueError if a key of `train.trainer` is not an argument of the Trainer or may not be set here.

    Also if a value has the wrong type or is out of range. If `listing` is None, names and types are not checked.
    """
    known = listing["lightning"]["Trainer"] | listing["scvi-tools"]["Trainer"] if listing else None
    _check("train.trainer", arguments, known, _TRAINER_RESERVED, "Lightning's Trainer")
    _check_values("train.trainer", arguments, known, _TRAINER_VALUES)


def check_training_plan(arguments: dict[str, Any], listing: Listing | None, kind: str = "SCVI") -> None:
    """ValueError if a key of `training_plan` is not an argument of the training plan or loss of a kind of model.

    Also if it may not be set here, or a value has the wrong type or is out of range. If `listing` is None, names and
    types are not checked.
    """
    plan, loss = _PLAN_OF[kind]
    known = None
    if listing:
        of_every_plan = {name: listing["scvi-tools"]["TrainingPlan"][name] for name in OF_EVERY_PLAN}
        known = of_every_plan | listing["scvi-tools"][plan] | listing["scvi-tools"][loss]
    _check("training_plan", arguments, known, _PLAN_RESERVED, f"scvi-tools' {plan}")
    _check_values("training_plan", arguments, known, _PLAN_VALUES)
    least, most = arguments.get("min_kl_weight", 0.0), arguments.get("max_kl_weight", 1.0)
    if least > most:
        raise ValueError(f"training_plan.min_kl_weight is {least} and above training_plan.max_kl_weight, {most}")
    if arguments.get("n_epochs_kl_warmup") and arguments.get("n_steps_kl_warmup"):
        raise ValueError("training_plan sets both n_epochs_kl_warmup and n_steps_kl_warmup; keep one of them")


def check_model_arguments(arguments: dict[str, Any], listing: Listing | None, kind: str) -> None:
    """ValueError if a key of `model.arguments` is not an argument of a kind of model, or may not be set here.

    Also if a value has the wrong type or is not supported. If `listing` is None, names and types are not checked.
    """
    known = listing["scvi-tools"][kind] if listing else None
    _check("model.arguments", arguments, known, _MODEL_RESERVED, f"scvi-tools' {kind}")
    _check_values("model.arguments", arguments, known, _MODEL_VALUES)


def _check(
    section: str, arguments: dict[str, Any], known: Arguments | None, reserved: dict[str, str | None], owner: str
) -> None:
    for name, value in arguments.items():
        if name in reserved:
            instead = f"; set {reserved[name]}" if reserved[name] else ": the pipeline sets it itself"
            raise ValueError(f"{section}.{name} cannot be set here{instead}")
        if known is None:
            continue
        if name not in known:
            near = suggestion(name, [k for k in known if k not in reserved])
            raise ValueError(f"{section}.{name} is not an argument of {owner}{near}")
        _check_type(f"{section}.{name}", value, known[name])


def _check_values(
    section: str,
    arguments: dict[str, Any],
    known: Arguments | None,
    values: dict[str, tuple[str, Callable[[Any], bool]]],
) -> None:
    for name, value in arguments.items():
        expected, holds = values.get(name, ("", lambda _: True))
        if value is None and (known is None or "None" in known[name] or name in _MAY_BE_NULL):
            continue
        if (value is None and expected) or not _holds(holds, value):
            near = suggestion(str(value), [*MEASURED, *MEASURED_BY_SCANVI]) if "elbo_validation" in expected else ""
            raise ValueError(f"{section}.{name} is {shown(value)}, expected {expected}{near}")


def _check_type(key: str, value: Any, annotation: str) -> None:
    parts = [part.strip() for part in annotation.split("|")]
    if words := [part.strip("'") for part in parts if part.startswith("'")]:
        if value not in words:
            near = suggestion(value, words) if isinstance(value, str) else ""
            raise ValueError(f"{key} is {shown(value)}, expected one of {', '.join(words)}{near}")
        return
    if value is None or not set(parts) <= _SIMPLE_TYPES.keys():
        return  # only the library can check this type
    if not any(_is(value, _SIMPLE_TYPES[part][0]) for part in parts):
        expected = " or ".join(_SIMPLE_TYPES[part][1] for part in parts if part != "int" or "float" not in parts)
        raise ValueError(f"{key} is {shown(value)}, expected {expected}")


def _is(value: Any, kind: type) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _holds(holds: Callable[[Any], bool], value: Any) -> bool:
    try:
        return holds(value)
    except TypeError:  # for example text instead of a number, if types were not checked
        return False
