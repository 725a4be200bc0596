"""Renamed and removed settings: tables for the translation of files, command lines and records."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from census_scvi.config.yaml_file import Plain
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

# SETTINGS: earlier name of a setting or section, and its current name.
# VALUES: current name of a setting, and its earlier values with their current names.
SETTINGS = {
    "query.n_neighbours": "annotate.overrides.n_neighbors",
    "query.n_neighbors": "annotate.overrides.n_neighbors",
    "query.method": "annotate.method",
}
VALUES = {"annotate.method": {"neighbours": "neighbors"}}
# Defaults of earlier settings that are now entries of a mapping, where the default is to be absent.
DEFAULTS = {"annotate.overrides.n_neighbors": 15}
# Removed settings: the value that means the current behaviour and is ignored with a warning, and the reason why any
# other value is refused.
REMOVED = {"evaluate.mode": ("sound", "the metrics of the published script, with their flaws, are no longer computed")}
# Removed values of a setting that still exists, and why; files and command lines with them are refused.
_ON_EMBEDDING = (
    "a classifier on the model's embedding, which was removed because neighbors is better; use annotate.method:"
    " consensus, or annotate.method: {} for a classifier on log-normalised counts"
)
REMOVED_VALUES = {
    "query.method": {name: _ON_EMBEDDING.format(name) for name in ("random_forest", "logistic_regression")}
}
# Files and command lines may use the earlier names until this release; records may always contain them.
_UNTIL = "release 0.3"


def translate_file(values: dict[str, Any], source: str) -> None:
    """Translate the settings of a YAML file to their current names and values, in place, with a warning for each.

    Removed values are looked for first, by the name under which they were removed.

    Raises
    ------
    UserError
        A setting is set under both names, or has a removed value, or a removed setting has a value that is no longer
        supported.
    """
    for key in REMOVED_VALUES:
        section, name = _place(values, key)
        found = None if section is None else section.get(name)
        _refuse(source, key, found.text if isinstance(found, Plain) else found)
    for old, new, what in _translate(values, source):
        _notice(source, old, new, what)
    for key in REMOVED:
        section, name = _place(values, key)
        if section is not None and name in section:
            found = section.pop(name)
            _drop(source, key, found.text if isinstance(found, Plain) else found)


def translate_overrides(overrides: Sequence[str]) -> list[str]:
    """Like `translate_file`, for `section.key=value` strings; returns the translated strings."""
    for text in overrides:
        _refuse("command line", text.partition("=")[0].strip(), text.partition("=")[2].strip())
    translated = [_override(text) for text in overrides]
    for text in translated:
        if (key := text.partition("=")[0].strip()) in REMOVED:
            _drop("command line", key, text.partition("=")[2].strip())
    return [text for text in translated if text.partition("=")[0].strip() not in REMOVED]


def translate_record(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate the flat settings in a record of a run directory or publication: `{"query.n_neighbours": 7}`.

    A removed value is dropped, and so are the `DEFAULTS` of mappings, and mappings without others.
    """
    kept = {key: value for key, value in settings.items() if _removed(key, value) is None}
    named = {_name(key): value for key, value in kept.items()}
    mappings = {key.rpartition(".")[0] for key in DEFAULTS}
    return {
        key: _value(key, value)
        for key, value in named.items()
        if not (value == DEFAULTS.get(key, object()) or (key in mappings and value == {}))
    }


def translate_recorded_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a complete recorded configuration; returns a copy."""
    config = copy.deepcopy(config)
    list(_translate(config, "record", recorded=True))
    return config


def _translate(values: dict[str, Any], source: str, *, recorded: bool = False) -> Iterator[tuple[str, str, str]]:
    """Translate nested values in place; yields each change: earlier text, current text, and `name` or `value`.

    If a record has both names, the value of the current one is kept.
    """
    for old, new in SETTINGS.items():
        section, name = _place(values, old)
        if section is None or name not in section:
            continue
        found = section.pop(name)
        target, new_name = _place(values, new, make=True)
        if target is None or new_name in target:
            if recorded:
                continue
            raise UserError(f"{source}: {old} is an earlier name of {new}, which is set, too; remove {old}")
        target[new_name] = found
        yield old, new, "name"
    for key, names in VALUES.items():
        section, name = _place(values, key)
        found = None if section is None else section.get(name)
        text = found.text if isinstance(found, Plain) else found
        if section is not None and isinstance(text, str) and text in names:
            section[name] = names[text]
            yield f"{key}: {text}", f"{key}: {names[text]}", "value"


def _override(text: str) -> str:
    key, separator, value = text.partition("=")
    old = ".".join(name.strip() for name in key.split("."))
    new, now = _name(old), _value(_name(old), value.strip())
    if new != old:
        _notice("command line", old, new, "name")
    if now != value.strip():
        _notice("command line", f"{new}={value}", f"{new}={now}", "value")
    return f"{new}{separator}{now}" if (new, now) != (old, value.strip()) else text


def _name(key: str) -> str:
    for old, new in SETTINGS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _value(key: str, value: Any) -> Any:
    return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _place(values: dict[str, Any], key: str, *, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Section that contains a dotted key (None if it is absent or not a mapping), and the last name of the key."""
    *sections, name = key.split(".")
    for section in sections:
        found = values.setdefault(section, {}) if make else values.get(section)
        if not isinstance(found, dict):
            return None, name
        values = found
    return values, name


def _drop(source: str, key: str, value: Any) -> None:
    """Warn about a removed setting whose value means the current behaviour; UserError for any other value."""
    kept, why = REMOVED[key]
    if value != kept:
        raise UserError(f"{source}: {key} is {value!r} and was removed: {why}; remove the setting")
    log.warning("%s: %s was removed and is not needed; remove it", source, key)


def _refuse(source: str, key: str, value: Any) -> None:
    """UserError for a removed value of a setting."""
    if (why := _removed(key, value)) is not None:
        raise UserError(f"{source}: {key}: {value} was {why}")


def _removed(key: str, value: Any) -> str | None:
    """Why a value of a setting was removed; None if it was not."""
    return REMOVED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None


def _notice(source: str, old: str, new: str, what: str) -> None:
    log.warning("%s: %s is now %s; the old %s works until %s", source, old, new, what, _UNTIL)
