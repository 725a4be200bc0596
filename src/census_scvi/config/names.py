"""Arguments of Lightning's Trainer and of scvi-tools' TrainingPlan and loss: which there are, and which values train.

The names are read from the installed libraries' source text: importing torch, Lightning and scvi-tools takes six
seconds, and a misspelt setting should be answered at once.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from census_scvi.config.messages import shown, suggestion

# Arguments that another setting or the pipeline itself decides, with the setting to use instead.
_TRAINER_RESERVED = {
    "max_epochs": "train.max_epochs",
    "accelerator": "train.accelerator",
    "devices": "train.devices",
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
    "optimizer_creator": None,
    "tensors": None,
    "inference_outputs": None,
    "generative_outputs": None,
    "kl_weight": "training_plan.max_kl_weight",
}
# What training measures, for early stopping and for the learning rate.
MEASURED = (
    *(f"{name}_validation" for name in ("elbo", "reconstruction_loss", "kl_local", "kl_global")),
    *(f"{name}_train" for name in ("elbo", "reconstruction_loss", "kl_local", "kl_global")),
    *("validation_loss", "train_loss", "kl_weight"),
)


def _number(least: float, *, more: bool = False) -> tuple[str, Callable[[Any], bool]]:
    """A finite number from `least` on, or above it."""
    words = f"a finite number above {least:g}" if more else f"a finite number, {least:g} or more"
    return words, lambda value: math.isfinite(value) and (value > least if more else value >= least)


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number, {least} or more", lambda value: bool(value >= least)


def _one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(map(str, values)), lambda value: value in values


# Values that the libraries would take, and then not train, or train something else, without a word.
_TRAINER_VALUES = {
    "accumulate_grad_batches": _whole(1),
    "check_val_every_n_epoch": _whole(1),
    "log_every_n_steps": _whole(1),
    "num_nodes": _whole(1),
    "min_epochs": _whole(0),
    "min_steps": _whole(0),
    "num_sanity_val_steps": _whole(-1),
    "gradient_clip_val": _number(0),
    "deterministic": _one_of(True, False, "warn"),
    "early_stopping_monitor": _one_of(*MEASURED),
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
    "lr_scheduler_metric": _one_of(*MEASURED),
    "lr_min": _number(0),
}
# Which their annotation does not say; n_steps_kl_warmup counts without the epochs' warm-up only.
_MAY_BE_NULL = {"n_epochs_kl_warmup", "num_sanity_val_steps"}
_SIMPLE_TYPES = {
    "int": (int, "a whole number"), "float": (float, "a number"), "bool": (bool, "true or false"), "str": (str, "text"),
    "dict": (dict, "keys with values"), "None": (type(None), "null"),
}  # fmt: skip


def check_trainer(arguments: dict[str, Any]) -> None:
    """ValueError for a key of `train.trainer` that is no argument of the Trainer, or that another setting decides.

    And for a value of the wrong type or range.
    """
    known = _arguments("lightning/pytorch/trainer/trainer.py", "Trainer.__init__")
    known |= _arguments("scvi/train/_trainer.py", "Trainer.__init__")
    _check("train.trainer", arguments, known, _TRAINER_RESERVED, "Lightning's Trainer")
    _check_values("train.trainer", arguments, known, _TRAINER_VALUES)


def check_training_plan(arguments: dict[str, Any]) -> None:
    """ValueError for a key of `training_plan` that TrainingPlan and the loss do not take, or a wrong type or range."""
    known = _arguments("scvi/train/_trainingplans.py", "TrainingPlan.__init__")
    known |= _arguments("scvi/module/_vae.py", "VAE.loss")
    _check("training_plan", arguments, known, _PLAN_RESERVED, "scvi-tools' TrainingPlan")
    _check_values("training_plan", arguments, known, _PLAN_VALUES)
    least, most = arguments.get("min_kl_weight", 0.0), arguments.get("max_kl_weight", 1.0)
    if least > most:
        raise ValueError(f"training_plan.min_kl_weight is {least} and above training_plan.max_kl_weight, {most}")
    if arguments.get("n_epochs_kl_warmup") and arguments.get("n_steps_kl_warmup"):
        raise ValueError("training_plan sets both n_epochs_kl_warmup and n_steps_kl_warmup; keep one of them")


def _check(
    section: str, arguments: dict[str, Any], known: dict[str, str], reserved: dict[str, str | None], owner: str
) -> None:
    for name, value in arguments.items():
        if name in reserved:
            instead = f"; set {reserved[name]}" if reserved[name] else ": the pipeline sets it itself"
            raise ValueError(f"{section}.{name} cannot be set here{instead}")
        if name not in known:
            near = suggestion(name, [k for k in known if k not in reserved])
            raise ValueError(f"{section}.{name} is not an argument of {owner}{near}")
        _check_type(f"{section}.{name}", value, known[name])


def _check_values(
    section: str,
    arguments: dict[str, Any],
    known: dict[str, str],
    values: dict[str, tuple[str, Callable[[Any], bool]]],
) -> None:
    for name, value in arguments.items():
        expected, holds = values.get(name, ("", lambda _: True))
        if value is None and ("None" in known[name] or name in _MAY_BE_NULL):
            continue
        if (value is None and expected) or not holds(value):
            near = suggestion(str(value), list(MEASURED)) if "elbo_validation" in expected else ""
            raise ValueError(f"{section}.{name} is {shown(value)}, expected {expected}{near}")


def _check_type(key: str, value: Any, annotation: str) -> None:
    parts = [part.strip() for part in annotation.split("|")]
    if value is None or not set(parts) <= _SIMPLE_TYPES.keys():
        return  # a type only the library understands: it will say
    if not any(_is(value, _SIMPLE_TYPES[part][0]) for part in parts):
        expected = " or ".join(_SIMPLE_TYPES[part][1] for part in parts if part != "int" or "float" not in parts)
        raise ValueError(f"{key} is {shown(value)}, expected {expected}")


def _is(value: Any, kind: type) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@cache
def _arguments(file: str, qualname: str) -> dict[str, str]:
    """Argument name -> annotation text of a method, from the source file of an installed package."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; run ./scvi-init.sh")
    tree = ast.parse(Path(spec.submodule_search_locations[0], rest).read_text(encoding="utf-8"))
    owner, method = qualname.split(".")
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    function = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == method)
    arguments = [*function.args.args[1:], *function.args.kwonlyargs]
    required = len(function.args.args) - 1 - len(function.args.defaults)
    defaults = [*[None] * required, *function.args.defaults, *function.args.kw_defaults]
    annotations = {argument.arg: _annotation(argument.annotation) for argument in arguments}
    for argument, default in zip(arguments, defaults, strict=True):
        if isinstance(default, ast.Constant) and default.value is None and "None" not in annotations[argument.arg]:
            annotations[argument.arg] += " | None"
    return annotations


def _annotation(node: ast.expr | None) -> str:
    text = ast.unparse(node) if node else ""
    if text.startswith("Optional[") and text.endswith("]"):
        return _annotation(ast.parse(text[len("Optional[") : -1], mode="eval").body) + " | None"
    if text.startswith("Union[") and text.endswith("]") and "[" not in text[6:-1]:
        return " | ".join(part.strip() for part in text[6:-1].split(","))
    return text
