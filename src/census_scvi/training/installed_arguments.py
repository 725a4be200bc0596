"""Arguments of the installed Lightning and scvi-tools, read from the signatures of their functions.

`python -m census_scvi.training.installed_arguments` adds the installed versions to the table that is used to check
configs.
"""

from __future__ import annotations

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

from census_scvi.config.section import members
from census_scvi.errors import UserError
from census_scvi.training import library_arguments as names
from census_scvi.training.library_arguments import LIBRARIES, Arguments, Listing, check_trainer, check_training_plan

_SIMPLE = {kind: kind.__name__ for kind in (int, float, bool, str, dict)} | {type(None): "None"}


def installed() -> Listing:
    """Arguments of the installed versions."""
    return {
        "lightning": {"Trainer": arguments_of(lightning.pytorch.Trainer.__init__)},
        "scvi-tools": {
            "Trainer": arguments_of(scvi.train.Trainer.__init__),
            "TrainingPlan": arguments_of(scvi.train.TrainingPlan.__init__),
            "VAE.loss": arguments_of(scvi.module.VAE.loss),
        },
    }


def arguments_of(method: Callable[..., Any]) -> Arguments:
    """Named arguments of a method, with their types."""
    try:
        types = typing.get_type_hints(method)
    except NameError:  # a name that the library imports for type checkers only
        types = {}
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {
        each.name: _types(types.get(each.name), each.default)
        for each in parameters
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _types(annotation: Any, default: Any) -> str:
    found = [_SIMPLE.get(kind, "other") if isinstance(kind, type) else "other" for kind in members(annotation)]
    # Sorted, because typing caches equal unions: their order depends on which modules were imported before.
    kinds = {*found, *(["None"] if default is None else [])}
    return " | ".join(sorted(kinds, key=lambda kind: (kind in ("None", "other"), kind)))


def require_known_arguments(trainer: dict[str, Any], plan: dict[str, Any]) -> None:
    """UserError if `train.trainer` or `training_plan` has an argument that the installed libraries do not accept."""
    listing = installed()
    try:
        check_trainer(trainer, listing)
        check_training_plan(plan, listing)
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
