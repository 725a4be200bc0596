"""Names that belong to the libraries: arguments of Lightning's Trainer and of scvi-tools' TrainingPlan and loss.

They are read from the installed libraries' source text, because importing torch, Lightning and scvi-tools takes six
seconds and a misspelt setting should be answered at once.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from census_scvi.config_errors import suggestion

# Arguments that another setting or the pipeline itself decides, with the setting to use instead.
_TRAINER_RESERVED = {
    "max_epochs": "train.max_epochs",
    "accelerator": "train.accelerator",
    "devices": "train.devices",
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
_SIMPLE_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict}


def check_trainer(arguments: dict[str, Any]) -> None:
    """ValueError for a key of `train.trainer` that is no argument of the Trainer, or that another setting decides."""
    known = _arguments("lightning/pytorch/trainer/trainer.py", "Trainer.__init__")
    known |= _arguments("scvi/train/_trainer.py", "Trainer.__init__")
    _check("train.trainer", arguments, known, _TRAINER_RESERVED, "Lightning's Trainer")


def check_training_plan(arguments: dict[str, Any]) -> None:
    """ValueError for a key of `training_plan` that TrainingPlan and the loss do not take, or of a wrong type."""
    known = _arguments("scvi/train/_trainingplans.py", "TrainingPlan.__init__")
    known |= _arguments("scvi/module/_vae.py", "VAE.loss")
    _check("training_plan", arguments, known, _PLAN_RESERVED, "scvi-tools' TrainingPlan")
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


def _check_type(key: str, value: Any, annotation: str) -> None:
    parts = [part.strip() for part in annotation.split("|")]
    kinds = [_SIMPLE_TYPES[part] for part in parts if part in _SIMPLE_TYPES]
    if not kinds or len(kinds) < len([p for p in parts if p != "None"]) or value is None:
        return  # a type only the library understands: it will say
    if not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"{key} is {value!r}, expected {annotation}")


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
    return {a.arg: _annotation(a.annotation) for a in arguments}


def _annotation(node: ast.expr | None) -> str:
    text = ast.unparse(node) if node else ""
    if text.startswith("Optional[") and text.endswith("]"):
        return text[len("Optional[") : -1] + " | None"
    if text.startswith("Union[") and text.endswith("]") and "[" not in text[6:-1]:
        return " | ".join(part.strip() for part in text[6:-1].split(","))
    return text
