"""From YAML text and command-line overrides to the values that a model of settings takes."""

from __future__ import annotations

import codecs
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from census_scvi.config.yaml_file import Plain, YamlError, parse_yaml
from census_scvi.errors import UserError

_MOST_BYTES = 10_000_000
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}


def read_yaml(path: Path, expected: str = "sections such as census, hvg and model") -> dict[str, Any]:
    """The mapping in a YAML file, with scalars as they were written (see `typed`).

    Raises
    ------
    UserError
        The file is missing, no text, malformed, or not a mapping of what is expected: file, line and what was found.
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


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...] | list[str]) -> set[str]:
    """Set `section.key=value` in place; returns the dotted keys that were set."""
    keys = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        path = [name.strip() for name in key.split(".")]
        if not separator or not all(path):
            raise UserError(f"command line: {override!r} is not a setting; expected section.key=value, without spaces")
        try:
            value = parse_yaml(text)
        except YamlError as error:
            raise UserError(
                f"command line: {override!r}: the value is not valid YAML ({error}); put it in quotes"
            ) from None
        if isinstance(value, Plain) and text.strip().startswith(value.text):
            value = Plain(text.strip())  # with what YAML takes for a comment: there are none on a command line
        _set(values, path, value)
        keys.add(".".join(path))
    return keys


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def typed(values: Any, annotation: Any = Any) -> Any:
    """Scalars of a YAML text as the settings want them: text as it was written, numbers by the core rules of YAML 1.2.

    Parameters
    ----------
    values
        What `parse_yaml` gives.
    annotation
        Type that the values are for: a model, or the annotation of a field.
    """
    if isinstance(values, Plain):
        return _scalar(values, list(_members(annotation)))
    if isinstance(values, list):
        item = next((get_args(member)[0] for member in _members(annotation) if get_origin(member) is list), Any)
        return [typed(value, item) for value in values]
    if isinstance(values, dict):
        return {key: typed(value, _annotation_of(key, annotation)) for key, value in values.items()}
    return values


def _annotation_of(key: str, annotation: Any) -> Any:
    for member in _members(annotation):
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
    if bool in members and isinstance(value, str):  # as YAML 1.1 has it; there is nothing else that they could mean
        return _YES_NO.get(value.lower(), value)
    return value


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, without what annotates them."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation
