"""Settings and values that had another name: one table, from which files, command lines and records are translated."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from census_scvi.config.yaml_file import Plain
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

# Setting or section: its name now. Setting, by its name now: its values and what they are now.
SETTINGS = {"query.n_neighbours": "query.n_neighbors"}
VALUES = {"query.method": {"neighbours": "neighbors"}}
# Settings that were removed: the value that asks for what is done now, which is ignored with a notice; why another is
# refused.
REMOVED = {"evaluate.mode": ("sound", "the metrics of the published script, with their flaws, are no longer computed")}
# People may write the old names until then; in records they are read for good.
_UNTIL = "release 0.3"


def translate_file(values: dict[str, Any], source: str) -> None:
    """Give the settings of a YAML file their names and values of today, in place, with a notice for each.

    Raises
    ------
    UserError
        A setting is there under both names.
    """
    for old, new, what in _translate(values, source):
        _notice(source, old, new, what)
    for key in REMOVED:
        section, name = _place(values, key)
        if section is not None and name in section:
            found = section.pop(name)
            _drop(source, key, found.text if isinstance(found, Plain) else found)


def translate_overrides(overrides: Sequence[str]) -> list[str]:
    """The same for `section.key=value` strings."""
    translated = [_override(text) for text in overrides]
    for text in translated:
        if (key := text.partition("=")[0].strip()) in REMOVED:
            _drop("command line", key, text.partition("=")[2].strip())
    return [text for text in translated if text.partition("=")[0].strip() not in REMOVED]


def translate_record(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for what a run directory or a publication has recorded, flat: `{"query.n_neighbours": 15}`."""
    named = {_name(key): value for key, value in settings.items()}
    return {key: _value(key, value) for key, value in named.items()}


def translate_recorded_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same for a whole config that was recorded; returns a copy."""
    config = copy.deepcopy(config)
    list(_translate(config, "record"))
    return config


def _translate(values: dict[str, Any], source: str) -> Iterator[tuple[str, str, str]]:
    """Change nested values in place; yields what was, what is now, and whether that is a name or a value."""
    for old, new in SETTINGS.items():
        section, name = _place(values, old)
        if section is None or name not in section:
            continue
        found = section.pop(name)
        target, new_name = _place(values, new, make=True)
        if target is None or new_name in target:
            raise UserError(f"{source}: {old} is the earlier name of {new}, and both are set; remove {old}")
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
    """The section of a dotted key, None where there is none or something else, and the key's last name."""
    *sections, name = key.split(".")
    for section in sections:
        found = values.setdefault(section, {}) if make else values.get(section)
        if not isinstance(found, dict):
            return None, name
        values = found
    return values, name


def _drop(source: str, key: str, value: Any) -> None:
    """Notice that a removed setting asks for what is done anyway; UserError where it asks for something else."""
    kept, why = REMOVED[key]
    if value != kept:
        raise UserError(f"{source}: {key} is {value!r} and was removed: {why}; remove the setting")
    log.warning("%s: %s was removed and is not needed; remove it", source, key)


def _notice(source: str, old: str, new: str, what: str) -> None:
    log.warning("%s: %s is now %s; the old %s works until %s", source, old, new, what, _UNTIL)
