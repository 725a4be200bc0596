"""Arguments of the installed Lightning and scvi-tools, read from the signatures of their functions.

`python -m census_scvi.training.installed_arguments` adds the installed versions to the table that is used to check
configs.
"""

from __future__ import annotations

import ast
import inspect
import json
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch
import scvi.module
import scvi.train

from census_scvi.config import library_arguments as names
from census_scvi.config.library_arguments import LIBRARIES, Arguments, Listing, check_trainer, check_training_plan
from census_scvi.config.section import members
from census_scvi.errors import UserError
from census_scvi.model.families import FAMILIES, Family

_BY_NAME = {kind.__name__: kind for kind in (int, float, bool, str, dict)} | {"dict | None": dict | None}
_SIMPLE = {kind: kind.__name__ for kind in (int, float, bool, str, dict)} | {type(None): "None"}


def installed() -> Listing:
    """Arguments of the installed versions."""
    return {
        "lightning": {"Trainer": arguments_of(lightning.pytorch.Trainer.__init__)},
        "scvi-tools": {
            "Trainer": arguments_of(scvi.train.Trainer.__init__),
            "TrainingPlan": arguments_of(scvi.train.TrainingPlan.__init__),
            "SemiSupervisedTrainingPlan": arguments_of(scvi.train.SemiSupervisedTrainingPlan.__init__),
            "AdversarialTrainingPlan": arguments_of(scvi.train.AdversarialTrainingPlan.__init__),
            "VAE.loss": arguments_of(scvi.module.VAE.loss),
            "SCANVAE.loss": arguments_of(scvi.module.SCANVAE.loss),
            "TOTALVAE.loss": arguments_of(scvi.module.TOTALVAE.loss),
            **{family.kind: _model_arguments(family) for family in FAMILIES.values()},
        },
    }


def _model_arguments(family: Family) -> Arguments:
    """Arguments of a model and of its module, which the model passes on."""
    modules = [scvi.module.VAE] if family.kind == "SCANVI" else []  # SCANVAE passes the others on to VAE
    owners = [*modules, family.module_class, family.model_class]
    return {name: kind for owner in owners for name, kind in arguments_of(owner.__init__, values=True).items()}


def arguments_of(method: Callable[..., Any], *, values: bool = False) -> Arguments:
    """Named arguments of a method with their types, or with their possible values if `values` and they are listed."""
    try:
        types = typing.get_type_hints(method)
    except NameError:  # a name that the library imports for type checkers only: annotations stay text
        types = dict(method.__annotations__)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {
        each.name: _types(types.get(each.name), each.default, values=values)
        for each in parameters
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _types(annotation: Any, default: Any, *, values: bool) -> str:
    if isinstance(annotation, str):  # an annotation that could not be resolved
        annotation = _BY_NAME.get(annotation, _literal(annotation))
    if values and typing.get_origin(annotation) is typing.Literal:
        return " | ".join(f"'{value}'" for value in typing.get_args(annotation))
    found = [_SIMPLE.get(kind, "other") if isinstance(kind, type) else "other" for kind in members(annotation)]
    # Sorted, because typing caches equal unions: their order depends on which modules were imported before.
    kinds = {*found, *(["None"] if default is None else [])}
    return " | ".join(sorted(kinds, key=lambda kind: (kind in ("None", "other"), kind)))


def _literal(annotation: str) -> Any:
    """The type of a text such as `Literal['nb', 'zinb']`; None for another text."""
    if not annotation.startswith("Literal["):
        return None
    return typing.Literal[ast.literal_eval(f"({annotation[len('Literal[') : -1]},)")]


def require_known_arguments(trainer: dict[str, Any], plan: dict[str, Any], kind: str) -> None:
    """UserError if `train.trainer` or `training_plan` has an argument that the installed libraries do not accept."""
    listing = installed()
    try:
        check_trainer(trainer, listing)
        check_training_plan(plan, listing, kind)
    except ValueError as error:
        raise UserError(str(error)) from None


def main() -> None:
    """Write the installed versions into the table."""
    path = Path(names.__file__).with_name(names.TABLE)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    listing = installed()
    for library in LIBRARIES:
        table.setdefault(library, {})[version(library)] = listing[library]
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
