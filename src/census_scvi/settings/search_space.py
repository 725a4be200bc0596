"""Which settings a search may vary, checked with the whole config, and the config of a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from census_scvi.config.messages import describe_errors, shown, suggestion
from census_scvi.config.section import Changes, mark_of, settings_of
from census_scvi.errors import UserError
from census_scvi.search.settings import Range
from census_scvi.settings.config import Config

# These change the prepared file: a likelihood per cell is of other genes, or of other batches.
DATA = ("hvg.top_n_hvg", "hvg.hvg_batch", "anndata.batch_key")
_SECTIONS = ("model", "train", "training_plan")
# These change the cells or what the loss is, so that the losses of two trials are not of the same thing.
_OTHER_CELLS = ("train.train_size", "train.held_out", "train.split_seed", "train.max_cells")
_OTHER_LOSS = ("model.kind",)
_NOT_SEARCHED = ("model.filename", "model.from_scvi_model", "train.multi_gpu", "train.devices")
# Sections that training a trial and measuring it read; of census, only the organism.
_TRIAL_SECTIONS = ("hvg", "anndata", "model", "train", "training_plan", "evaluate", "output", "seed")
# Settings with keys of their own.
_OPEN = ("training_plan", "train.trainer", "model.arguments")


def require_searchable(config: Config) -> None:
    """UserError if the section `search` cannot be used with the rest of the config.

    Every name and every value is checked: lists completely, ranges at both ends.
    """
    if config.fine_tune.model is not None:
        raise UserError("fine_tune.model is set, and the trials of a search are trained from the start; remove it")
    space = config.search.space
    if not space:
        raise UserError(
            "search.space is empty: give settings with values, for example search: {space: {model.n_latent: [10, 50]}}"
        )
    for name, values in space.items():
        _require_name(name)
        _require_several(name, values)
        if name in DATA and isinstance(values, Range):
            raise UserError(f"search.space.{name} is a range: list its values, because prepare runs for each of them")
        for value in values if isinstance(values, list) else [values.low, values.high]:
            _require_value(config, name, value)
    _require_comparable(config)
    _require_budget(config)


def _require_name(name: str) -> None:
    marks = {key: mark_of(field, Changes) for key, field, _ in settings_of(Config)}
    searchable = [key for key, mark in marks.items() if _is_searchable(key) and mark != Changes()]
    if name in _OTHER_CELLS:
        raise UserError(
            f"search.space has {name}, which would change the cells that trials are compared on; remove it, and set it"
            " for all trials"
        )
    if name in searchable or any(name.startswith(f"{key}.") for key in _OPEN):
        return
    if name in marks or name in _OPEN:
        raise UserError(
            f"search.space has {name}, which cannot be searched; settings of model, train and training_plan can"
            f" (training_plan.lr, for example), and {', '.join(DATA)}"
        )
    raise UserError(f"search.space has {name}, which is not a setting{suggestion(name, searchable)}")


def _is_searchable(key: str) -> bool:
    return key in DATA or (key.partition(".")[0] in _SECTIONS and key not in (*_NOT_SEARCHED, *_OTHER_CELLS, *_OPEN))


def _require_several(name: str, values: list[Any] | Range) -> None:
    if isinstance(values, Range):
        return
    if len(values) < 2:
        found = f"one value, {shown(values[0])}" if values else "no value"
        raise UserError(f"search.space.{name} has {found}: give two or more, or set {name} itself and remove it here")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"search.space.{name} has {shown(twice[0])} twice; name it once")


def _require_value(config: Config, name: str, value: Any) -> None:
    try:
        _with(config, {name: value})
    except ValidationError as error:
        raise UserError(describe_errors(error, Config, lambda _: "search.space")) from None


def _require_comparable(config: Config) -> None:
    """UserError if the metric would compare what cannot be compared."""
    search, space = config.search, config.search.space
    other = [name for name in space if name in (*DATA, *_OTHER_LOSS)]
    if other and "elbo" in search.weights:
        raise UserError(
            f"search.space has {other[0]}, and search.metric has the ELBO, which can be compared only for the same"
            " genes, batches and kind of model; set search.metric to bio, batch, or weights of both"
        )
    if not search.weights or not all(weight > 0 for weight in search.weights.values()):
        raise UserError(f"search.metric is {search.metric}, expected weights above 0, such as {{bio: 0.6, batch: 0.4}}")
    if search.scheduler == "asha" and list(search.weights) != ["elbo"]:
        raise UserError(
            f"search.scheduler asha compares the validation ELBO of each epoch, and search.metric is {search.metric};"
            " set search.scheduler to none"
        )
    if list(search.weights) != ["elbo"]:
        _require_held_out(config)
    elif config.train.held_out is None and config.train.train_size == 1.0:
        raise UserError("a search needs validation cells, and train.train_size is 1.0; set it to 0.9, for example")


def _require_held_out(config: Config) -> None:
    if config.train.held_out is None:
        raise UserError(
            f"search.metric is {config.search.metric}, which is measured on held-out donors or studies: set"
            " train.held_out to a value filter of them, for example donor_id in ['A', 'B']"
        )
    measured = {"bio": ("labels", config.evaluate.labels), "batch": ("batches", config.evaluate.batches)}
    for setting, names in (measured[part] for part in config.search.weights if part in measured):
        if not names:
            raise UserError(f"search.metric is {config.search.metric}, and evaluate.{setting} names no obs column")
    if "anndata.batch_key" in config.search.space and config.evaluate.batches[:1] == ["batch"]:
        raise UserError(
            "search.space has anndata.batch_key, and evaluate.batches begins with batch, which differs between the"
            " trials; begin it with another column, for example dataset_id"
        )


def _require_budget(config: Config) -> None:
    if "train.max_epochs" in config.search.space and config.search.max_epochs is not None:
        raise UserError(
            "search.max_epochs is the budget of every trial, and search.space has train.max_epochs; remove one of them"
        )


def trial_config(config: Config, settings: dict[str, Any], seed: int, directory: Path) -> Config:
    """The config of a trial.

    Parameters
    ----------
    config
        The config of the search.
    settings
        Value of each searched setting by dotted name.
    seed
        Seed of the trial; its validation cells are those of the config's seed.
    directory
        Its run directory.
    """
    budget = {"max_epochs": config.search.max_epochs, "max_cells": config.search.max_cells}
    values = {f"train.{name}": value for name, value in budget.items() if value is not None}
    if seed != config.seed:
        split_seed = config.seed if config.train.split_seed is None else config.train.split_seed
        values |= {"seed": seed, "train.split_seed": split_seed}
    return _with(config, values | settings | {"output.directory": str(directory)})


def trial_values(config: Config) -> dict[str, Any]:
    """The values of a trial's config that its training and its measures depend on, for a file."""
    values = config.model_dump(mode="json", include={*_TRIAL_SECTIONS})
    return {"census": {"organism": config.census.organism}, **values}


def data_config(config: Config, settings: dict[str, Any], directory: Path) -> Config:
    """The config by which the cells of a trial are prepared."""
    return _with(config, data_settings(settings) | {"output.directory": str(directory)})


def data_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that change the prepared file."""
    return {name: value for name, value in settings.items() if name in DATA}


def default_settings(config: Config) -> dict[str, Any]:
    """Values of the searched settings in the config itself."""
    flat = config.model_dump(mode="json")
    return {name: _value_at(flat, name.split(".")) for name in config.search.space}


def in_space(config: Config, settings: dict[str, Any]) -> bool:
    """Whether the space contains these settings."""
    for name, values in config.search.space.items():
        value = settings[name]
        if isinstance(values, list):
            if value not in values:
                return False
        elif not isinstance(value, int | float) or not values.low <= value <= values.high:
            return False
    return True


def _value_at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """The config with other values of some settings; ValidationError if one is not valid."""
    values = config.model_dump(exclude={"search"})
    for name, value in settings.items():
        section, *path = name.split(".")
        if not path:
            values[section] = value
            continue
        place = values[section]
        for part in path[:-1]:
            place[part] = place[part] or {}
            place = place[part]
        place[path[-1]] = value
    return Config.model_validate(values)
