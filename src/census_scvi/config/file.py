"""Read settings from YAML files and the command line, as values for a pydantic model of the settings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from census_scvi.config.renamed import translate_file, translate_overrides
from census_scvi.config.section import members
from census_scvi.config.yaml_file import Plain, YamlError, parse_yaml
from census_scvi.errors import UserError
from census_scvi.files.paths import expand

EXTENDS = "extends"
COMMAND_LINE = "command line"
_MOST_BYTES = 10_000_000
_SECTIONS = "sections such as census, hvg and model"
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}


@dataclass(frozen=True)
class Written:
    """Values as they were written, and the files that contain them.

    Attributes
    ----------
    values
        All values, merged; scalars as they were written (see `typed`).
    layers
        Each source (a file, or `command line`) and the values that it sets; highest priority first.
    """

    values: dict[str, Any]
    layers: list[tuple[str, dict[str, Any]]]

    def origin(self, key: str) -> str:
        """The source that sets a dotted key: a file or `command line`; if there is none, the main file."""
        path = key.split(".") if key else []
        named = next(place for place, _ in self.layers if place != COMMAND_LINE)
        return next((place for place, values in self.layers if path and _holds(values, path)), named)


def read_settings(path: Path, overrides: Sequence[str] = (), expected: str = _SECTIONS) -> Written:
    """Read the settings of a file, of the files that it extends, and of the command line, which has priority.

    A file may contain `extends: FILE`, with a path relative to the file. Its sections and mappings are merged with
    those of the other file key by key; its lists and values replace those of the other file.

    Raises
    ------
    UserError
        As for `read_yaml`, or a file extends a missing file or itself (directly or through others), or an override is
        not `section.key=value`.
    """
    files, overrides = _chain(path, expected), translate_overrides(overrides)
    layers = [(str(file), values) for file, values in files]
    merged: dict[str, Any] = {}
    for _, values in reversed(files):
        merged = _merge(merged, values)
    if overrides:
        set_there: dict[str, Any] = {}
        apply_overrides(set_there, overrides)
        apply_overrides(merged, overrides)
        layers.insert(0, (COMMAND_LINE, set_there))
    return Written(merged, layers)


def _chain(path: Path, expected: str) -> list[tuple[Path, dict[str, Any]]]:
    """A file and the files that it extends, each with the values that it sets."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        seen.append(following.resolve())
        values = read_yaml(following, expected)
        translate_file(values, str(following))
        chain.append((following, values))
        if EXTENDS not in values:
            break
        file, following = following, _extended(following, values.pop(EXTENDS))
        if following.resolve() in seen:
            raise UserError(f"{file}: extends {following}, which extends it, too; remove one of the two lines")
        if not following.exists():
            raise UserError(f"{file}: extends {following}: no such file; the path is relative to {file}")
    return chain


def _extended(path: Path, value: Any) -> Path:
    text = value.text if isinstance(value, Plain) else value
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}: {EXTENDS} is not a path; expected one YAML file, as in {EXTENDS}: base.yaml")
    try:
        return path.parent / expand(text)
    except ValueError as error:
        raise UserError(f"{path}: {EXTENDS} is {text!r}: {error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; other values replace. An empty value does not replace a mapping."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merge(known, value)
        elif not (isinstance(known, dict) and value == Plain("")):
            merged[key] = value
    return merged


def _holds(values: Any, path: list[str]) -> bool:
    """Whether a dotted key is set in nested mappings, or one of its sections has a value that is not a mapping."""
    for place, name in enumerate(path):
        if not isinstance(values, dict) or ".".join(path[place:]) in values:
            return True
        if name not in values:
            return False
        values = values[name]
    return True


def read_yaml(path: Path, expected: str = _SECTIONS) -> dict[str, Any]:
    """Read a YAML file with a mapping; scalars stay as they were written (see `typed`).

    Raises
    ------
    UserError
        The file is missing, larger than 10 MB, not text, not valid YAML, or not a mapping. The error has the file, the
        line if it is known, and what was found.
    """
    text = _text(path, expected)
    try:
        values = parse_yaml(text)
    except YamlError as error:
        where = f" line {error.line}" if error.line else ""
        raise UserError(f"{path}{where}: not valid YAML: {error}") from None
    if isinstance(values, dict):
        return values
    found = "an empty file" if values == Plain("") else "a list" if isinstance(values, list) else "text"
    raise UserError(f"{path}: expected {expected}, found {found}")


def _text(path: Path, expected: str) -> str:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a YAML file of {expected}")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise UserError(f"{path} has {size / 1e6:,.0f} MB; expected a YAML file of {expected}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a YAML file of {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: not text in UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply overrides `section.key=value` to nested values, in place."""
    for override in overrides:
        key, separator, text = override.partition("=")
        path = [name.strip() for name in key.split(".")]
        if not separator or not all(path):
            raise UserError(
                f"{COMMAND_LINE}: {override!r} is not a setting; expected section.key=value, without spaces"
            )
        if path == [EXTENDS]:
            raise UserError(f"{COMMAND_LINE}: {EXTENDS} can only be set in a file")
        try:
            value = parse_yaml(text)
        except YamlError as error:
            raise UserError(
                f"{COMMAND_LINE}: {override!r}: the value is not valid YAML ({error}); put it in quotes"
            ) from None
        if isinstance(value, Plain) and text.strip().startswith(value.text):
            value = Plain(text.strip())  # keep text that YAML would read as a comment; a command line has no comments
        _set(values, path, value)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def typed(values: Any, annotation: Any = Any) -> Any:
    """Convert scalars to the types of the settings: text as it was written, numbers by the YAML 1.2 core schema.

    Parameters
    ----------
    values
        Values from `parse_yaml`.
    annotation
        Type of the setting: a model, or the annotation of a field.
    """
    if isinstance(values, Plain):
        return _scalar(values, list(members(annotation)))
    if isinstance(values, list):
        item = next((get_args(member)[0] for member in members(annotation) if get_origin(member) is list), Any)
        return [typed(value, item) for value in values]
    if isinstance(values, dict):
        return {key: typed(value, _annotation_of(key, annotation)) for key, value in values.items()}
    return values


def _annotation_of(key: str, annotation: Any) -> Any:
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(key)
            return field.annotation if field else Any
        if get_origin(member) is dict:
            return get_args(member)[1]
    return Any


def _scalar(scalar: Plain, members: list[Any]) -> Any:
    value = scalar.value
    if value is None:
        return None
    names = {name for member in members if get_origin(member) is Literal for name in get_args(member)}
    if str in members or Path in members or scalar.text in names:
        return scalar.text
    if bool in members and isinstance(value, str):  # as in YAML 1.1: yes, no, on and off can only mean a bool here
        return _YES_NO.get(value.lower(), value)
    return value
